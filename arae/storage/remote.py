"""A folder on object storage, or on anything else that pyarrow or fsspec opens: whole objects in, whole objects out."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from arae.errors import AraeError, InputError
from arae.files import HashingFile, write_with

PIECE = 8 << 20  # bytes that are read of a file at once
AHEAD = 4  # pieces on their way at once; Arrow's client would take a whole file into memory
WHOLE = {"s3", "gs", "gcs", "abfs", "abfss"}  # schemes whose objects appear once they are complete
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.DOTALL)  # a Path has made one slash of two
_SECRET = re.compile("key|secret|token|password", re.IGNORECASE)
_GONE = re.compile(r"NO_SUCH_KEY|RESOURCE_NOT_FOUND during GetObject|NoSuchKey")
_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|NO_SUCH_BUCKET|UNRECOGNIZED_CLIENT|INVALID_CLIENT|EXPIRED_TOKEN|"
    r"HTTP status 40[13]|[Pp]ermission|[Cc]redential|[Nn]ot authorized|does not have storage",
)


class Away(AraeError, OSError):  # noqa: N818 -- it is a state of the storage
    """The storage does not answer, or fails for a reason that may pass."""


@dataclass(frozen=True)
class Entry:
    """An object as its folder lists it."""

    bytes: int
    changed: int | None
    """Nanoseconds; None where the storage does not tell, and the object may then always be another."""


def is_url(text: str | Path) -> bool:
    """Whether this names something that is not a path of this machine's file system."""
    found = _URL.match(str(text))
    return bool(found) and found[1] != "file" and len(found[1]) > 1


def as_url(text: str | Path) -> str:
    """A URL as it was before a `Path` took one of its slashes."""
    return str(text) if "://" in str(text) else str(text).replace(":/", "://", 1)


def redacted(url: str) -> str:
    """The URL without what could be a secret: user, password and query."""
    scheme, _, rest = as_url(url).partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def without_secrets(url: str) -> str:
    """The URL for others, who have credentials of their own: no user, no password, no keys in its query."""
    query = as_url(url).partition("?")[2].split("&")
    kept = [part for part in query if part and not _SECRET.search(part.partition("=")[0])]
    return redacted(url) + ("?" + "&".join(kept) if kept else "")


def extended(url: str, by: str) -> str:
    """The URL with more at the end of its path."""
    path, mark, query = url.partition("?")
    return f"{path.rstrip('/')}{by}{mark}{query}"


class Remote:
    """The folder at a URL. Nothing is opened before it is needed.

    Every method raises Away where the storage does not answer, and InputError where it refuses: no such bucket, no or
    wrong credentials. These come from the environment or the instance, as Arrow finds them (`AWS_ACCESS_KEY_ID`,
    `~/.aws`, a role), or from the URL; the endpoint from `AWS_ENDPOINT_URL` or the URL's query
    (`s3://bucket/runs?endpoint_override=minio:9000&scheme=http&region=eu-west-1`).
    """

    def __init__(self, url: str) -> None:
        self.url = as_url(url)
        self.shown = redacted(self.url)
        self.scheme = self.url.partition(":")[0]

    def __truediv__(self, name: str) -> Remote:
        """The folder or object of this name below."""
        below = Remote(extended(self.url, f"/{name}"))
        if "_opened" in self.__dict__:  # one client for all
            filesystem, path = self._opened
            below.__dict__["_opened"] = (filesystem, f"{path}/{name}")
        return below

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            from pyarrow import fs
        except ImportError:
            raise InputError(f"{self.shown}: storage at a URL needs pyarrow: pip install 'arae[cluster]'") from None
        parts = urlsplit(self.url)
        if parts.scheme == "s3":
            return _s3(fs, self.url), unquote(parts.netloc.rpartition("@")[2] + parts.path).rstrip("/")
        try:
            filesystem, path = fs.FileSystem.from_uri(self.url)
        except (ValueError, NotImplementedError) as error:
            return _by_fsspec(fs, self.url, str(error))
        return filesystem, path.rstrip("/")

    def list(self) -> dict[str, Entry]:
        """Every object below, by its path from here."""
        with self._told():
            filesystem, path = self._opened
            from pyarrow import fs

            found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
            start = len(path.strip("/")) + 1
            return {
                info.path.strip("/")[start:]: Entry(info.size, info.mtime_ns)
                for info in found
                if info.type == fs.FileType.File
            }

    def entry(self, name: str = "") -> Entry | None:
        """The object of this name; None where there is none."""
        with self._told():
            filesystem, _ = self._opened
            from pyarrow import fs

            info = filesystem.get_file_info(self._at(name))
            return Entry(info.size, info.mtime_ns) if info.type == fs.FileType.File else None

    def etag(self) -> str | None:
        """What the storage itself knows of this object's content, where it does."""
        with self._told(), self._opened[0].open_input_stream(self._opened[1]) as stream:
            known = stream.metadata() or {}
            tag = known.get(b"ETag") or known.get("ETag")
        return tag.decode() if isinstance(tag, bytes) else tag

    def read(self, name: str = "") -> bytes | None:
        """A small object's content; None where there is none."""
        try:
            with self._told(), self._opened[0].open_input_stream(self._at(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def pieces(self, start: int = 0) -> Iterator[bytes]:
        """This object's content from a byte on; FileNotFoundError where there is none."""
        with self._told(), self._opened[0].open_input_file(self._opened[1]) as file:
            file.seek(start)
            while piece := file.read(PIECE):
                yield piece

    def download(self, name: str, to: Path) -> bool:
        """Replace a local file by an object, all or nothing; False where there is none. OSError for the local disk."""

        def fill(file: HashingFile) -> None:
            for piece in (self / name).pieces():
                file.write(piece)

        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_with(to, fill)
        except FileNotFoundError:
            return False
        return True

    def write(self, name: str, content: bytes) -> None:
        """Replace an object, all or nothing."""
        with self._told():
            target = self._begun(name)
            with self._opened[0].open_output_stream(target) as stream:
                stream.write(content)
            self._done(target, name)

    def upload(self, name: str, file: BinaryIO, size: int) -> None:
        """Replace an object by the first `size` bytes of an open file. OSError where that cannot be read."""
        first = file.read(min(size, PIECE))  # a failure of the local disk comes before anything is begun
        with self._told():
            target, left = self._begun(name), size - len(first)
            with self._opened[0].open_output_stream(target) as stream:
                stream.write(first)
                for count in itertools.count(2):
                    if not left or not (piece := file.read(min(left, PIECE))):
                        break
                    stream.write(piece)
                    left -= len(piece)
                    if count % AHEAD == 0:
                        stream.flush()
            self._done(target, name)
        written = self.entry(name)
        if written is None or written.bytes != size - left or left:
            raise Away(f"{self.shown}/{name}: it holds {written and written.bytes} bytes of {size} after writing")

    def delete(self, name: str) -> None:
        """Remove an object; nothing where there is none."""
        with suppress(FileNotFoundError), self._told():
            self._opened[0].delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._opened[1]}/{name}" if name else self._opened[1]

    def _begun(self, name: str) -> str:
        """Where to write to: the place itself only where what is half written there is not seen."""
        if self.scheme in WHOLE:
            return self._at(name)
        target = self._at(name)
        self._opened[0].create_dir(target.rpartition("/")[0], recursive=True)
        return f"{target}.tmp"

    def _done(self, target: str, name: str) -> None:
        if self.scheme not in WHOLE:
            with suppress(OSError):
                self._opened[0].delete_file(self._at(name))  # not every file system moves onto what is there
            self._opened[0].move(target, self._at(name))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the clients raise, as what it means; without what the URL holds of secrets."""
        try:
            yield
        except (AraeError, FileNotFoundError, GeneratorExit):
            raise
        except Exception as error:  # noqa: BLE001 -- OSError from Arrow; fsspec's clients have exceptions of their own
            self._raise(error)

    def _raise(self, error: Exception) -> None:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        for secret in filter(None, urlsplit(self.url).netloc.rpartition("@")[0].split(":")):
            text = text.replace(secret, "…").replace(unquote(secret), "…")
        if _GONE.search(text):  # between the look whether it is there and the reading
            raise FileNotFoundError(f"{self.shown}: {text}") from None
        if _REFUSED.search(text):
            raise InputError(f"{self.shown}: refused ({text}); check the bucket's name and the credentials") from None
        raise Away(f"{self.shown}: no answer ({text})") from None


def _s3(fs: Any, url: str) -> Any:
    """Arrow's client. It would ask AWS for the bucket's region even where the endpoint is another's."""
    parts = urlsplit(url)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    user, _, host = parts.netloc.rpartition("@")
    key, _, secret = user.partition(":")
    endpoint = query.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL")
    region = query.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(unquote(host))
    scheme, found, address = (endpoint or "").partition("://")
    return fs.S3FileSystem(
        access_key=unquote(key) or None,
        secret_key=unquote(secret) or None,
        region=region,
        endpoint_override=(address if found else endpoint) or None,
        scheme=query.get("scheme") or (scheme if found else "https"),
        connect_timeout=5,
        request_timeout=30,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
    )


def _by_fsspec(fs: Any, url: str, reason: str) -> tuple[Any, str]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{redacted(url)}: neither pyarrow ({reason[:80]}) nor fsspec ({error}) opens it") from None
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path.rstrip("/")
