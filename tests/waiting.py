"""Waiting for what other processes do, as long as it takes: how long that is says something of the machine alone."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 600.0
"""When a test gives up. What takes seconds takes minutes where two cores do several tests' work."""


def until(
    true: Callable[[], Any],
    what: str,
    process: subprocess.Popen[Any] | None = None,
    said: Path | None = None,
    pause: float = 0.05,
) -> Any:
    """The first true answer, asked for every `pause` seconds.

    It fails when the time is up, or when the process ends meanwhile, with what that said: in the file `said`, or in its
    pipes.
    """
    end = time.monotonic() + PATIENCE_S
    while not (answer := true()):
        if process is not None and process.poll() is not None:
            words = said.read_text() if said else process.communicate()
            raise AssertionError(f"it ended with {process.returncode} before {what}: {words}")
        assert time.monotonic() < end, f"no {what} in {PATIENCE_S:g} s: {said.read_text() if said else ''}"
        time.sleep(pause)
    return answer
