"""Cost before compute, of a sweep: trials, stages once they are shared, hours of devices, storage."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arae.config import Recipe
from arae.errors import InputError
from arae.files import write_text
from arae.launch import Where
from arae.plan import binary, device_name, duration
from tune.counting import EVALUATION, KINDS, STAGES, Counting, Row
from tune.results import PLAN
from tune.space import Space


@dataclass(frozen=True)
class SweepPlan:
    """The estimate. Hours are those of devices: a GPU, or on a CPU a worker."""

    name: str
    trials: int | None
    """How many the search makes; None where a budget of hours decides."""
    counted: int
    """For how many the rest is told."""
    rows: tuple[Row, ...]
    """Encoders, decoders, evaluations."""
    hours_alone: float
    """What the trials would take, had each to train and measure its own stages."""
    hours_expected: float | None
    """With early stopping, if every rung keeps its share; None without."""
    storage: dict[str, int]
    """Bytes that come to the store and stay, by what they are."""
    states: int
    """Bytes at most of the states of each trial at work, which go when its stage ends."""
    notes: tuple[str, ...]

    @property
    def hours(self) -> float:
        """What the store lacks; with early stopping as if no stage were cut short."""
        return sum(row.hours for row in self.rows)

    @property
    def storage_bytes(self) -> int:
        """All that stays."""
        return sum(self.storage.values())

    def document(self) -> dict[str, Any]:
        """The plan as JSON has it. `gpu_hours` is without what the store has, which is `gpu_hours_there`."""
        rows = {row.name: row for row in self.rows}
        return {
            "trials": self.trials,
            "counted": self.counted,
            "needed": {kind: rows[kind].needed for kind in STAGES},
            "stages": {kind: rows[kind].distinct for kind in STAGES},
            "stages_there": {kind: rows[kind].there for kind in STAGES},
            "evaluations": rows[EVALUATION].distinct,
            "gpu_hours": self.hours,
            "gpu_hours_expected": self.hours_expected,
            "gpu_hours_there": sum(row.hours_there for row in self.rows),
            "gpu_hours_alone": self.hours_alone,
            "storage_bytes": self.storage_bytes,
            "storage": self.storage,
            "states_bytes": self.states,
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The plan as text for a terminal."""
        about = "about " if self.trials is None else ""
        out = [f"{self.name}: {about}{self.counted:,} trials", ""]
        out.append(f"{'stage':<14}{'of trials':>12}{'distinct':>12}{'there':>12}{'device time':>16}")
        for row in self.rows:
            numbers = f"{row.needed:>12,}{row.distinct:>12,}{row.there:>12,}"
            out.append(f"{row.name:<14}{numbers}{duration(row.hours):>16}")
        bound = "all, at most" if self.hours_expected is not None else "all"
        out += [f"{bound:<50}{duration(self.hours):>16}", ""]
        if self.hours_expected is not None:
            out.append(f"with early stopping, if every rung keeps its share: {duration(self.hours_expected)}")
        shared = self.hours + sum(row.hours_there for row in self.rows)
        saved = max(0.0, 1 - shared / self.hours_alone) if self.hours_alone else 0.0
        out.append(f"without sharing: {duration(self.hours_alone)}, of which sharing saves {saved:.0%}")
        parts = ", ".join(f"{name} {binary(size)}" for name, size in self.storage.items())
        out.append(f"storage: {binary(self.storage_bytes)} ({parts or 'nothing new'})")
        if self.states:
            out.append(f"beside it, while trials are at work: {binary(self.states)} each at most, for states")
        return [*out, *(f"- {note}" for note in self.notes)]


def plan_sweep(recipe: Recipe, space: Space, where: Where) -> SweepPlan:
    """The plan of a sweep. Takes seconds, for each kind of network is timed, on this machine's device of `where`.

    recipe: as `tune.sweep.prepared` makes it. InputError as of `arae.plan.plan_recipe`.
    """
    counting = Counting(recipe, space, where)
    budget = counting.count()
    early = space.search.early_stop
    return SweepPlan(
        name=recipe.name,
        trials=counting.trials if budget is None else None,
        counted=counting.trials,
        rows=tuple(counting.row(name) for name in KINDS),
        hours_alone=counting.hours_alone,
        hours_expected=counting.hours_expected(early) if early else None,
        storage=counting.storage(early),
        states=counting.states(),
        notes=tuple(_notes(space, counting, budget)),
    )


def write_plan(folder: Path, recipe: Recipe, space: Space, where: Where, note: Callable[[str], None]) -> None:
    """Write the plan into a sweep's folder, unless it is there; `note` is told what it says, or why there is none."""
    if (folder / PLAN).is_file():
        return
    try:
        if where.torch_device().type == "cuda":  # not here: what a process has once held of a GPU, it keeps
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                made = pool.submit(plan_sweep, recipe, space, where).result()
        else:
            made = plan_sweep(recipe, space, where)
    except InputError as error:
        note(f"no plan: {error}")
        return
    write_text(folder / PLAN, json.dumps(made.document(), indent=1) + "\n")
    stages = ", ".join(f"{row.distinct} {row.name}s" for row in made.rows)
    note(f"planned: {made.counted} trials, {stages}; {duration(made.hours)} of device time")


def _notes(space: Space, counting: Counting, budget: str | None) -> Iterator[str]:
    """What the numbers rest on."""
    search, costs = space.search, counting.costs
    axes = ", ".join(space.axes)
    if search.kind == "grid":
        drawn = f", {search.samples} drawn for each" if space.drawn else ""
        yield f"trials: every combination of {axes}{drawn}" + (f"; at most {search.trials}" if search.trials else "")
    elif search.kind == "random":
        yield f"trials: drawn from {axes} with search.seed = {search.seed}; these very ones"
    else:
        yield f"trials: {search.kind} proposes others than the random draws of {axes} that stand for them here"
    if budget is not None:
        yield f"how many is not known beforehand: {budget} ends them, by these estimates after {counting.trials}"
    if early := search.early_stop:
        shares = ", ".join(f"{share:.3g}" for share in early.rungs)
        yield (
            f"early stopping: at shares {shares} of a stage 1 in {early.reduction:g} goes on, of those that are "
            "compared at least one; the bound is that of no stage cut short"
        )
    each = f", {costs.workers} workers a trial" if costs.workers > 1 else ""
    each += f", {costs.threads} thread{'s' * (costs.threads > 1)} a worker" if costs.threads else ""
    yield f"device time: workers times hours, on {device_name(costs.device)}{each}; evaluation in one process"
    taken = f", {costs.assumed} more taken to be as fast" if costs.assumed else ""
    yield f"speed: {costs.timed} network{'s' * (costs.timed != 1)} timed now{taken}; loading and waiting come on top"
    if any(row.there for row in map(counting.row, KINDS)):
        yield "there: what the store has already, which costs nothing"
