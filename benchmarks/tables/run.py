"""Training and measuring a table's runs: what is there is not made again, and what was stopped goes on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from arae.adopt import adopt_encoder, finished
from arae.check import check
from arae.config import Recipe
from arae.evaluate import evaluate
from arae.files import write_text
from arae.launch import Where, refuse_another
from arae.records import Record, read_records, write_records
from arae.runs import RunFolder
from arae.session import Session, session
from benchmarks.tables.definition import Trip

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tables"
"""Records of the tables that were run, as measured: `<scale>/<run>.jsonl`."""
PLACES = frozenset(
    f"{part}.{key}"
    for part, keys in {
        "data": ("source", "train", "test", "loader"),
        "evaluate": ("images", "lpips_weights", "batch", "tile"),
        "state": ("every", "keep"),
    }.items()
    for key in keys
)
"""Overrides that say where things are and how they are handled, not what is computed."""


def check_trips(trips: Iterable[Trip], device: torch.device) -> None:
    """Raise InputError, before anything is trained, for data that is missing and folders that hold something else."""
    seen: set[str] = set()
    for trip in trips:
        folder = RunFolder.of(trip.recipe)
        refuse_another(trip.recipe, folder)
        r = trip.recipe
        networks = str((r.data, r.encoder.name, r.encoder.width, r.encoder.layer, r.decoder and r.decoder.name))
        if networks not in seen and not done(trip):
            list(check(r, device))
            for each in trip.evaluations:
                if each.evaluate.protocol == "high-resolution":
                    list(check(each, device))  # its folder is missed now, not after the training
        seen.add(networks)


def run_trip(trip: Trip, where: Where) -> None:
    """Train and measure one run, from wherever it stands. Raises what training and evaluation raise."""
    if done(trip):
        return
    with session(trip.recipe) as run:
        siblings = sorted(path for path in run.folder.path.parent.iterdir() if path.is_dir())
        if other := adopt_encoder(trip.recipe, run.folder, siblings):
            run.progress.note(f"its encoder is that of {other.name}")
        run.train(where)
        for recipe in trip.evaluations:
            if not kept(recipe).is_file():
                measure(run, recipe, where.torch_device())


def measure(run: Session, recipe: Recipe, device: torch.device) -> None:
    """One evaluation of a trained run; its records are kept under the recipe's digest, beside the run's own."""
    records = evaluate(recipe, run.folder, device, run.progress.task, run.progress.note)
    run.tracker.log_records(records)
    path = kept(recipe)
    path.parent.mkdir(exist_ok=True)
    write_records(path, records)


def kept(recipe: Recipe) -> Path:
    """Where the records of an evaluation are kept."""
    return RunFolder.of(recipe).path / "evaluations" / f"{recipe.digest[:16]}.jsonl"


def done(trip: Trip) -> bool:
    """Whether there is nothing left to train or measure."""
    return finished(trip.recipe, RunFolder.of(trip.recipe)) and all(kept(r).is_file() for r in trip.evaluations)


def measured(trips: Iterable[Trip]) -> dict[str, list[Record]]:
    """For each run's key the records that its evaluations have made so far."""
    return {t.key: [r for e in t.evaluations if kept(e).is_file() for r in read_records(kept(e))] for t in trips}


def committed(trips: Iterable[Trip], results: Path = RESULTS) -> dict[str, list[Record]]:
    """The same from the records that come with arae."""
    paths = {trip.key: _published(trip, results) for trip in trips}
    return {key: read_records(path) if path.is_file() else [] for key, path in paths.items()}


def publish(trips: Iterable[Trip], results: Path = RESULTS) -> list[Path]:
    """Put what was measured among the records that come with arae; a thing that was measured again is replaced."""
    written = []
    for trip in trips:
        new = measured([trip])[trip.key]
        path = _published(trip, results)
        old = read_records(path) if path.is_file() else []
        by_query = {record_key(r): r for r in sorted([*old, *new], key=lambda r: r.time)}
        if new:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(r.model_dump_json() + "\n" for _, r in sorted(by_query.items())))
            written.append(path)
    return written


def record_key(record: Record) -> tuple[str, str, str]:
    """What a record of a run is of."""
    return record.protocol, record.metric, record.threat.model_dump_json() if record.threat else ""


def _published(trip: Trip, results: Path) -> Path:
    return results / trip.recipe.scale / f"{trip.name}.jsonl"
