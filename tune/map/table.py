"""A sweep as points and lines: trials that differ in their seed alone are one point, points that differ in their
training radius alone are one line. Figures, words and page all read from here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from arae.records import Record
from arae.report.table import NORMS, RECONSTRUCTION, radius_text, threat_text
from tune.front import contenders, front, knee
from tune.map.points import Cell, Group, Measure
from tune.results import Sweep, Trial

__all__ = ["Cell", "Group", "Line", "MapTable", "Measure", "Standing", "is_radius", "listed", "map_table", "value_text"]

SEED = "seed"
RADIUS_KEYS = {f"encoder.attack.{key}" for key in ("eps", "norm", "step_size", "steps")}
"""What an axis may set and still be one of the training radius."""
QUALITY = ("psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Line:
    """Points that differ in their training radius alone, by radius; of several norms, each has its own line."""

    label: str
    groups: tuple[Group, ...]

    @property
    def values(self) -> str:
        """What its points have in common, without the axes' names."""
        named = [value for _, value in self.groups[0].line]
        return ", ".join(named) if named else self.label

    @property
    def joined(self) -> bool:
        """Whether each radius has one point, so that a line through them means something."""
        return len({group.eps for group in self.groups}) == len(self.groups)


@dataclass(frozen=True)
class Standing:
    """Points (by number) on the front, those that their intervals do not tell from it, and the knee."""

    front: frozenset[int]
    near: frozenset[int]
    """Not on the front, but not below it for certain either."""
    knee: int | None

    @classmethod
    def of(cls, groups: Sequence[Group], measures: Sequence[Measure]) -> Standing:
        """Of the groups that have all these measures."""
        rows = [(g.number, cells) for g in groups if (cells := _whole(g, measures)) is not None]
        if not rows:
            return cls(frozenset(), frozenset(), None)
        signs, numbers = [m.sign for m in measures], [number for number, _ in rows]
        values = [[cell.value for cell in cells] for _, cells in rows]
        low, high = ([[getattr(cell, end) for cell in cells] for _, cells in rows] for end in ("low", "high"))
        best = {numbers[i] for i in front(values, signs)}
        near = {numbers[i] for i in contenders(low, high, signs)} - best
        found = knee(values, signs)
        return cls(frozenset(best), frozenset(near), None if found is None else numbers[found])


@dataclass(frozen=True)
class MapTable:
    """Everything that is drawn and said of a sweep."""

    sweep: Sweep
    groups: tuple[Group, ...]

    @cached_property
    def threats(self) -> tuple[Measure, ...]:
        """Robust accuracy at each norm and radius at which it was measured, by norm and radius."""
        records = [r for g in self.groups for t in g.trials for r in t.records if r.metric == "robust_accuracy"]
        places = sorted({(r.threat.norm, r.threat.eps) for r in records if r.threat and r.value is not None})
        return tuple(Measure("robust_accuracy", norm, eps) for norm, eps in places)

    @cached_property
    def quality(self) -> tuple[Measure, ...]:
        """Of the reconstructions of clean images, what some point has."""
        return tuple(m for m in map(Measure, QUALITY) if self.having(m))

    @cached_property
    def measures(self) -> tuple[Measure, ...]:
        """The columns of the table; one that was tried and has no value anywhere is there for its reason."""
        tried = {r.metric for g in self.groups for t in g.trials for r in t.records if _plain(r)}
        names = [name for name in ("clean_accuracy", *QUALITY) if name in tried]
        shown = [Measure(name) for name in names]
        return (*shown[: "clean_accuracy" in tried], *self.threats, *shown["clean_accuracy" in tried :],
                Measure("gpu_hours"))  # fmt: skip

    @cached_property
    def objectives(self) -> tuple[Measure, ...]:
        """What the sweep's front is of, as far as some point has it."""
        return tuple(m for m in map(Measure, self.sweep.space.search.objectives) if self.having(m))

    @cached_property
    def standing(self) -> Standing:
        """The front of the sweep's own objectives."""
        return Standing.of(self.groups, self.objectives)

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """In order of their first points."""
        bases: dict[tuple[tuple[str, str], ...], list[Group]] = {}
        for group in self.groups:
            bases.setdefault(group.line, []).append(group)
        several = len({g.norm for g in self.groups if g.norm}) > 1
        found = list[Line]()
        for base, groups in bases.items():
            label = ", ".join(f"{_short(name)} = {value}" for name, value in base)
            for norm in sorted({g.norm for g in groups if g.norm}) or [None]:
                parts = [label] * bool(label) + ([NORMS[norm]] if norm and several else [])
                members = tuple(sorted((g for g in groups if g.norm in (norm, None)), key=lambda g: g.eps))
                found.append(Line(", ".join(parts), members))
        return tuple(found)

    @cached_property
    def radii(self) -> tuple[float, ...]:
        """The training radii, from small to large."""
        return tuple(sorted({group.eps for group in self.groups}))

    @property
    def small(self) -> bool:
        """Whether the recipe says that its figures are not to be compared with those of full size."""
        return self.sweep.recipe.scale == "small"

    def having(self, *measures: Measure) -> list[Group]:
        """The points that have all of these."""
        return [group for group in self.groups if _whole(group, measures) is not None]

    def attack(self, measure: Measure) -> str:
        """Under which attack robust accuracy was measured, in words."""
        cells = [cell for group in self.groups if (cell := group.cell(measure))]
        told = {threat_text(s.record.threat) for cell in cells for s in cell.sources if s.record.threat}
        return told.pop() if len(told) == 1 else f"{len(told)} different attacks, each named with its number"


def map_table(sweep: Sweep) -> MapTable:
    """The points of a sweep's finished trials, line by line and from small to large radii."""
    merged: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
    for trial in sweep.finished:
        key = tuple((name, repr(value)) for name, value in trial.point.values.items() if name != SEED)
        merged.setdefault(key, []).append(trial)
    every = [sorted(trials, key=lambda t: t.recipe.seed) for trials in merged.values()]
    order = list(dict.fromkeys(_line(sweep, trials[0]) for trials in every))
    every.sort(key=lambda trials: (order.index(_line(sweep, trials[0])), *_radius(trials[0])))
    labels = _labels(sweep, [trials[0] for trials in every])
    groups = [
        Group(i, label, tuple(trials), _line(sweep, trials[0]))
        for i, (label, trials) in enumerate(zip(labels, every, strict=True), 1)
    ]
    return MapTable(sweep, tuple(groups))


def listed(items: Iterable[str]) -> str:
    """`a, b and c`."""
    every = list(items)
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} and {every[-1]}" if every else "none"


def is_radius(sweep: Sweep, name: str) -> bool:
    """Whether an axis of the space sets the training radius, and nothing else but its norm and steps."""
    axis = sweep.space.axes[name]
    values = axis.values if axis.values is not None else axis.ends or ()
    keys = {key for value in values for key in axis.overrides(name, value)}
    return "encoder.attack.eps" in keys and keys <= RADIUS_KEYS


def _line(sweep: Sweep, trial: Trial) -> tuple[tuple[str, str], ...]:
    """The values of the listed axes other than radius and seed: values of a range are drawn, and never meet again."""
    axes = sweep.space.axes
    return tuple(
        (name, value_text(value))
        for name, value in trial.point.values.items()
        if name != SEED and axes[name].values is not None and not is_radius(sweep, name)
    )


def _labels(sweep: Sweep, trials: Sequence[Trial]) -> list[str]:
    """The radius and what else varies, as short as can be."""
    norms = {trial.recipe.encoder.attack.norm for trial in trials if trial.recipe.encoder.attack.eps}
    varied = any(is_radius(sweep, name) for name in sweep.space.axes)
    found = list[str]()
    for trial in trials:
        attack = trial.recipe.encoder.attack
        norm = f"{NORMS[attack.norm]} " if attack.eps and attack.norm and len(norms) > 1 else ""
        parts = [f"{norm}ε = {radius_text(attack.eps)}"] if varied else []
        parts += [
            f"{_short(name)} = {value_text(value)}"
            for name, value in trial.point.values.items()
            if name != SEED and not is_radius(sweep, name)
        ]
        found.append(", ".join(parts) or "the recipe as it is")
    return found


def value_text(value: Any) -> str:
    """A value of an axis as shown."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _radius(trial: Trial) -> tuple[str, float]:
    attack = trial.recipe.encoder.attack
    return (attack.norm or "" if attack.eps else "", attack.eps)


def _whole(group: Group, measures: Sequence[Measure]) -> list[Cell] | None:
    cells = [group.cell(measure) for measure in measures]
    return None if None in cells else [cell for cell in cells if cell is not None]


def _plain(record: Record) -> bool:
    return record.threat is None and record.protocol in (RECONSTRUCTION, "classification")
