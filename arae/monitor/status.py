"""How a run stands, from its folder alone: no cluster, no Ray, no MLflow."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from arae.config import Recipe, load_recipe
from arae.errors import AraeError, InputError
from arae.models.autoencoder import read_config
from arae.monitor.events import read_events
from arae.monitor.pace import Worker
from arae.monitor.swept import Book, sweep_of
from arae.monitor.told import Told
from arae.runs import SHARED, RunFolder, runs_root
from arae.storage import fetch_runs, fetched, glance
from arae.storage.lease import NAME as LEASE
from arae.storage.place import remote_of
from arae.tracking.journal import parsed
from arae.tracking.mirror import PENDING
from arae.train.state import Saved, best_of, list_states

Standing = Literal["new", "running", "silent", "stopped", "failed", "killed", "finished", "unreadable"]
"""`silent`: a command holds the run, and has said nothing for long. `killed`: nothing holds it, and it ended without
a word. `stopped`, `failed`: it said so."""

SILENT_S = 600.0  # seconds without a word; a group may wait that long for a worker that died
GAPS = 5  # times the last gap between two intervals: where steps are long, so is silence
LEASED_S = 120.0  # age of a lease that still counts; it is renewed every ten, and two machines' clocks differ
RECENT = 2**18  # bytes of a log that a list of runs looks at
MAIN = ("clean_accuracy", "robust_accuracy", "psnr", "ssim", "lpips")


@dataclass(frozen=True)
class State:
    """A saved state."""

    stage: str
    step: int
    bytes: int
    age_s: float | None


@dataclass
class Status:
    """How a run stands. Times are Unix seconds."""

    name: str
    """Relative to the folder of the runs, where it lies in it."""
    path: str
    standing: Standing = "new"
    why: str | None = None
    """What it said when it ended, or what can't be read."""
    heard: float | None = None
    """The time of its last word."""
    stage: str | None = None
    step: int = 0
    steps: int | None = None
    finished: list[str] = field(default_factory=list)
    """Stages whose weights are exported."""
    eta_s: float | None = None
    """Seconds left in this stage, as of its last word."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over the newest interval of steps."""
    validation: dict[str, float] = field(default_factory=dict)
    """The newest look at held-out images, and the training's means beside it."""
    validation_step: int | None = None
    images_per_s: float | None = None
    loader_wait: float | None = None
    """Share of the time."""
    workers: list[Worker] = field(default_factory=list)
    group: dict[str, Any] | None = None
    """The newest `group` event: hosts, device, precision, engine."""
    newest_state: State | None = None
    best_state: State | None = None
    restarts: list[str] = field(default_factory=list)
    restart_times: list[float] = field(default_factory=list)
    records: dict[str, float] = field(default_factory=dict)
    """Values of the run's own records, on clean images, by metric."""
    trials: dict[str, int] | None = None
    """Of a sweep: its trials by how they stand; `step` and `steps` count them too."""
    pending: int = 0
    """Operations that MLflow has not had yet."""

    @property
    def fraction(self) -> float | None:
        """Of the stage."""
        return self.step / self.steps if self.steps else None

    @property
    def main(self) -> dict[str, float]:
        """The few numbers that tell runs apart: records, else the newest look at held-out images, else the loss."""
        known = self.records or {name: self.validation[name] for name in MAIN if name in self.validation}
        return known or {name: self.metrics[name] for name in ("loss",) if name in self.metrics}


def find_run(run: str) -> RunFolder:
    """A run folder by path, or by its name under the folder of the runs; InputError where there is none."""
    root = runs_root()
    for path in (fetched(run, glance), runs_root() / run):
        if (path / "recipe.yaml").is_file():
            return RunFolder(path.absolute())
    raise InputError(f"{run}: no run folder, neither here nor under {root}; `arae runs` lists them")


def all_runs(*, every: bool = True) -> tuple[list[Status], int]:
    """Every run under the folder of the runs, by name, and how many were left out; of long logs only the end is read.

    Without `every` the trials of sweeps are left out, and the stages that they share.
    """
    fetch_runs()
    found = list(run_folders(runs_root()))
    shown = [one for one in found if every or not (is_stage(one) or sweep_of(one))]
    return [status_of(folder, newest=RECENT) for folder in shown], len(found) - len(shown)


def is_stage(folder: RunFolder) -> bool:
    """Whether a run folder is that of a stage which sweeps share."""
    return folder.path.parent == runs_root() / SHARED


def run_folders(root: Path) -> Iterator[RunFolder]:
    """The run folders under a folder, by name."""
    for path in sorted(root.rglob("recipe.yaml")) if root.is_dir() else ():
        if path.relative_to(root).parts[0] != "mlartifacts":  # MLflow's copies
            yield RunFolder(path.parent)


def status_of(folder: RunFolder, *, now: float | None = None, newest: int | None = None) -> Status:
    """How a run stands; `newest`: look only at so many bytes at the end of its log. Never raises for what it finds."""
    status = Status(_name(folder), str(folder.path))
    now = time.time() if now is None else now
    try:
        recipe, config = load_recipe(folder.path), read_config(folder.model) or {}
    except InputError as error:
        status.standing, status.why = "unreadable", str(error)
        return status
    held = is_held(folder, now)
    status.records = read_main_records(folder.records)
    status.pending = sum(1 for _ in read_events(folder.path / PENDING))
    if (above := sweep_of(folder)) is not None:
        _add_trial(status, Book(above), folder.path.name, held=held, led=is_held(above, now))
        return status
    if folder.is_sweep:
        _add_sweep(status, Book(folder), held=held)
        return status
    told = Told()
    for event in read_events(folder.log, newest):
        told.add(status, event)
    status.finished = [stage for stage in ("encoder", "decoder") if stage in config]
    _add_states(status, list_states(folder.state), folder, told, now)
    status.standing, status.why = _standing(status, told, recipe, held=held, now=now)
    return status


def _add_sweep(status: Status, book: Book, *, held: bool) -> None:
    status.trials, status.heard, status.stage = book.counts, book.heard, "trials"
    status.step, status.steps = len(book.ended), book.planned
    if held:
        status.standing = "running"
    elif book.at_work:
        status.standing = "killed"
    else:
        status.standing = "finished" if book.whole else "stopped"


def _add_trial(status: Status, book: Book, trial: str, *, held: bool, led: bool) -> None:
    state, status.why = book.ended.get(trial, (None, None))
    if held:
        status.standing = "running"
    elif state is not None:
        status.standing = state
    else:  # where the sweep is at work it waits, on a rung perhaps
        status.standing = "stopped" if led or not book.at_work else "killed"


def _standing(status: Status, told: Told, recipe: Recipe, *, held: bool, now: float) -> tuple[Standing, str | None]:
    """From the lock, the last word, and what is exported."""
    if held:
        silence = now - status.heard if status.heard is not None else 0.0
        return ("silent" if silence > max(SILENT_S, GAPS * told.gap) else "running"), None
    why = str(told.end["reason"]) if told.end and told.end.get("reason") else None
    wanted = ["encoder"] + ["decoder"] * (recipe.decoder is not None)
    if (recipe.map is not None and status.records) or (recipe.map is None and status.finished == wanted):
        return "finished", why
    if told.end is not None:
        return ("stopped" if told.end.get("code") == 75 else "failed"), why
    trips = recipe.map is not None and any(Path(status.path).glob("*/recipe.yaml"))
    begun = status.heard is not None or status.newest_state is not None or trips
    return ("killed" if begun else "new"), None


def _add_states(status: Status, states: Iterable[Saved], folder: RunFolder, told: Told, now: float) -> None:
    """The newest state of the stage at work, and the one that was best on held-out images."""
    listed = list(states)
    own = [saved for saved in listed if saved.stage == listed[-1].stage]
    if own:
        status.newest_state = _state(max(own, key=lambda saved: saved.step), folder, told, now)
    if best := best_of(own):
        status.best_state = _state(best, folder, told, now)


def _state(saved: Saved, folder: RunFolder, told: Told, now: float) -> State:
    moment = told.saved.get((saved.stage, saved.step))
    if moment is None:
        with suppress(OSError):
            moment = (folder.state / saved.file).stat().st_mtime
    return State(saved.stage, saved.step, saved.bytes, None if moment is None else now - moment)


def read_main_records(path: Path) -> dict[str, float]:
    """The main numbers of a run's records: clean images' quality, accuracy, and the worst accuracy under attack."""
    found: dict[str, float] = {}
    with suppress(OSError):
        for line in path.read_bytes().splitlines():
            for record in parsed(line):
                metric, value = record.get("metric"), record.get("value")
                if metric not in MAIN or value is None:
                    continue
                if metric == "robust_accuracy":
                    found[metric] = min(value, found.get(metric, value))
                elif record.get("threat") is None and record.get("protocol") in ("classification", "reconstruction"):
                    found.setdefault(metric, value)
    return found


def is_held(folder: RunFolder, now: float) -> bool:
    """Whether a command is at work on the folder, here or, where it lies at a URL, on another machine."""
    return _is_locked(folder.path / ".lock") or _is_leased(folder, now)


def _is_locked(path: Path) -> bool:
    """Asked with a shared lock, which is given back at once."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _is_leased(folder: RunFolder, now: float) -> bool:
    remote = remote_of(folder.path)
    if remote is None:
        return False
    with suppress(AraeError, ValueError, TypeError, KeyError):  # as told above, it never raises
        return now - float(json.loads(remote.read(LEASE) or b"{}")["time"]) < LEASED_S
    return False


def _name(folder: RunFolder) -> str:
    with suppress(ValueError):
        return str(folder.path.relative_to(runs_root()))
    return folder.path.name


def as_document(status: Status) -> dict[str, Any]:
    """The status as JSON has it; NaN becomes null."""
    document = asdict(status) | {"fraction": status.fraction, "main": status.main}
    document["stragglers"] = [worker.rank for worker in status.workers if worker.is_straggler]
    return _finite(document)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
