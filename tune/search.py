"""Which point of a space is tried next: crossed, drawn, or proposed by Optuna; within the budget; over restarts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arae.config import Recipe
from arae.errors import InputError
from arae.seeds import mix
from tune.journal import Entry, Journal
from tune.rungs import Rungs
from tune.settings import SIGNS, Search
from tune.space import Axis, Point, Space
from tune.store import Stage, stages_of

ID = 12
"""Characters of a trial's id: the digest of its recipe."""
TRIES = 1000
"""Draws in a row that were tried before, after which a space is taken to be used up."""


def id_of(recipe: Recipe) -> str:
    """A trial's id: two trials with one recipe are one, however often they look at held-out images."""
    return recipe.replace({"evaluate.looks": None}).digest[:ID]


class Points:
    """The trials of a sweep, one after another.

    First come those that were begun and may go on, the earliest first; then new ones, until space or budget are used
    up. Trials that failed are tried again by the next command, those that finished are not.
    """

    def __init__(self, space: Space, search: Search, recipe: Recipe, journal: Journal) -> None:
        self.space, self.search, self.recipe, self.journal = space, search, recipe, journal
        self.entries = journal.entries()
        for entry in self.entries.values():
            if entry.state in ("failed", "stopped"):  # a stage that waited may go on where others came since
                entry.state = None
        self.running: dict[str, Entry] = {}
        self._hours = journal.hours()
        self._stages: dict[str, tuple[Stage, ...]] = {}
        self._members = self._compared()
        self.rungs = Rungs(search.early_stop, journal, self._is_alone)
        self._source = self._made()

    def next(self, spent_hours: float = 0.0) -> Entry | None:
        """The next trial to run; None where there is none now, and for good where none runs either.

        spent_hours: what this command has worked so far.
        """
        while True:
            if (entry := self._ready()) is not None:
                self.running[entry.id] = entry
                return entry
            if self.rungs.promote():
                continue
            if not self._used_up(spent_hours) and self._begun():
                continue
            busy = {stage.group for entry in self.running.values() for stage in self.stages(entry)}
            if not self.rungs.rescue(busy):
                return None

    def stages(self, entry: Entry) -> tuple[Stage, ...]:
        """The stages of a trial."""
        if entry.id not in self._stages:
            self._stages[entry.id] = stages_of(self.recipe_of(entry)[1])
        return self._stages[entry.id]

    def limits(self, entry: Entry) -> dict[str, float]:
        """Up to which share of its steps each stage of a trial may be trained."""
        return {stage.name: self.rungs.limit(stage) for stage in self.stages(entry)}

    def passed(self, entry: Entry, outcome: dict[str, Any]) -> None:
        """A trial has made sure of a stage."""
        self.journal.stage(entry, outcome)
        self.rungs.done(outcome["key"])

    def paused(self, entry: Entry, at: Mapping[str, Any]) -> None:
        """A trial's stage has come as far as it may; whoever was there first has said its score."""
        self.running.pop(entry.id, None)
        if at.get("score") is not None:
            self.rungs.arrived(at["group"], at["key"], at["step"], at["score"])

    def waiting(self) -> list[tuple[Entry, Stage]]:
        """Trials that wait on a rung, and the stage that does."""
        open_ones = [entry for entry in self.entries.values() if entry.state is None]
        found = [(entry, stage) for entry in open_ones if (stage := self._at(entry)) is not None]
        return [(entry, stage) for entry, stage in found if self.rungs.waits(stage)]

    def _ready(self) -> Entry | None:
        for entry in self.entries.values():
            if entry.state is None and entry.id not in self.running:
                stage = self._at(entry)
                if stage is None or not self.rungs.waits(stage):
                    return entry
        return None

    def _at(self, entry: Entry) -> Stage | None:
        """The stage that a trial is at; None where all are done, and it is to write that down alone."""
        return next((stage for stage in self.stages(entry) if not self.rungs.is_done(stage.key)), None)

    def _begun(self) -> bool:
        """Begin a new trial; whether there was one."""
        for point, learned in self._source:
            recipe = self.space.recipe(self.recipe, point)
            if id_of(recipe) in self.entries:
                self.repeated(learned, self.entries[id_of(recipe)])
                continue
            entry = Entry(id_of(recipe), dict(point.values), len(self.entries), learned=learned)
            self.entries[entry.id] = entry
            self.journal.begin(entry)
            return True
        return False

    def _compared(self) -> dict[str, set[str]] | None:
        """Of a space that is known beforehand, the encoders of each group."""
        if self.search.early_stop is None or self.search.kind != "grid" or self.space.drawn:
            return None
        members = defaultdict[str, set[str]](set)
        for point in self.space.crossings():
            stage = stages_of(self.space.recipe(self.recipe, point))[0]
            members[stage.group].add(stage.key)
        return members

    def _is_alone(self, stage: Stage) -> bool:
        return stage.name == "encoder" and self._members is not None and len(self._members[stage.group]) == 1

    def recipe_of(self, entry: Entry) -> tuple[Point, Recipe]:
        """Where in the space a trial is, and its recipe."""
        point = self.space.point(entry.values)
        return point, self.space.recipe(self.recipe, point)

    def ended(self, entry: Entry) -> None:
        """Take note of how a trial ended."""
        self.running.pop(entry.id, None)
        self.journal.end(entry)

    def repeated(self, learned: Mapping[str, Any], entry: Entry) -> None:
        """A point came up again that is known already."""

    def gpu_hours(self) -> float:
        """Hours of devices that the trials' stages took, each stage once, evaluation included."""
        paid = {(stage["stage"], stage["key"]): stage for entry in self.entries.values() for stage in entry.stages}
        return sum(one["workers"] * one["seconds"] + one["evaluation_s"] for one in paid.values()) / 3600

    def _used_up(self, spent_hours: float) -> bool:
        search = self.search
        return (
            (search.trials is not None and len(self.entries) >= search.trials)
            or (search.hours is not None and self._hours + spent_hours >= search.hours)
            or (search.gpu_hours is not None and self.gpu_hours() >= search.gpu_hours)
        )

    def _made(self) -> Iterator[tuple[Point, dict[str, Any]]]:
        made = self._crossed() if self.search.kind == "grid" else self._drawn()
        return ((point, {}) for point in made)

    def _crossed(self) -> Iterator[Point]:
        """All combinations, those with the same encoder as far apart as can be: then nobody waits for another's.

        With early stopping in a shuffled order: in that of the axes, each could be better than all before it.
        """
        points = self.space.points(self.search.samples, self.search.seed)
        if self.search.early_stop is not None:
            order = np.random.default_rng(self.search.seed).permutation(len(points))
            points = [points[i] for i in order]
        by_encoder: dict[str, list[int]] = defaultdict(list)
        for i, point in enumerate(points):
            by_encoder[stages_of(self.space.recipe(self.recipe, point))[0].key].append(i)
        turns = sorted((turn, i) for group in by_encoder.values() for turn, i in enumerate(group))
        return (points[i] for _, i in turns)

    def _drawn(self) -> Iterator[Point]:
        """Every axis drawn; each draw by its number alone, so that a later command goes on where this one ends."""
        number = fruitless = 0
        while fruitless < TRIES:
            numbers = np.random.default_rng([self.search.seed, number])
            values = {name: _any_of(axis, numbers) for name, axis in self.space.axes.items()}
            point = self.space.point(values)
            number += 1
            known = len(self.entries)
            yield point
            fruitless = fruitless + 1 if len(self.entries) == known else 0


def _any_of(axis: Axis, numbers: np.random.Generator) -> Any:
    if axis.values is not None:
        return axis.values[int(numbers.integers(len(axis.values)))]
    return axis.draw(numbers)


class OptunaPoints(Points):
    """Points that Optuna proposes; its study lies beside the journal and outlives the command."""

    FILE = "optuna.log"

    def __init__(self, space: Space, search: Search, recipe: Recipe, journal: Journal, folder: Path) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise InputError(f"search.kind = {search.kind} needs Optuna: pip install 'arae[cluster]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / self.FILE))),
            study_name="sweep",
            directions=["maximize" if SIGNS[name] > 0 else "minimize" for name in search.objectives],
            load_if_exists=True,
        )
        self._fail = optuna.trial.TrialState.FAIL
        running = optuna.trial.TrialState.RUNNING
        # A seeded sampler begins anew with every command: with the same seed it would propose the same again.
        seed = mix(search.seed, "sampler", len(self._study.trials)) % 2**32
        samplers = optuna.samplers
        self._study.sampler = (
            samplers.NSGAIISampler(seed=seed) if search.kind == "nsga2" else samplers.TPESampler(seed=seed)
        )
        super().__init__(space, search, recipe, journal)
        told = {entry.learned.get("trial"): entry for entry in self.entries.values()}
        for trial in self._study.get_trials(deepcopy=False, states=(running,)):
            entry = told.get(trial.number)
            if entry is None:  # a command was killed between Optuna's book and ours
                self._study.tell(trial.number, state=self._fail)
            elif entry.state is not None:
                self._tell(entry)

    def ended(self, entry: Entry) -> None:
        """Let Optuna learn from it. A trial that was cut short, or failed, has no values to learn from."""
        super().ended(entry)
        self._tell(entry)

    def repeated(self, learned: Mapping[str, Any], entry: Entry) -> None:
        """Optuna is told what is known of the point."""
        self._values_told(learned["trial"], entry)

    def _tell(self, entry: Entry) -> None:
        if entry.state != "failed":  # that is tried again by the next command
            self._values_told(entry.learned["trial"], entry)

    def _values_told(self, trial: int, entry: Entry) -> None:
        values = [entry.objectives[name] for name in self.search.objectives if name in entry.objectives]
        if entry.state == "finished" and len(values) == len(self.search.objectives):
            self._study.tell(trial, values, skip_if_finished=True)
        else:
            self._study.tell(trial, state=self._fail, skip_if_finished=True)

    def _made(self) -> Iterator[tuple[Point, dict[str, Any]]]:
        fruitless = 0
        while fruitless < TRIES:
            trial = self._study.ask()
            values: dict[str, Any] = {}
            for name, axis in self.space.axes.items():
                if self.space.has(name, values):
                    values[name] = _proposed(trial, name, axis)
            known = len(self.entries)
            yield self.space.point(values), {"trial": trial.number}
            fruitless = fruitless + 1 if len(self.entries) == known else 0


def _proposed(trial: Any, name: str, axis: Axis) -> Any:
    if axis.ends is not None:
        return trial.suggest_float(name, *axis.ends, log=axis.log_uniform is not None)
    assert axis.values is not None
    return axis.values[trial.suggest_categorical(name, range(len(axis.values)))]


def points_of(space: Space, search: Search, recipe: Recipe, journal: Journal, folder: Path) -> Points:
    """The points of a sweep in the order of its search."""
    if search.kind in ("tpe", "nsga2"):
        return OptunaPoints(space, search, recipe, journal, folder)
    return Points(space, search, recipe, journal)


def searcher(next_config: Callable[[], dict[str, Any] | None], more: Callable[[], bool]) -> Any:
    """The points as a searcher of Ray Tune's, which asks for one whenever it has room.

    next_config: what the next trial is told, None where there is none now; more: whether there may be one later.
    """
    from ray.tune.search import Searcher

    class Next(Searcher):
        def suggest(self, trial_id: str) -> Any:
            config = next_config()
            if config is None and not more():
                return Searcher.FINISHED
            return config

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """The driver writes it down, which knows why."""

        def save(self, checkpoint_path: str) -> None:
            """The journal is all there is to save."""

        def restore(self, checkpoint_path: str) -> None:
            """The journal is read when the command begins."""

        def __reduce__(self) -> Any:  # Ray Tune keeps a copy of everything, to restore what we do not let it restore
            return dict, ()

    return Next(metric="step", mode="max")
