"""The trials that a sweep's own search makes, gone through on paper: which stages they need, and what those cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arae.config import Recipe
from arae.launch import Where
from tune.costs import Cost, Costs
from tune.journal import Entry, Journal
from tune.search import Points
from tune.settings import EarlyStop
from tune.space import Space
from tune.store import Name, Stage, is_trained

MOST = 500
"""Trials that are gone through where only a budget ends the search."""
STAGES: tuple[Name, ...] = ("encoder", "decoder")
EVALUATION = "evaluation"
KINDS = (*STAGES, EVALUATION)


@dataclass(frozen=True)
class Row:
    """Stages of one kind, or the evaluations of both."""

    name: str
    needed: int
    """How many there would be, had each trial its own."""
    distinct: int
    """How many there are."""
    there: int
    """How many of those the store has."""
    hours: float
    """Of devices, for those that it lacks."""
    hours_there: float
    """The same of those that it has."""


@dataclass(frozen=True)
class Way:
    """How far a stage may be expected to come, where stages are cut short."""

    begun: float
    """Probability that it is begun: a decoder's encoder must come to its end."""
    share: float
    """Of its steps, once it is begun."""
    ends: float
    """Probability that it comes to its end, once it is begun."""


@dataclass(frozen=True)
class _Once:
    """A stage that trials have in common, or one evaluation of it."""

    stage: Stage
    cost: Cost
    there: bool


class _Unwritten(Journal):
    """The book of a sweep that is never run."""

    def __init__(self) -> None:
        super().__init__(Path())

    def add(self, event: str, **fields: Any) -> None:
        """Nothing is written."""

    def events(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """Nothing was."""
        return iter(())


class Counting:
    """The trials, in the search's order and with its seed, until the space or a budget is used up."""

    def __init__(self, recipe: Recipe, space: Space, where: Where) -> None:
        """`recipe`: as `tune.sweep.prepared` makes it. Nothing is looked at yet."""
        self.search, self.costs = space.search, Costs(where)
        # Budgets of hours are gone through here; and there is nothing to learn from.
        changes: dict[str, Any] = {"hours": None, "gpu_hours": None}
        if self.search.kind in ("tpe", "nsga2"):
            changes["kind"] = "random"
        self._points = Points(space, self.search.model_copy(update=changes), recipe, _Unwritten())
        self.trials, self.hours_alone = 0, 0.0
        """Trials so far, and hours of devices that they took, had each to train and measure its own stages."""
        self._needed = Counter[str]()
        self._trained: dict[str, _Once] = {}
        self._measured: dict[tuple[str, str], _Once] = {}

    def count(self) -> str | None:
        """Go through all trials; returns the budget that ends them, where one does. InputError as of `Costs.of`."""
        endless = self.search.kind != "grid" and self.search.trials is None
        while True:
            if (budget := self._used_up()) is not None:
                return budget
            if endless and self.trials >= MOST:
                return f"after {MOST} of which the rest is not looked at"
            entry = self._points.next()
            if entry is None:
                return None
            self._take(entry)

    def row(self, name: str) -> Row:
        """What is known of the stages of a kind, or of the evaluations."""
        if name == EVALUATION:
            found = [(one.cost.evaluation, one.there) for one in self._measured.values()]
        else:
            found = [(one.cost.training, one.there) for one in self._trained.values() if one.stage.name == name]
        there = [hours for hours, known in found if known]
        rest = sum(hours for hours, known in found if not known)
        return Row(name, self._needed[name], len(found), len(there), rest, sum(there))

    def hours_expected(self, early: EarlyStop) -> float:
        """Hours of devices if every rung keeps its share of the stages that are to be trained."""
        ways = self.ways(early)
        total = sum(one.cost.training * ways[key].begun * ways[key].share for key, one in self._new())
        for (key, _), one in self._measured.items():
            if not one.there:
                total += one.cost.evaluation * (ways[key].begun * ways[key].ends if key in ways else 1.0)
        return total

    def ways(self, early: EarlyStop) -> dict[str, Way]:
        """Of each stage that is to be trained, by its key, how far it may be expected to come."""
        new = self._new()
        members = Counter((one.stage.name, one.stage.group) for _, one in new)
        found: dict[str, Way] = {}
        for key, one in sorted(new, key=lambda each: STAGES.index(each[1].stage.name)):
            share, ends = kept(members[one.stage.name, one.stage.group], early)
            encoder = found.get(one.stage.encoder)
            found[key] = Way(encoder.begun * encoder.ends if encoder else 1.0, share, ends)
        return found

    def storage(self, early: EarlyStop | None) -> dict[str, int]:
        """Bytes that come to the store and stay, by what they are; a stage's states are deleted at its end."""
        new = self._new()
        found = {
            "weights": sum(one.cost.weights for _, one in new),
            "pictures": sum(one.cost.pictures for _, one in new),
        }
        if early:
            ways = self.ways(early)
            waiting = sum(one.cost.states * ways[key].begun * (1 - ways[key].ends) for key, one in new)
            found["states that wait on rungs"] = round(waiting)
        return {name: size for name, size in found.items() if size}

    def states(self) -> int:
        """Bytes at most of the states that a trial keeps while it is at work."""
        return max((one.cost.states for _, one in self._new()), default=0)

    def _take(self, entry: Entry) -> None:
        self.trials += 1
        for stage in self._points.stages(entry):
            self._needed[stage.name] += 1
            if stage.key not in self._trained:
                self._trained[stage.key] = _Once(stage, self.costs.of(stage), is_trained(stage))
            self.hours_alone += self._trained[stage.key].cost.training
            if stage.evaluation is not None:
                self._needed[EVALUATION] += 1
                self.hours_alone += self._evaluated(stage, stage.evaluation).cost.evaluation

    def _evaluated(self, stage: Stage, recipe: Recipe) -> _Once:
        assert stage.measured is not None
        key = stage.key, stage.measured.name
        if key not in self._measured:
            there = self._trained[stage.key].there and stage.is_measured
            self._measured[key] = _Once(stage, self.costs.of(stage), there)
        return self._measured[key]

    def _used_up(self) -> str | None:
        """Which budget of hours no new trial would be begun in."""
        search = self.search
        if search.gpu_hours is None and search.hours is None:
            return None
        rows = [self.row(name) for name in KINDS]
        if search.gpu_hours is not None and sum(row.hours for row in rows) >= search.gpu_hours:
            return f"search.gpu_hours = {search.gpu_hours:g}"
        if search.hours is not None and sum(row.hours for row in rows) >= search.hours * self.costs.workers:
            return f"search.hours = {search.hours:g}, with one trial at a time"
        return None

    def _new(self) -> list[tuple[str, _Once]]:
        return [(key, one) for key, one in self._trained.items() if not one.there]


def kept(members: int, early: EarlyStop) -> tuple[float, float]:
    """Of `members` stages that are compared with one another: the mean share of steps that one is trained, and the
    share of them that come to their end, if every rung keeps 1 in `reduction`, and at least one.
    """
    alive, steps, before = members, 0.0, 0.0
    for share in early.rungs:
        steps += alive * (share - before)
        alive, before = max(1, int(alive / early.reduction)), share
    return (steps + alive * (1 - before)) / members, alive / members
