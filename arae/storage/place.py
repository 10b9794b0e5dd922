"""Where runs lie: a folder, or a URL with a working copy on this machine's disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import urlsplit

from arae.storage.remote import Remote, as_url, is_url, redacted


def scratch() -> Path:
    """This machine's disk space for copies: `ARAE_SCRATCH`, default `~/.cache/arae`."""
    return Path(os.environ.get("ARAE_SCRATCH") or Path.home() / ".cache" / "arae").absolute()


def runs_place() -> str:
    """Where runs lie, for another process: the URL, or the absolute path, that `ARAE_RUNS` names (default `runs`)."""
    named = os.environ.get("ARAE_RUNS") or "runs"
    if is_url(named):
        return as_url(named).rstrip("/")
    return str(Path(urlsplit(named).path if named.startswith("file:") else named).absolute())


def runs_root() -> Path:
    """The folder that run folders lie in; where `ARAE_RUNS` is a URL, that of their working copies."""
    place = runs_place()
    return working_root(place) if is_url(place) else Path(place)


def working_root(url: str) -> Path:
    """Where working copies of what lies at a URL are, the same whatever credentials it holds."""
    shown = redacted(url).rstrip("/")
    return scratch() / "runs" / f"{Path(shown).name}-{hashlib.sha256(shown.encode()).hexdigest()[:12]}"


def remote_of(folder: Path) -> Remote | None:
    """What a run folder is the working copy of; None where it is itself what counts."""
    place, root = runs_place(), runs_root()
    if not is_url(place) or not folder.absolute().is_relative_to(root) or folder.absolute() == root:
        return None
    return Remote(place) / folder.absolute().relative_to(root).as_posix()
