"""A run's `log.jsonl` from outside the training: reading it as it is, or as it grows; the word at its end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from arae.tracking.journal import parsed

POLL = 0.2  # seconds between looks at a growing file


def read_events(path: Path, newest: int | None = None) -> Iterator[dict[str, Any]]:
    """The events of a log, oldest first; of its last `newest` bytes only, where given.

    Torn lines are passed over; a log that is not there has no events.
    """
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        if newest is not None and (size := path.stat().st_size) > newest:
            file.seek(size - newest)
            file.readline()
        for line in file:
            yield from parsed(line)


def tail(
    path: Path, listener: Callable[[dict[str, Any]], None], stop: threading.Event, *, offset: int | None = None
) -> int:
    """Call `listener` with each event that is added to a `log.jsonl`, until `stop` is set; returns the offset reached.

    Begins at byte `offset`, by default at the present end; where others may write already, take the offset beforehand.
    A line is read once it is whole; one that isn't JSON (torn by a kill) is passed over; a file cut short, or replaced
    by a shorter one, is read from its beginning. What is there when `stop` is set is still read.
    """
    position = _size(path) if offset is None else offset
    while True:
        last = stop.is_set()
        position = _read_added(path, listener, position)
        if last:
            return position
        stop.wait(POLL)


def _read_added(path: Path, listener: Callable[[dict[str, Any]], None], position: int) -> int:
    if _size(path) < position:
        position = 0
    try:
        file = path.open("rb")
    except OSError:
        return position
    with file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                break
            position += len(line)
            for event in parsed(line):
                listener(event)
    return position


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def ending(log: Path) -> Iterator[None]:
    """Add an `end` event where the work inside ends by an error: its exit code, and what it said.

    A run that was killed has none, so that it can be told from one that was stopped, or failed.
    """
    try:
        yield
    except BaseException as error:
        said = " ".join(str(error).split()) or type(error).__name__
        event = {"event": "end", "time": time.time(), "code": getattr(error, "exit_code", 1), "reason": said}
        with suppress(OSError), log.open("a") as file:
            file.write(json.dumps(event) + "\n")
        raise
