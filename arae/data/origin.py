"""Where a staged file comes from: a URL, or a path on storage that the machines share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from arae.data import beton
from arae.errors import InputError
from arae.storage import Remote, is_url
from arae.storage.remote import extended

PIECE = 8 << 20


class Origin:
    """A file elsewhere."""

    def __init__(self, named: str) -> None:
        self.remote = Remote(named) if is_url(named) else None
        self.path = Path(self.remote.shown.partition("://")[2] if self.remote else named)
        self.shown = self.remote.shown if self.remote else named
        self.bytes = 0
        self.mark = ""
        """Tells this content from others of the same name, as far as the storage knows."""
        self._manifest: bytes | None = None

    def is_there(self) -> bool:
        """Whether there is such a file; its size is known from then on."""
        if self.remote is None:
            if not self.path.is_file():
                return False
            found = self.path.stat()
            self.bytes, known = found.st_size, str(found.st_mtime_ns)
        else:
            entry = self.remote.entry()
            if entry is None:
                return False
            self.bytes, known = entry.bytes, self.remote.etag() or str(entry.changed)
        self.mark = hashlib.sha256(f"{self.shown} {self.bytes} {known}".encode()).hexdigest()
        return True

    def manifest(self, key: str) -> beton.Manifest | None:
        """What lies beside it as `FILE.beton.json`; None where there is none. InputError where that is no manifest."""
        content = self._beside()
        if content is None:
            return None
        try:
            read = beton.Manifest.model_validate(json.loads(content))
        except (ValueError, ValidationError) as error:
            said = " ".join(str(error).split())[:160]
            raise InputError(
                f"{key}: {self.shown}.json: not a manifest ({said}); write it again with `arae encode`"
            ) from None
        self._manifest = content
        return read

    def manifest_bytes(self) -> bytes:
        """The manifest as it lies there."""
        assert self._manifest is not None
        return self._manifest

    def pieces(self, start: int) -> Iterator[bytes]:
        """The content from a byte on."""
        if self.remote is not None:
            yield from self.remote.pieces(start)
            return
        with self.path.open("rb") as file:
            file.seek(start)
            while piece := file.read(PIECE):
                yield piece

    def _beside(self) -> bytes | None:
        if self.path.suffix != ".beton":
            return None
        if self.remote is None:
            beside = beton.manifest_path(self.path)
            return beside.read_bytes() if beside.is_file() else None
        return Remote(extended(self.remote.url, ".json")).read()
