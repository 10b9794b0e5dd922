"""A sweep as it stands: its trials with what was measured of them, its stages with what they took. Read from its folder
alone, by the report, by `arae compare`, by the driver."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from arae.config import Recipe, load_recipe
from arae.errors import InputError
from arae.records import Record, read_records
from arae.report.table import strength_of
from arae.runs import RunFolder
from arae.storage import fetched
from tune.journal import Entry, Journal
from tune.space import Point, Space
from tune.store import Outcome

PLAN = "plan.json"
CLEAN = ("clean_accuracy", "psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Trial:
    """One trial."""

    entry: Entry
    point: Point
    recipe: Recipe
    folder: Path
    records: tuple[Record, ...] = ()
    """Of the encoder and of the decoder; empty until the trial is finished."""

    @property
    def id(self) -> str:
        """Its name in the sweep's folder."""
        return self.entry.id

    @property
    def finished(self) -> bool:
        """Whether all of it was trained and measured."""
        return self.entry.state == "finished"

    @cached_property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Of each stage that it reached, how it came to be there."""
        return tuple(Outcome(**stage) for stage in self.entry.stages)

    def record(self, objective: str) -> Record | None:
        """The record behind an objective (`gpu_hours` has none)."""
        return record_of(self.records, objective)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, read."""

    folder: Path
    recipe: Recipe
    """What its trials vary."""
    space: Space
    trials: tuple[Trial, ...]
    hours: float
    """For how long commands have worked on it."""
    plan: dict[str, Any] = field(default_factory=dict)
    """What was planned before it began; empty where nobody knows."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.recipe.name

    @property
    def finished(self) -> tuple[Trial, ...]:
        """The trials that came to their end."""
        return tuple(trial for trial in self.trials if trial.finished)

    @cached_property
    def spent(self) -> Spent:
        """What its stages took, and what sharing them saved."""
        return Spent.of([trial.outcomes for trial in self.trials])


@dataclass(frozen=True)
class Spent:
    """What the stages of several trials took together."""

    needed: dict[str, int]
    """How many trials needed one, by the kind of stage."""
    stages: dict[str, int]
    """How many were trained for them; the rest was in the store, or came to it from another sweep."""
    steps: dict[str, int]
    """Training steps of those, each counted once."""
    device_hours: float
    """Of those, training and evaluation."""
    saved_hours: float
    """What the trials would have taken beyond that, had each trained and measured its own."""

    @classmethod
    def of(cls, trials: Iterable[Sequence[Outcome]]) -> Spent:
        """Of the stages of these trials; stages of a kind with the same key are one."""
        every = [outcome for trial in trials for outcome in trial]
        # A stage that one trial was cut short in may have been carried on by another; whoever trained it, trained it.
        once: dict[tuple[str, str], Outcome] = {}
        for outcome in every:
            before = once.get(place := (outcome.stage, outcome.key), outcome)
            farther = outcome if outcome.steps >= before.steps else before
            ours = {kind: getattr(before, kind) or getattr(outcome, kind) for kind in ("trained", "measured")}
            once[place] = replace(farther, **ours)
        kinds = tuple(dict.fromkeys(outcome.stage for outcome in every))
        mine = [one for one in once.values() if one.trained]
        paid = sum(one.device_hours for one in mine)
        paid += sum(one.evaluation_s for one in once.values() if one.measured) / 3600
        alone = sum(
            whole.device_hours + whole.evaluation_s / 3600 for one in every if (whole := once[one.stage, one.key])
        )
        return cls(
            needed={kind: sum(one.stage == kind for one in every) for kind in kinds},
            stages={kind: sum(one.stage == kind for one in mine) for kind in kinds},
            steps={kind: sum(one.steps for one in mine if one.stage == kind) for kind in kinds},
            device_hours=paid,
            saved_hours=alone - paid,
        )


def load_sweep(folder: Path) -> Sweep:
    """Read a sweep's folder; InputError where it is none, or damaged."""
    folder = fetched(folder)
    if not RunFolder(folder).is_sweep:
        raise InputError(f"{folder}: no sweep; `arae sweep RECIPE SPACE` makes one")
    recipe = load_recipe(folder)
    space = read_space(folder)
    journal = Journal(folder)
    trials = [_trial(folder, recipe, space, entry) for entry in journal.entries().values()]
    try:
        plan = json.loads((folder / PLAN).read_text())
    except (OSError, ValueError):
        plan = {}
    return Sweep(folder, recipe, space, tuple(trials), journal.hours(), plan)


def read_space(folder: Path) -> Space:
    """The space that a sweep's folder was made for."""
    return Space.model_validate(yaml.safe_load(RunFolder(folder).space.read_text()))


def _trial(folder: Path, recipe: Recipe, space: Space, entry: Entry) -> Trial:
    point = space.point(entry.values)
    at = folder / entry.id
    records = tuple(read_records(at)) if entry.state == "finished" else ()
    return Trial(entry, point, space.recipe(recipe, point), at, records)


def objectives_of(records: Sequence[Record], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What a trial is judged by: each objective that was measured, by name."""
    found = {name: record_of(records, name) for name in (*CLEAN, "robust_accuracy")}
    values = {name: record.value for name, record in found.items() if record is not None and record.value is not None}
    return values | {"gpu_hours": sum(one.device_hours + one.evaluation_s / 3600 for one in outcomes)}


def record_of(records: Iterable[Record], objective: str) -> Record | None:
    """The record that an objective is: on clean images, or under the strongest attack (see `strength`)."""
    if objective in CLEAN:
        wanted = "classification" if objective == "clean_accuracy" else "reconstruction"
        return next(
            (r for r in records if r.metric == objective and r.protocol == wanted and r.threat is None),
            None,
        )
    attacked = [r for r in records if r.metric == objective and r.threat is not None]
    return max(attacked, key=strength, default=None)


def strength(record: Record) -> tuple[float, int, int]:
    """Attacks in order: by radius, then by kind, then by steps over all restarts."""
    assert record.threat is not None
    return record.threat.eps, *strength_of(record.threat)


def by_objective(values: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The values in order of the names; NaN where one was not measured."""
    return [values.get(name, float("nan")) for name in names]
