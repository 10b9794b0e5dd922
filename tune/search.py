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
        self.workers = 1
        """That train a stage, as far as it is not known from its end."""
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
            spent = self._spent(spent_hours)
            if not spent and (self.rungs.promote() or (self._room() and self._begun())):
                continue
            busy = {stage.group for entry in self.running.values() for stage in self.stages(entry)}
            # Hours that are over leave what waits where it is, unless there would be nothing at all.
            some = self.running or any(entry.state == "finished" for entry in self.entries.values())
            if (spent and some) or not self.rungs.rescue(busy, one=spent):
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
        if at:
            self.rungs.arrived({**at, "score": float("-inf") if at["score"] is None else at["score"]})

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
            try:
                recipe = self.space.recipe(self.recipe, point)
            except InputError:  # a space with too many combinations to have been gone through
                self.impossible(learned)
                continue
            if id_of(recipe) in self.entries:
                self.repeated(learned, self.entries[id_of(recipe)])
                continue
            entry = Entry(id_of(recipe), dict(point.values), len(self.entries), learned=learned)
            self.entries[entry.id] = entry
            self.journal.begin(entry)
            return True
        return False

    def _compared(self) -> dict[str, set[str]] | None:
        """The encoders that each group may have, as far as the space has them one by one; None: any number.

        Ranges are left at their lower ends, unless the encoder depends on one: then, if it is a range of radii (or of
        whatever else groups are told apart by), no encoder has others to be compared with, and else every one has.
        """
        if self.search.early_stop is None or not self.space.is_listable:
            return None
        try:
            made = [stages_of(self.space.recipe(self.recipe, point))[0] for point in self.space.everywhere()]
            moved = [
                [stages_of(self.space.recipe(self.recipe, point))[0] for point in self.space.ends(name)]
                for name, axis in self.space.axes.items()
                if axis.ends is not None
            ]
        except InputError:  # combinations that can't be are met one by one
            return None
        if any(low.group != high.group for low, high in moved):
            return {}
        if any(low.key != high.key for low, high in moved):
            return None
        members = defaultdict[str, set[str]](set)
        for stage in made:
            members[stage.group].add(stage.key)
        return members

    def _is_alone(self, stage: Stage) -> bool:
        return stage.name == "encoder" and self._members is not None and len(self._members.get(stage.group, "1")) == 1

    def recipe_of(self, entry: Entry) -> tuple[Point, Recipe]:
        """Where in the space a trial is, and its recipe."""
        point = self.space.point(entry.values)
        return point, self.space.recipe(self.recipe, point)

    def ended(self, entry: Entry) -> None:
        """Take note of how a trial ended."""
        self.running.pop(entry.id, None)
        if entry.state == "failed" and (stage := self._at(entry)) is not None:
            self.rungs.lost(stage)
        self.journal.end(entry)

    def repeated(self, learned: Mapping[str, Any], entry: Entry) -> None:
        """A point came up again that is known already."""

    def impossible(self, learned: Mapping[str, Any]) -> None:
        """No recipe can be like the point that came up."""

    def gpu_hours(self) -> float:
        """Hours of devices that this sweep has spent: each stage once, evaluation and what waits on a rung included.

        What was in the store before, or comes from another sweep, is not its.
        """
        seconds = dict[tuple[str, str], float]()
        for stage in (stage for entry in self.entries.values() for stage in entry.stages):
            if stage["trained"]:
                seconds[stage["key"], "training"] = stage["workers"] * stage["seconds"]
            if stage["measured"]:
                seconds[stage["key"], "evaluation"] = stage["evaluation_s"]
        for key, at in self.rungs.waiting().items():
            seconds[key, "training"] = self.workers * at["seconds"]
        return sum(seconds.values()) / 3600

    def _room(self) -> bool:
        """Whether there may be more trials."""
        return self.search.trials is None or len(self.entries) < self.search.trials

    def _spent(self, hours: float) -> bool:
        """Whether the hours are used up; `hours`: what this command has worked so far."""
        search = self.search
        return (search.hours is not None and self._hours + hours >= search.hours) or (
            search.gpu_hours is not None and self.gpu_hours() >= search.gpu_hours
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
    OBJECTIVES = "objectives"

    def __init__(self, space: Space, search: Search, recipe: Recipe, journal: Journal, folder: Path) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise InputError(f"search.kind = {search.kind} needs Optuna: pip install 'arae[cluster]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / self.FILE))),
            study_name="sweep",
            directions=["maximize" if SIGNS[name] > 0 else "minimize" for name in search.objectives],
            load_if_exists=True,
        )
        before = self._study.user_attrs.get(self.OBJECTIVES, list(search.objectives))
        if before != list(search.objectives):
            raise InputError(
                f"search.objectives = {list(search.objectives)}: this sweep has been proposed trials for {before}; put "
                "those back, or give a new one another name=…"
            )
        self._study.set_user_attr(self.OBJECTIVES, before)
        self._fail = optuna.trial.TrialState.FAIL
        running = optuna.trial.TrialState.RUNNING
        # A seeded sampler begins anew with every command: with the same seed it would propose the same again.
        seed = mix(search.seed, "sampler", len(self._study.trials)) % 2**32
        samplers = optuna.samplers
        self._study.sampler = (
            samplers.NSGAIISampler(population_size=population(search.trials), seed=seed)
            if search.kind == "nsga2"
            else samplers.TPESampler(seed=seed)
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

    def impossible(self, learned: Mapping[str, Any]) -> None:
        """Optuna is told that there is nothing there."""
        self._study.tell(learned["trial"], state=self._fail)

    def _tell(self, entry: Entry) -> None:
        if entry.state != "failed":  # that is tried again by the next command
            self._values_told(entry.learned["trial"], entry)

    def _values_told(self, trial: int, entry: Entry) -> None:
        values = [entry.objectives[name] for name in self.search.objectives if name in entry.objectives]
        if entry.state != "finished" or len(values) < len(self.search.objectives):
            self._study.tell(trial, state=self._fail, skip_if_finished=True)
            return
        was = self._study.get_trials(deepcopy=False)[trial]
        if was.state == self._fail:  # it was cut short, and went on later; what is told once can't be changed
            again = self._optuna.trial.create_trial(params=was.params, distributions=was.distributions, values=values)
            self._study.add_trial(again)
        self._study.tell(trial, values, skip_if_finished=True)

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


def population(trials: int | None) -> int:
    """Trials of a generation of NSGA-II: some four generations in the budget, and no more than the field's usual 50."""
    return min(50, max(8, (trials or 64) // 4))


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
