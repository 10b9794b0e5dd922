"""Files that are whole or not there: a temporary name, fsync, rename; a full disk leaves the old file as it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Written(NamedTuple):
    """What was written."""

    sha256: str
    bytes: int


class HashingFile:
    """A file for writing that counts and hashes what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.count, self.sha256 = file, 0, hashlib.sha256()
        self.error: OSError | None = None
        """Why it could not be written: torch.save would hide it behind an error of its own."""

    def write(self, content: bytes | memoryview) -> int:
        """Append; returns the number of bytes."""
        self.sha256.update(content)
        try:
            written = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.count += written
        return written

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self.file.flush()


def write_with(path: Path, write: Callable[[HashingFile], None]) -> Written:
    """Replace a file by what `write` puts into the one it is given, all or nothing, in as little memory as it needs.

    OSError where it can't be written, with nothing left behind.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    hashing: HashingFile | None = None
    try:
        with temporary.open("wb") as file:
            hashing = HashingFile(file)
            write(hashing)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        if hashing is not None and hashing.error is not None:
            raise hashing.error from None
        raise
    return Written(hashing.sha256.hexdigest(), hashing.count)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replace a file, all or nothing. OSError where it can't be written, with nothing left behind."""
    write_with(path, lambda file: _all(file, content))


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode())


def _all(file: HashingFile, content: bytes | memoryview) -> None:
    file.write(content)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself safe against a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems have no such thing; the file's own content is safe
        pass
    finally:
        os.close(handle)
