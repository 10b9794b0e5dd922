"""Locks between the processes of one machine, by a file that stays empty."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SAID_S = 10.0  # between two words on what is taking so long
LOOK_S = 0.2


@contextmanager
def held(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Wait for, then hold, a lock on a lock file; safe between threads and between processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing isn't enough where a forked child still has the file open


@contextmanager
def turn(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock on a lock file; while another process does, `waiting` is called now and then, to say so."""
    with path.open("ab") as file:
        said = time.monotonic() - SAID_S + 1
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said > SAID_S:
                    said = time.monotonic()
                    waiting()
                time.sleep(LOOK_S)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
