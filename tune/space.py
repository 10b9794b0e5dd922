"""Search spaces: names and recipe keys with the values that a sweep tries, checked before anything is trained.

A space is a YAML file:

    about: what it asks, in a line
    fixed: {decoder.losses.pixel: 1}      # the same in every trial, as overrides on the command line
    axes:
      encoder.attack.eps: {grid: [0, 0.75, 1.5]}                  # each of them
      loss:                                                       # no key, but a name for several
        grid:
          pixel: {decoder.losses.feature: 0}
          pixel+feature: {decoder.losses.feature: 0.01}
      decoder.losses.feature: {log-uniform: [1e-4, 1e-1], when: {loss: pixel+feature}}
      decoder.lr: {choice: [1e-3, 3e-3]}                          # one of them, drawn
      seed: {grid: [1, 2]}
    search: {samples: 3}                                          # `tune.settings.Search`

`grid` axes are crossed; `choice`, `uniform` and `log-uniform` are drawn anew for each sample of each crossing. An axis
with `when` is there only where the axes before it, grid or choice, have the values named.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import yaml
from pydantic import Field, model_validator

from arae.config import Recipe
from arae.config.base import Part
from arae.config.document import checked, set_key
from arae.errors import InputError
from tune.settings import Search

SPACES = Path(__file__).parent / "spaces"
LIMIT = 10_000
"""Crossings of the grid axes above which a space is taken for a mistake."""
LISTED = 1000
"""Combinations of all listed values, drawn ones too, that are still made one by one to check them."""

Values = tuple[Any, ...] | dict[str, dict[str, Any]]
Range = tuple[float, float]


class Axis(Part):
    """What one name or key may be; exactly one of the four kinds."""

    grid: Values | None = None
    """Every value; a mapping gives names to groups of overrides."""
    choice: Values | None = None
    """One value, each as likely as another; a mapping gives names to groups of overrides."""
    uniform: Range | None = None
    """A number between the two."""
    log_uniform: Annotated[Range | None, Field(alias="log-uniform")] = None
    """A number between the two, its logarithm evenly distributed; both above 0."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Axes above this one, and the value (or list of values) that each must have for this one to be there."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = {"grid": self.grid, "choice": self.choice, "uniform": self.uniform, "log-uniform": self.log_uniform}
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"write one of {', '.join(kinds)}; there are {', '.join(given) or 'none'}")
        if self.values is not None:
            if not self.values:
                raise ValueError(f"{given[0]} is empty: write the values to try")
            shown = [repr(value) for value in self.values]
            if twice := [value for i, value in enumerate(shown) if value in shown[:i]]:
                raise ValueError(f"{given[0]} has {twice[0]} twice")
        elif self.ends is not None:
            low, high = self.ends
            if not low < high:
                raise ValueError(f"{given[0]} goes from {low:g} to {high:g}: write the smaller number first")
            if self.log_uniform is not None and low <= 0:
                raise ValueError(f"log-uniform begins at {low:g}: write a number above 0")
        return self

    @property
    def drawn(self) -> bool:
        """Whether its values are drawn rather than crossed."""
        return self.grid is None

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values, or their names, of an axis that has a list of them."""
        listed = self.grid if self.grid is not None else self.choice
        return None if listed is None else tuple(listed)

    @property
    def ends(self) -> Range | None:
        """The smallest and largest value of an axis that is a range."""
        return self.uniform or self.log_uniform

    def overrides(self, name: str, value: Any) -> dict[str, Any]:
        """What a value of this axis, called `name`, sets in the recipe."""
        listed = self.grid if self.grid is not None else self.choice
        return listed[value] if isinstance(listed, dict) else {name: value}

    def draw(self, numbers: np.random.Generator) -> Any:
        """A value of an axis that is drawn."""
        if self.ends is None:
            assert self.values is not None
            return self.values[int(numbers.integers(len(self.values)))]
        low, high = self.ends
        if self.log_uniform is not None:
            return float(math.exp(numbers.uniform(math.log(low), math.log(high))))
        return float(numbers.uniform(low, high))


@dataclass(frozen=True)
class Point:
    """One place in a space."""

    values: Mapping[str, Any]
    """The axes that are there, and their values or the names of those."""
    overrides: Mapping[str, Any]
    """Dotted recipe keys and what they are set to."""

    @property
    def label(self) -> str:
        """In words, as short as can be: `eps=0.75, loss=pixel, seed=2`."""
        return ", ".join(f"{axis.rpartition('.')[2]}={_short(value)}" for axis, value in self.values.items())


class Space(Part):
    """A search space."""

    about: str = ""
    """What the space asks, in one line."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Overrides that every trial has."""
    axes: dict[str, Axis]
    """What is varied, by dotted key or by name."""
    search: Search = Search()
    """In which order, for how long, and by what it is judged; on the command line as `search.trials=24`."""

    @model_validator(mode="after")
    def _conditions_look_up(self) -> Self:
        if not self.axes:
            raise ValueError("axes is empty: there is nothing to vary")
        for i, (name, axis) in enumerate(self.axes.items()):
            before = dict(list(self.axes.items())[:i])
            for other, wanted in axis.when.items():
                if other not in before or before[other].values is None:
                    known = ", ".join(key for key, one in before.items() if one.values is not None) or "none"
                    raise ValueError(f"axes.{name}.when names {other}: the axes above it that have values are {known}")
                if odd := [value for value in _listed(wanted) if value not in (before[other].values or ())]:
                    raise ValueError(f"axes.{name}.when asks {other} for {odd[0]!r}, which it never is")
        return self

    @cached_property
    def drawn(self) -> tuple[str, ...]:
        """The axes whose values are drawn."""
        return tuple(name for name, axis in self.axes.items() if axis.drawn)

    @cached_property
    def count(self) -> int | None:
        """How many trials a grid has; None where the search draws them."""
        if self.search.kind != "grid":
            return None
        return sum(1 for _ in self.crossings()) * (self.search.samples if self.drawn else 1)

    def crossings(self) -> Iterator[Point]:
        """Every combination of the grid axes, each once; of a space that has none, one that is empty."""
        return self._crossed({name: axis.values or () for name, axis in self.axes.items() if not axis.drawn})

    def everywhere(self) -> Iterator[Point]:
        """Every combination of the values that axes list, drawn or not, each once; ranges are at their lower ends."""
        return self._crossed({name: axis.values or (axis.ends or ())[:1] for name, axis in self.axes.items()})

    def ends(self, name: str) -> tuple[Point, Point]:
        """Both ends of a range, all other axes at their first values, or at what the range needs to be there."""
        low, high = self.axes[name].ends or (None, None)
        return self._only(name, low), self._only(name, high)

    def _only(self, name: str, value: Any) -> Point:
        """One axis at a value, all others at their first ones, or at what this one needs to be there."""
        first = {key: value for key, axis in self.axes.items() for value in (axis.values or axis.ends or ())[:1]}
        needed = {key: _listed(wanted)[0] for key, wanted in self._needed(name).items()}
        return self.point(first | needed | {name: value})

    def _crossed(self, listed: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
        seen: set[tuple[tuple[str, str], ...]] = set()
        for values in itertools.product(*listed.values()):
            point = self.point(dict(zip(listed, values, strict=True)))
            identity = tuple((name, repr(value)) for name, value in point.values.items())
            if identity not in seen:  # values of an axis that is not there make no difference
                seen.add(identity)
                yield point

    def sample(self, crossing: Mapping[str, Any], numbers: np.random.Generator) -> Point:
        """A combination of the grid axes with all else drawn."""
        found: dict[str, Any] = {}
        for name, axis in self.axes.items():
            value = axis.draw(numbers) if axis.drawn else crossing.get(name)  # drawn always: the next draw is the same
            if self.has(name, found):
                found[name] = value
        return self.point(found)

    def points(self, samples: int = 1, seed: int = 0) -> list[Point]:
        """`samples` points for each combination of the grid axes; without drawn axes, one for each."""
        crossings = list(self.crossings())
        if not self.drawn:
            return crossings
        numbers = np.random.default_rng(seed)
        return [self.sample(crossing.values, numbers) for _ in range(samples) for crossing in crossings]

    def has(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether an axis is there, given the values of those above it."""
        when = self.axes[name].when
        return all(other in values and values[other] in _listed(wanted) for other, wanted in when.items())

    def point(self, values: Mapping[str, Any]) -> Point:
        """The place with these values; those of axes that are not there are left out."""
        there: dict[str, Any] = {}
        overrides = dict(self.fixed)
        for name, axis in self.axes.items():
            if name in values and self.has(name, there):
                there[name] = values[name]
                overrides |= axis.overrides(name, values[name])
        return Point(there, overrides)

    def check(self, recipe: Recipe) -> None:
        """InputError for an unknown key, a value that the recipe can't have, or far too many combinations.

        Every combination of the grid axes is made once; with those of the drawn values, where there are not too many,
        and else every such value alone; and both ends of every range.
        """
        count = math.prod(len(axis.values or ()) for axis in self.axes.values() if not axis.drawn)
        if count > LIMIT:
            raise InputError(f"axes: {count} combinations are more than a sweep can try ({LIMIT}); draw some of them")
        if self.is_listable:
            points = list(self.everywhere())
        else:
            listed = {name: axis.values for name, axis in self.axes.items() if axis.drawn and axis.values is not None}
            points = [*self.crossings(), *(self._only(name, one) for name in listed for one in listed[name] or ())]
        points += [end for name, axis in self.axes.items() if axis.ends is not None for end in self.ends(name)]
        for point in points:
            self.recipe(recipe, point)

    @cached_property
    def is_listable(self) -> bool:
        """Whether all combinations of listed values can be gone through in seconds."""
        return math.prod(len(axis.values or (0,)) for axis in self.axes.values()) <= LISTED

    def _needed(self, name: str) -> dict[str, Any]:
        """What must be for an axis to be there, with what that needs in turn."""
        when = self.axes[name].when
        return {key: value for other in when for key, value in self._needed(other).items()} | when

    def recipe(self, recipe: Recipe, point: Point) -> Recipe:
        """The recipe at a point; InputError names the point where it can't be."""
        try:
            return recipe.replace(point.overrides)
        except InputError as error:
            raise InputError(f"{error} (at {point.label})") from None


def shipped_spaces() -> dict[str, Path]:
    """Names and files of the spaces that come with arae."""
    return {path.stem: path for path in sorted(SPACES.glob("*.yaml"))}


def space_name(name_or_path: str) -> str:
    """What a sweep of a space is called after it: the space's name, or its file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name_or_path).stem)


def load_space(name_or_path: str | Path, recipe: Recipe, search: Mapping[str, Any] | None = None) -> Space:
    """A shipped space by name, or a YAML file, checked against the recipe to vary; InputError where wrong.

    search: dotted keys of the space's `search`, and what they are set to.
    """
    known = shipped_spaces()
    path = known.get(str(name_or_path), Path(name_or_path))
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        there = ", ".join(known)
        raise InputError(f"space {name_or_path}: {error.strerror or error}; the shipped ones are {there}") from None
    except yaml.YAMLError as error:
        raise InputError(f"space {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise InputError(f"space {path}: write `axes:` with the keys to vary")
    if isinstance(axes := document.get("axes"), dict):  # one by one, for errors that name the place
        made = {str(name): checked(Axis, axis, where=f"space {path.stem}: axes.{name}") for name, axis in axes.items()}
        document = {**document, "axes": made}
    for key, value in (search or {}).items():
        set_key(document, key, value)
    space = checked(Space, document, where=f"space {path.stem}")
    try:
        space.check(recipe)
    except InputError as error:
        raise InputError(f"space {path.stem}: {error}") from None
    return space


def _listed(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else [wanted]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
