"""Files that are whole or not there: a temporary name, fsync, rename; a full disk leaves the old file as it was."""

from __future__ import annotations

import os
from pathlib import Path


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replace a file, all or nothing. OSError where it can't be written, with nothing left behind."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode())
