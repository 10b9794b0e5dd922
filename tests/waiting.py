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
    while True:
        ended = process is not None and process.poll() is not None  # before the question: its last words may answer it
        if answer := true():
            return answer
        if ended:
            assert process is not None
            pipes = () if said else process.communicate(timeout=30)
            words = said.read_text() if said else "\n".join(str(each) for each in pipes if each)
            raise AssertionError(f"it ended with {process.returncode} before {what}:\n{words}")
        assert time.monotonic() < end, f"no {what} in {PATIENCE_S:g} s:\n{said.read_text() if said else ''}"
        time.sleep(pause)
