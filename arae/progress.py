"""Progress for people: bars on a terminal, plain lines elsewhere, and the same lines in `<run>/log.txt`."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from arae.runs import RunFolder
from arae.tracking.journal import parsed

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Event = Mapping[str, Any]

WINDOW = 20  # points that the time left is estimated from
POLL = 0.2  # seconds between looks at a growing file


class Pace:
    """The time that is left, from the newest points of a count that grows."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def left(self, done: float, total: float, now: float) -> float | None:
        """Seconds until `done` reaches `total`; None before there are two points to tell from."""
        if self._points and (done < self._points[-1][0] or now < self._points[-1][1]):
            self._points.clear()  # resumed from an earlier step
        self._points.append((done, now))
        (first, start), (last, end) = self._points[0], self._points[-1]
        return (total - last) * (end - start) / (last - first) if last > first else None


class Progress:
    """A listener for the loop's events. Safe to call from several threads; unknown events are passed over.

    On a terminal each stage and task is a bar; elsewhere, and in the run's `log.txt`, a line at most every `every`
    seconds and at the end: `encoder 120/625  loss 1.23  840 images/s  2:10 left`.
    """

    def __init__(self, folder: RunFolder | None = None, *, stream: TextIO | None = None, every: float = 10.0) -> None:
        self._path = folder.text if folder else None
        self._stream = stream or sys.stderr
        self._every = every
        self._lock = threading.RLock()
        self._said: dict[str, float] = {}
        self._waiting: dict[str, str] = {}
        self._started: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._bars = self._make_bars() if self._stream.isatty() else None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Show one event of the loop."""
        handlers: dict[str, Callable[[Event], None]] = {
            "interval": self._on_interval,
            "epoch": self._on_epoch,
            "note": self._on_note,
            "stage": self._on_stage,
        }
        handler = handlers.get(str(event.get("event")))
        with self._lock, suppress(AttributeError, KeyError, TypeError, ValueError):
            if handler:
                handler(event)

    def task(self, label: str, done: int, total: int) -> None:
        """Show how far some other long work has come: encoding, checking, evaluation."""
        with self._lock:
            self._advance(label, done, total, time.time(), "")
            if done >= total:
                self._flush(label)

    def note(self, text: str) -> None:
        """Show a line of text at once."""
        with self._lock:
            self._say(text)

    def close(self) -> None:
        """Show what still waits, and take the bars down."""
        with self._lock:
            for label in list(self._waiting):
                self._flush(label)
            if self._bars:
                self._bars.stop()
                self._bars = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _on_interval(self, event: Event) -> None:
        stage, metrics = event["stage"], event["metrics"]
        self._started.setdefault(stage, event["time"])
        parts = [f"loss {metrics['loss']:.4g}"] if "loss" in metrics else described(metrics)[:2]
        if "images_per_s" in event:
            parts.append(f"{event['images_per_s']:.0f} images/s")
        self._advance(stage, int(event["step"]), int(event["steps"]), float(event["time"]), "  ".join(parts))

    def _on_epoch(self, event: Event) -> None:
        self._say("  ".join([f"{event['stage']} epoch {event['epoch']}", *described(event["metrics"])]))

    def _on_note(self, event: Event) -> None:
        self._say(str(event["text"]))

    def _on_stage(self, event: Event) -> None:
        stage, state = event["stage"], event["state"]
        if state == "started":
            self._started[stage] = event["time"]
            self._paces.pop(stage, None)
        self._flush(stage)
        took = (
            f" in {clock(event['time'] - self._started[stage])}"
            if state == "finished" and stage in self._started
            else ""
        )
        self._say(f"{stage} {state}{took}")

    def _advance(self, label: str, done: int, total: int, now: float, text: str) -> None:
        left = self._paces.setdefault(label, Pace()).left(done, total, now)
        remains = f"{clock(left)} left" if left is not None and done < total else ""
        line = "  ".join(part for part in (f"{label} {done}/{total}", text, remains) if part)
        if self._bars:
            self._move_bar(label, done, total, "  ".join(part for part in (text, remains) if part))
        self._waiting[label] = line
        if label not in self._said or abs(now - self._said[label]) >= self._every:
            self._said[label] = now
            self._flush(label)

    def _flush(self, label: str) -> None:
        if line := self._waiting.pop(label, None):
            self._write_line(line)
            if not self._bars:
                self._show(line)

    def _say(self, line: str) -> None:
        self._write_line(line)
        self._show(line)

    def _show(self, line: str) -> None:
        # A terminal that has gone away must not end a run.
        with suppress(OSError):
            if self._bars:
                self._bars.console.print(line, markup=False, highlight=False)
            else:
                print(line, file=self._stream, flush=True)

    def _write_line(self, line: str) -> None:
        if self._path is None:
            return
        # A full disk is reported where the state is saved, with the means to mend it; not by this copy for people.
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def _make_bars(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        bars = RichProgress(*columns, console=Console(file=self._stream))
        bars.start()
        return bars

    def _move_bar(self, label: str, done: int, total: int, text: str) -> None:
        assert self._bars is not None
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total, text="")
        with suppress(OSError):
            self._bars.update(self._tasks[label], completed=done, total=total, text=text)


def described(metrics: Mapping[str, Any]) -> list[str]:
    """`["loss 1.23", "robust_accuracy 0.626"]`."""
    return [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float)]


def clock(seconds: float) -> str:
    """`2:10`, or `1:02:10` from an hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
        position = _read_events(path, listener, position)
        if last:
            return position
        stop.wait(POLL)


def _read_events(path: Path, listener: Callable[[dict[str, Any]], None], position: int) -> int:
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
