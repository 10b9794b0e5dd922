"""Progress for people: bars on a terminal, plain lines elsewhere, and the same lines in `<run>/log.txt`."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from arae.monitor.pace import Group, Pace, clock, group_words, restart_words
from arae.runs import RunFolder

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Event = Mapping[str, Any]


class Progress:
    """A listener for the loop's events. Safe to call from several threads; unknown events are passed over.

    On a terminal each stage and task is a bar; elsewhere, and in the run's `log.txt`, a line at most every `every`
    seconds and at the end: `encoder 120/625  loss 1.23  840 images/s  2:10 left`. There is one view of a whole group of
    workers: their rates, those that are slow, restarts and why. States are saved without a word.
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
            "restart": self._on_restart,
            "group": self._on_group,
        }
        handler = handlers.get(str(event.get("event")))
        with self._lock, suppress(AttributeError, KeyError, TypeError, ValueError):
            if handler:
                handler(event)

    def task(self, label: str, done: int, total: int, text: str = "") -> None:
        """Show how far some other long work has come, as encoding or evaluation; `text` stands beside it."""
        with self._lock:
            self._advance(label, done, total, time.time(), text)
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
        text = "  ".join([*parts, *Group.of(event).words()])
        done, total, now, left = int(event["step"]), int(event["steps"]), float(event["time"]), event.get("eta_s")
        self._advance(stage, done, total, now, text, None if left is None else float(left))

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

    def _on_restart(self, event: Event) -> None:
        self._say(f"restart {event['count']}: {restart_words(event)}")

    def _on_group(self, event: Event) -> None:
        if event["world_size"] > 1:
            self._say(group_words(event))

    def _advance(self, label: str, done: int, total: int, now: float, text: str, left: float | None = None) -> None:
        """`left`: seconds, where it is known better than from the pace of the calls."""
        paced = self._paces.setdefault(label, Pace()).left(done, total, now)
        left = paced if left is None else left
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
        # Nor does it make the run folder anew where that went away: workers would go on in it.
        with suppress(OSError), self._path.open("a") as file:
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
