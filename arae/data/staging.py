"""Files of data that lie elsewhere, on this machine's own disk: FFCV reads local files only.

A URL (`data.train: s3://bucket/train.beton`) is always copied; a path where `ARAE_STAGE` is 1, or names it (the
beginnings of paths, parted by `:`). Each file is copied once a machine, by one process while the others wait, to
`ARAE_SCRATCH/data` (default `~/.cache/arae/data`), and checked: by the SHA-256 of the manifest beside it, else by its
size alone, which is said. Copies that no process uses are removed, longest unused first, where they would fill more
than `ARAE_SCRATCH_GB` gigabytes (default: half of what the disk has free without them).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arae.data import beton
from arae.data.origin import Origin
from arae.errors import InputError
from arae.files import write_text
from arae.locks import SAID_S, held, turn
from arae.storage import Away, is_url, patiently, scratch

Note = Callable[[str], None]

ORIGIN = ".origin"  # in a copy's folder: what it is a copy of
_ready: dict[str, tuple[Path, int]] = {}
"""What this process has staged: the copy, and the lock that keeps it, held until the process ends."""


def log_note(text: str) -> None:
    """The default place for notes: the standard library's logging."""
    logging.getLogger("arae.data").warning(text)


def local(named: str, key: str, note: Note = log_note) -> Path:
    """Where the file that a recipe names lies on this machine; copied here first where it must be.

    key: the recipe's key, for what is said. Raises InputError where a URL names nothing, the disk has no room, or the
    file is not what its manifest says; Stopped where the storage does not answer.
    """
    if not is_staged(named):
        return Path(named)
    if named not in _ready or not _ready[named][0].is_file():
        _ready.pop(named, None)
        _ready[named] = Staging(Origin(named), key, note).made()
    return _ready[named][0]


def is_staged(named: str) -> bool:
    """Whether a file is read from a copy on this machine's disk."""
    if is_url(named):
        return True
    asked = os.environ.get("ARAE_STAGE", "")
    path = Path(named).absolute()
    if asked in ("", "0") or path.is_relative_to(scratch()):
        return False
    return asked == "1" or any(path.is_relative_to(p) for p in map(os.path.abspath, asked.split(os.pathsep)))


class Staging:
    """One file on its way to this machine."""

    def __init__(self, origin: Origin, key: str, note: Note) -> None:
        """Ask the storage what there is.

        Raises InputError where the origin is not there, Stopped where the storage does not answer and no good copy of
        before is here.
        """
        self.origin, self.key, self.note = origin, key, note
        self.manifest: beton.Manifest | None = None
        self.sha256: str | None = None
        try:
            self._ask()
        except Away as error:
            if self._remembers():
                note(f"{key}: {error}; the copy in {self.folder}, of when it last did, is used")
            else:
                patiently(self._ask)

    def _ask(self) -> None:
        origin, key = self.origin, self.key
        if not origin.is_there():
            raise InputError(f"{key}: {origin.shown} is not there")
        self.manifest = origin.manifest(key)
        if self.manifest and self.manifest.bytes != origin.bytes:
            raise InputError(
                f"{key}: {origin.shown} has {origin.bytes} bytes, its manifest says {self.manifest.bytes}: truncated "
                "or changed; write it again with `arae encode`"
            )
        self.sha256 = self.manifest.sha256 if self.manifest else None
        # Another content has another folder, so a copy is never of an older file of the same name.
        self._lies_in(scratch() / "data" / f"{origin.path.stem}-{(self.sha256 or origin.mark)[:16]}")

    def _lies_in(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / self.origin.path.name
        self.part = self.path.with_name(self.path.name + ".part")

    def _remembers(self) -> bool:
        """Whether the copy that was used last of this origin is still here and good."""
        for folder in sorted((scratch() / "data").glob("*/"), key=_last_used, reverse=True):
            with suppress(OSError, ValueError):
                known = json.loads((folder / ORIGIN).read_text())
                if known["shown"] == self.origin.shown:
                    self.origin.bytes, self.sha256 = known["bytes"], known["sha256"]
                    self._lies_in(folder)
                    return self._is_good()
        return False

    def made(self) -> tuple[Path, int]:
        """The copy, made where it is not here or is damaged, and the lock that keeps others from removing it."""
        using = _in_use(self.folder)
        try:
            with turn(self.folder / ".lock", self._waiting):
                if not self._is_good():
                    with self._room_told():
                        self._make()
                known = {"shown": self.origin.shown, "bytes": self.origin.bytes, "sha256": self.sha256}
                with suppress(OSError):  # only for a time when the storage is away
                    write_text(self.folder / ORIGIN, json.dumps(known))
            os.utime(self.folder / ".used")
        except BaseException:
            os.close(using)
            raise
        return self.path, using

    def _waiting(self) -> None:
        done = self.part.stat().st_size if self.part.exists() else 0
        self.note(f"{self.key}: another process copies {self.origin.shown} to this machine{self._share(done)}")

    def _is_good(self) -> bool:
        if not self.path.is_file():
            return False
        if self.path.stat().st_size != self.origin.bytes:
            self.note(f"{self.key}: {self.path} is damaged (its size); it is copied anew")
            return False
        checked = self.folder / ".checked"  # the file's time when it was last hashed: large ones are not hashed again
        large = self.origin.bytes > beton.SHA256_BYTES
        if self.sha256 is None or (large and checked.exists() and checked.read_text() == _time_of(self.path)):
            return True
        if beton.sha256_of(self.path) != self.sha256:
            self.note(f"{self.key}: {self.path} is damaged (another SHA-256); it is copied anew")
            return False
        return True

    def _make(self) -> None:
        self.path.unlink(missing_ok=True)
        (self.folder / ".checked").unlink(missing_ok=True)
        self._make_room()
        if self.manifest is None:
            self.note(f"{self.key}: {self.origin.shown} has no manifest beside it; only the copy's size is checked")
        begun = self.part.exists()
        found = patiently(self._fetched)
        if begun and found != (self.sha256 or found):  # what was there of it may have been damaged
            self.part.unlink()
            found = patiently(self._fetched)
        if found != (self.sha256 or found):
            self.part.unlink()
            raise InputError(
                f"{self.key}: {self.origin.shown} is not the file that its manifest describes (another SHA-256); "
                "write it again with `arae encode`"
            )
        if self.manifest is not None:
            beton.manifest_path(self.path).write_bytes(self.origin.manifest_bytes())
        self.part.replace(self.path)
        (self.folder / ".checked").write_text(_time_of(self.path))

    def _fetched(self) -> str:
        """Bring what is missing of the part; returns the SHA-256 of the whole."""
        said, sha256 = time.monotonic(), hashlib.sha256()
        with self.part.open("ab+") as file:
            if file.tell() > self.origin.bytes:
                file.truncate(0)
            file.seek(0)
            while piece := file.read(1 << 20):
                sha256.update(piece)
            done = file.tell()
            for piece in self.origin.pieces(done):
                file.write(piece)
                sha256.update(piece)
                done += len(piece)
                if time.monotonic() - said > SAID_S:
                    said = time.monotonic()
                    self.note(f"{self.key}: copying {self.origin.shown} to this machine{self._share(done)}")
            file.flush()
            os.fsync(file.fileno())
        if done != self.origin.bytes:
            raise InputError(f"{self.key}: {self.origin.shown} changed while it was copied; run the command again")
        return sha256.hexdigest()

    @contextmanager
    def _room_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{self.key}: the disk of {self.folder} is full, and {self.origin.shown} is to be copied there; set "
                "ARAE_SCRATCH to a folder on a larger one"
            ) from None

    def _share(self, done: int) -> str:
        return f": {done / max(1, self.origin.bytes):.0%} of {self.origin.bytes / 1e9:.1f} GB"

    def _make_room(self) -> None:
        """Remove the copies that are longest unused until this one fits; InputError where it can't."""
        data = scratch() / "data"
        need = self.origin.bytes
        with held(data / ".room.lock"):
            others = [f for f in data.iterdir() if f.is_dir() and f != self.folder]
            sizes = {folder: size_of(folder) for folder in others}
            part = self.part.stat().st_size if self.part.exists() else 0
            limit = scratch_limit(shutil.disk_usage(data).free + sum(sizes.values()) + part)
            free = shutil.disk_usage(data).free + part
            for folder in sorted(others, key=_last_used):
                if sum(sizes.values()) + need <= limit and need <= free:
                    return
                if removed(folder):
                    free += sizes.pop(folder)
            if sum(sizes.values()) + need > limit or need > free:
                raise InputError(
                    f"{self.key}: {self.origin.shown} has {need / 1e9:.2f} GB, and {data} has room for "
                    f"{max(0, min(limit - sum(sizes.values()), free)) / 1e9:.2f} GB: set ARAE_SCRATCH to a folder on a "
                    "larger disk, or ARAE_SCRATCH_GB to a higher limit"
                )


def scratch_limit(free: int) -> float:
    """Bytes that copies may fill; `free`: what the disk would have without any."""
    text = os.environ.get("ARAE_SCRATCH_GB")
    if text is None:
        return free / 2
    try:
        return float(text) * 1e9
    except ValueError:
        raise InputError(f"ARAE_SCRATCH_GB={text}: write a number of gigabytes") from None


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def removed(folder: Path) -> bool:
    """Remove a copy, unless a process uses it; whether it went."""
    try:
        with (folder / ".used").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except OSError:
        return False
    return True


def _last_used(folder: Path) -> float:
    try:
        return (folder / ".used").stat().st_mtime
    except OSError:
        return 0.0


def _time_of(path: Path) -> str:
    return str(path.stat().st_mtime_ns)


def _in_use(folder: Path) -> int:
    """A descriptor that keeps the copy from being removed, until it is closed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # removed just now
            using = os.open(folder / ".used", os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(using, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(using), (folder / ".used").stat()):
                    return using
            os.close(using)
