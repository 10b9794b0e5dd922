"""MLflow as a mirror of the run folder: it can be late, away or missing, and training never waits for it.

Whoever runs the command makes a `Tracker` and gives it every event of the loop. An operation is first written to
`<run>/mlflow.pending.jsonl` and then delivered by one background thread; what is left at the end is sent by the next
tracker on the folder, by `arae ui`, or by `send_pending`.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from arae.config import Recipe
from arae.errors import Stopped
from arae.monitor.pace import restart_words
from arae.records import Record
from arae.runs import RunFolder
from arae.tracking.journal import RESTARTS, Card, Journal, Operation
from arae.tracking.mirror import CARD, PENDING, Note, Sender, first_line, log_note
from arae.tracking.operations import (
    Family,
    metric_name,
    metrics,
    milliseconds,
    numbers,
    opening,
    record_names,
    renamed,
    speeds,
    text,
)

Status = Literal["FINISHED", "FAILED", "KILLED"]

LONGEST_PAUSE = 30.0  # seconds between attempts while the server is away
CLOSING_S = 15.0  # that the end of a command waits for MLflow
STOPPING_S = 5.0  # likewise where it was stopped: whoever did may kill it next
MOST_RESTARTS, LONGEST_REASON = 20, 240  # whose reasons are kept in a tag, and their characters

_said_missing = threading.Event()


class Tracker:
    """A listener for the loop's events that mirrors one run folder to one MLflow run, over any number of restarts.

    `parent` is the run folder of the parent, relative to `runs_root` (`"demo"`); its MLflow run is made if missing.
    `family`: what MLflow shows the run among, where its name and recipe do not say it.
    Without MLflow, or with `enabled=False`, every call does nothing.
    `note` is told, in words and perhaps from another thread, when the server goes away and when it is back.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        runs_root: Path,
        *,
        parent: str | None = None,
        family: Family | None = None,
        enabled: bool = True,
        note: Note = log_note,
    ) -> None:
        self.folder, self._note = folder, note
        self.enabled = enabled and _mlflow_is_there(note)
        self._journal = Journal(folder.path / PENDING)
        self._sender = Sender(folder.path, runs_root, note)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._dataset, self._family = recipe.data.name, family
        self._card = Card.load(folder.path / CARD)
        if not self.enabled:
            return
        for operation in self._journal.all():
            self._card.absorb(operation)
        self._add(*opening(recipe, parent, family))
        if folder.recipe.is_file():
            self.log_artifact(folder.recipe)
        if family is None or family.delivered:
            self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
            self._thread.start()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Mirror one event of the loop; an event that isn't understood is passed over."""
        handler = self._handlers().get(str(event.get("event")))
        if handler and self.enabled:
            with suppress(AttributeError, KeyError, TypeError, ValueError):
                handler(event)

    def log_records(self, records: Iterable[Record]) -> None:
        """Add every record that has a value as a metric `final/…`, the training radius, and `records.jsonl` itself."""
        records = list(records)
        for name, record in record_names(records, self._dataset).items():
            if record.value is not None:
                self._add(metrics({name: record.value}, 0, milliseconds(record.time)))
        radii = {record.model.train_eps for record in records}
        if len(radii) == 1:
            (eps,) = radii
            self._add(
                metrics({"train_eps": eps}, 0, min(milliseconds(record.time) for record in records)),
                *([{"op": "param", "key": "train_eps", "value": f"{eps:g}"}] if self._family is None else []),
            )
        if self.folder.records.is_file():
            self.log_artifact(self.folder.records)

    def log_artifact(self, path: Path, to: str | None = None) -> None:
        """Add a file (a report page, a picture) under the artifact folder `to`; it is read when it is sent, not now."""
        inside = path.is_relative_to(self.folder.path)
        place = path.relative_to(self.folder.path) if inside else path.absolute()
        self._add({"op": "artifact", "path": str(place), "to": to})

    def close(self, status: Status = "FINISHED", timeout: float = CLOSING_S) -> bool:
        """End the MLflow run; waits at most `timeout` seconds. Returns whether MLflow has heard all of it."""
        if self.enabled and not self._closing.is_set():
            self._add({"op": "end", "status": status, "time": milliseconds(time.time())})
        self._closing.set()
        if self._thread is None:
            return not self.enabled
        self._wake.set()
        self._thread.join(timeout)
        done = not self._journal.path.exists()
        if not done:
            self._note(
                f"{self._journal.path}: MLflow has not had all of this run yet; the next command or `arae ui` sends it"
            )
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        status: Status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        self.close(status, timeout=STOPPING_S if stopped else CLOSING_S)

    def _handlers(self) -> dict[str, Callable[[Mapping[str, Any]], None]]:
        return {
            "interval": self._on_interval,
            "epoch": self._on_epoch,
            "picture": self._on_picture,
            "stage": self._on_stage,
            "restart": self._on_restart,
            "group": self._on_group,
        }

    def _on_interval(self, event: Mapping[str, Any]) -> None:
        self._add_series(event["stage"], event, event["metrics"] | speeds(event))

    def _on_epoch(self, event: Mapping[str, Any]) -> None:
        series = f"{event['stage']}/epoch"
        best = dict(self._card.best)
        self._add_series(series, event, event["metrics"])
        better = {name: value for name, value in self._card.best.items() if value != best.get(name)}
        self._add(
            metrics(renamed(better, series, f"best/{event['stage']}"), event["step"], milliseconds(event["time"]))
        )

    def _on_picture(self, event: Mapping[str, Any]) -> None:
        self.log_artifact(self.folder.path / event["path"], to=str(Path(event["path"]).parent))

    def _on_stage(self, event: Mapping[str, Any]) -> None:
        stage, state = event["stage"], event["state"]
        if state in ("started", "finished"):
            self._add({"op": "tag", "key": "stage", "value": f"{stage} {state}"})
        if state == "finished":
            values = renamed(self._card.last, f"{stage}/epoch", f"final/{stage}")
            step = max(
                (self._card.reached[name] for name in self._card.last if name.startswith(f"{stage}/")), default=0
            )
            self._add(metrics(values, step, milliseconds(event["time"])))

    def _on_restart(self, event: Mapping[str, Any]) -> None:
        count = self._card.reached.get(RESTARTS, 0) + 1  # over all launches, while the event's own is of one
        when = datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        lines = [f"{count}. {when} UTC: {restart_words(event)}"[:LONGEST_REASON], *self._card.restarts]
        self._add(
            metrics({RESTARTS: count}, count, milliseconds(event["time"])) | {"series": RESTARTS},
            {"op": "tag", "key": RESTARTS, "value": "\n".join(lines[:MOST_RESTARTS])},
        )

    def _on_group(self, event: Mapping[str, Any]) -> None:
        told = {"workers": str(int(event["world_size"])), "hosts": ", ".join(dict.fromkeys(event.get("hosts") or ()))}
        told |= {key: str(event[key]) for key in ("device", "precision", "engine") if event.get(key)}
        self._add(*({"op": "tag", "key": key, "value": text(value)} for key, value in told.items() if value))

    def _add_series(self, series: str, event: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        named = {metric_name(f"{series}/{name}"): value for name, value in numbers(values).items()}
        news = self._card.news(event["step"], named)
        self._add(metrics(news, event["step"], milliseconds(event["time"])) | {"series": series})

    def _add(self, *operations: Operation) -> None:
        wanted = [o for o in operations if o["op"] != "metrics" or o["values"]]
        if not self.enabled or not wanted:
            return
        try:
            self._journal.append(*wanted)
        except OSError as error:
            self._note(
                f"{self._journal.path}: can't be written ({error.strerror}), so MLflow misses a part of this run"
            )
            return
        for operation in wanted:
            self._card.absorb(operation)
        self._wake.set()

    def _deliver(self) -> None:
        """The thread: deliver what there is; where that fails, pause for longer and longer."""
        pause = 0.0
        while True:
            if pause:
                self._closing.wait(pause)
            else:
                self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                sent = self._sender.drain()
                if pause:
                    self._note(f"MLflow answers again; {sent} operations sent")
                pause = 0.0
            except Exception as error:  # noqa: BLE001 -- whatever MLflow, a database driver or the network come up with
                if not pause:
                    self._note(f"MLflow is away ({first_line(error)}); what it misses is kept in {self._journal.path}")
                pause = min(LONGEST_PAUSE, 2 * pause or 1.0)
            if closing:
                return


def _mlflow_is_there(note: Note) -> bool:
    if importlib.util.find_spec("mlflow"):
        return True
    if not _said_missing.is_set():
        _said_missing.set()
        note("MLflow is not installed, so the run is kept in its folder alone; `pip install 'arae[track]'` adds it")
    return False
