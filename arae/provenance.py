"""Where a number came from: code, libraries, time."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import arae

LIBRARIES = ("torch", "torchvision", "numpy", "ffcv", "ray", "mlflow", "lpips")


@cache
def git_revision() -> str:
    """Revision of the checkout arae runs from, `+dirty` where it has changes; the version where it is no checkout.

    A job's copy of a checkout is none itself: `ARAE_REVISION` says what it was made of.
    """
    root = Path(arae.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("ARAE_REVISION") or f"v{arae.__version__}"
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return f"v{arae.__version__}"


def _git(root: Path, *args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version(), "arae": arae.__version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
