"""A disk that is soon full, for the tests of what then happens."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o size="$0" tmpfs "$1" || exit 99; "${@:3}"; code=$?; cp -r "$1/." "$2"; exit $code'


def on_a_small_disk(
    size: str,
    folder: Path,
    command: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 200,
) -> subprocess.CompletedProcess[str]:
    """Run a command with `folder` on a file system of its own that holds so much; skips where that isn't allowed.

    It is there for the command alone; what was on it at the end lies in the folder afterwards.
    """
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces (unshare -Urm) for a small disk")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder.with_name(f"{folder.name}-kept")
    kept.mkdir()
    whole = ["unshare", "-Urm", "bash", "-c", MOUNT, size, folder, kept, *map(str, command)]
    env = {**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(whole, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    folder.rmdir()
    kept.rename(folder)
    return done
