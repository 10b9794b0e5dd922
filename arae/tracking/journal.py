"""What MLflow has yet to hear of a run (`mlflow.pending.jsonl`), and what it has heard (`mlflow.json`).

Both are plain files, so that a kill at any moment loses nothing: an operation is in the journal until it is counted
on the card. Operations are JSON objects, told apart by `op`: `run`, `param`, `tag`, `metrics`, `artifact`, `end`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from arae.files import write_text

Operation = dict[str, Any]

LOWER = ("loss", "lpips", "fid", "error")
HIGHER = ("accuracy", "psnr", "ssim", "auroc")
RESTARTS = "restarts"  # metric: how many; tag: why


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for, then hold, an exclusive lock on a lock file; safe between threads and between processes.

    Its folder must be there: a run folder that went away must not come back empty, or workers would go on in it.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing isn't enough where a forked child still has the file open


@dataclass(frozen=True)
class Head:
    """The oldest operations of a journal, and the bytes they fill."""

    operations: list[Operation]
    size: int


class Journal:
    """A queue of operations in a file: added at the end, dropped from the head once sent; no file where it is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *operations: Operation) -> None:
        """Add operations; they survive a kill of the process from here on. Raises OSError (a full disk)."""
        lines = "".join(json.dumps(operation) + "\n" for operation in operations).encode()
        with self._open() as file:
            torn = file.seek(0, os.SEEK_END) and not self._ends_whole(file)
            file.write(b"\n" + lines if torn else lines)

    def head(self, limit: int = 200) -> Head:
        """The oldest `limit` lines; a line that a kill tore is skipped."""
        if not self.path.exists():
            return Head([], 0)
        operations: list[Operation] = []
        size = 0
        with self._open() as file:
            file.seek(0)
            for line in file:
                size += len(line)
                operations.extend(parsed(line))
                if len(operations) >= limit:
                    break
        return Head(operations, size)

    def drop(self, size: int) -> None:
        """Drop the first `size` bytes, those of a head that has been delivered."""
        with self._open() as file:
            if file.seek(0, os.SEEK_END) <= size:
                self.path.unlink()
                return
            file.seek(size)
            temporary = self.path.with_name(self.path.name + ".tmp")
            with temporary.open("wb") as rest:
                shutil.copyfileobj(file, rest)
            temporary.replace(self.path)

    def all(self) -> list[Operation]:
        """Every operation that waits."""
        return self.head(limit=2**62).operations

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, locked; opened again where another process has dropped its head (a new file) while we waited."""
        while True:
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    if self._is_current(file):
                        yield file
                        return
                finally:
                    file.flush()
                    fcntl.flock(file, fcntl.LOCK_UN)

    def _is_current(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    @staticmethod
    def _ends_whole(file: BinaryIO) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def parsed(line: bytes) -> list[dict[str, Any]]:
    """The JSON object of a line, or nothing where the line is torn."""
    try:
        document = json.loads(line)
    except ValueError:
        return []
    return [document] if isinstance(document, dict) else []


@dataclass
class Card:
    """What is known of the run's mirror: which MLflow run it is, and how far it has come."""

    run_id: str | None = None
    key: str | None = None
    """Our mark on the MLflow run, written down before the run is made: a creation cut short is found again by it."""
    name: str = ""
    experiment: str = ""
    parent: str | None = None
    """Run folder of the parent, relative to the folder of the runs."""
    started: int = 0
    """Unix milliseconds."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of each stage: other numbers come only with another digest."""
    reached: dict[str, int] = field(default_factory=dict)
    """Last step of each metric, by its name in MLflow."""
    last: dict[str, float] = field(default_factory=dict)
    """Newest value of each metric of the epochs (`encoder/epoch/…`)."""
    best: dict[str, float] = field(default_factory=dict)
    """Best value of each metric of the epochs."""
    restarts: list[str] = field(default_factory=list)
    """The newest restarts, a line each, as MLflow's tag `restarts` shows them."""

    @classmethod
    def load(cls, path: Path) -> Card:
        """The card of a run folder; a blank one where there is none, or none that can be read."""
        try:
            document = json.loads(path.read_text())
            return cls(**{f.name: document[f.name] for f in fields(cls) if f.name in document})
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, path: Path) -> None:
        """Replace the file, all or nothing."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    def absorb(self, operation: Operation) -> None:
        """Count an operation as done."""
        if operation["op"] == "run":
            self._absorb_run(operation)
        elif operation["op"] == "metrics" and operation.get("series"):
            self._absorb_metrics(operation["series"], operation["step"], operation["values"])
        elif operation["op"] == "tag" and operation["key"] == RESTARTS:
            self.restarts = operation["value"].splitlines()

    def _absorb_run(self, operation: Operation) -> None:
        if (
            self.name != operation["name"] and self.name
        ):  # the folder was copied: its MLflow run belongs to the original
            vars(self).update(vars(Card()))
        self.name, self.experiment = operation["name"], operation["experiment"]
        self.parent = operation["parent"]
        self.started = self.started or operation["time"]
        for stage, digest in operation["digests"].items():
            if self.digests.get(stage, digest) != digest:
                self._forget(f"{stage}/")
            self.digests[stage] = digest

    def _forget(self, prefix: str) -> None:
        self.reached = {name: step for name, step in self.reached.items() if not name.startswith(prefix)}
        self.last = {name: value for name, value in self.last.items() if not name.startswith(prefix)}
        self.best = {name: value for name, value in self.best.items() if not name.startswith(prefix)}

    def _absorb_metrics(self, series: str, step: int, values: Mapping[str, float]) -> None:
        self.reached |= dict.fromkeys(values, step)
        if series.endswith("/epoch"):
            self.best |= self.improvements(values)
            self.last |= values

    def news(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The metrics whose step MLflow has not had: after a resume the loop repeats some steps, to the same values."""
        return {name: value for name, value in values.items() if step > self.reached.get(name, -1)}

    def improvements(self, values: Mapping[str, float]) -> dict[str, float]:
        """Those of the metrics that are better than ever before; only metrics whose direction is known."""
        return {name: value for name, value in values.items() if is_better(name, value, self.best.get(name))}


def is_better(name: str, value: float, than: float | None) -> bool:
    """Whether a metric beats another: losses, LPIPS, FID by being lower; accuracies, PSNR, SSIM, AUROC, higher."""
    if value != value:  # NaN
        return False
    name = name.rpartition("/")[2]
    if any(part in name for part in LOWER):
        return than is None or value < than
    return any(part in name for part in HIGHER) and (than is None or value > than)
