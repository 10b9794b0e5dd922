"""What a table is: its runs at each scale, where each cell's number comes from, the paper's figures, its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from arae.config import Norm, Part, Radius, Recipe, load_recipe
from arae.config.document import checked, parse_override
from arae.errors import InputError
from arae.train.networks import RUN

FOLDER = Path(__file__).resolve().parent / "definitions"
PARAMETERS = "decoder_parameters"
"""The one metric that is counted from the recipe, in millions, and not read from a record."""

ScaleName = Literal["full", "small"]
SCALES: tuple[ScaleName, ...] = ("full", "small")


class Column(Part):
    """One measurement of a table; accuracies are in per cent."""

    label: str
    metric: str
    protocol: str = "reconstruction"
    """The records' protocol; a row may have its own."""
    attack: str | None = None
    """The attack's kind, for what is measured under attack: `pgd`, `autoattack`, …"""
    norm: Norm | None = None


class Row(Part):
    """One model, or one condition of it."""

    label: str
    run: str | None = None
    """Key of `Scale.runs`."""
    protocol: str | None = None
    """In place of the columns' own, where these measure reconstruction."""
    eps: Radius | None = None
    """Radius of the attacks, for images in [0, 1]; default: that of the scale."""
    paper: dict[str, float | tuple[float, float]] = Field(default_factory=dict)
    """For each column the paper's value, or its mean and standard deviation over images."""


class Claim(Part):
    """An order of rows in one column that the paper's table or text asserts."""

    column: str
    order: tuple[str, ...] = Field(min_length=2)
    """Keys of rows, from the worst to the best."""


class Evaluation(Part):
    """One evaluation of some of the runs."""

    runs: tuple[str, ...] | None = None
    """Keys of runs; default: all that the rows name."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted recipe keys."""


class Scale(Part):
    """What is trained and measured at one scale."""

    says: str
    """For people: networks, widths, images, epochs."""
    recipe: str | None = None
    """The shipped recipe that every run starts from; default: that of `runs_of`."""
    prefix: str | None = None
    """A run's folder is `<runs>/tables/<scale>/<prefix>-<key>`; default: that of `runs_of`."""
    runs_of: str | None = None
    """Another table, whose runs at this scale are shared."""
    runs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """For each run the recipe's dotted keys that make it; the value `run:KEY` is the folder of another run."""
    names: dict[str, str] = Field(default_factory=dict)
    """What stands in place of a run's key in its folder's name: one run may serve tables that name it otherwise."""
    evaluations: tuple[Evaluation, ...] = Field(min_length=1)
    eps: Radius | None = None
    """Radius of the attacks, for rows without their own."""
    images: dict[str, int] = Field(default_factory=dict)
    """What the catalogue does not count: `train`, `test`, `classes`; `files`: images of `evaluate.images`."""

    @model_validator(mode="after")
    def _made_from_something(self) -> Self:
        if self.runs_of is None and (self.recipe is None or self.prefix is None):
            raise ValueError("give recipe and prefix, or runs_of")
        return self


class Definition(Part):
    """One table of the paper."""

    id: str
    title: str
    source: str
    """Paper and table."""
    dataset: str
    """As the paper has it."""
    needs: str | None = None
    """What must be built before it can be run."""
    notes: tuple[str, ...] = ()
    """Misprints and open points that a reader of the figures should know."""
    columns: dict[str, Column]
    rows: dict[str, Row]
    claims: tuple[Claim, ...] = ()
    full: Scale | None = None
    small: Scale | None = None

    @model_validator(mode="after")
    def _names_that_are_there(self) -> Self:
        for row in self.rows.values():
            _known(row.paper, self.columns, "paper")
        for claim in self.claims:
            _known([claim.column], self.columns, "claims")
            _known(claim.order, self.rows, "claims")
        return self

    def scale(self, name: ScaleName) -> Scale:
        """What is run at that scale; InputError where the table is not defined there."""
        found = self.full if name == "full" else self.small
        if found is None:
            there = [each for each in SCALES if getattr(self, each) is not None]
            needs = (
                f"it needs {self.needs}, which is not built yet" if self.needs else "it holds the paper's figures only"
            )
            mend = f"there is --scale {there[0]}" if there else needs
            raise InputError(f"{self.id} has no {name} scale: {mend}")
        return found

    @property
    def used(self) -> tuple[str, ...]:
        """Keys of the runs that the rows name, in their order."""
        return tuple(dict.fromkeys(row.run for row in self.rows.values() if row.run))


@dataclass(frozen=True)
class Trip:
    """One run of a table: what is trained, and how it is measured."""

    key: str
    """Its key in the definition."""
    recipe: Recipe
    evaluations: tuple[Recipe, ...]

    @property
    def name(self) -> str:
        """Name of its folder, and of its file of records."""
        return self.recipe.name.rpartition("/")[2]


def _known(names: Sequence[str] | Mapping[str, Any], there: Mapping[str, Any], where: str) -> None:
    for name in names:
        if name not in there:
            raise ValueError(f"{where}: {name!r} is none of {', '.join(there)}")


@cache
def load(path: Path) -> Definition:
    """The definition in a YAML file; InputError names the file and the key."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: no definition of a table ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: a definition is a mapping of keys, not {type(document).__name__}")
    return checked(Definition, document, where=str(path))


def find(table: str) -> Definition:
    """A table by id, or by the path of a definition of one's own; InputError lists those there are."""
    for path in (FOLDER / f"{table}.yaml", Path(table)):
        if path.suffix == ".yaml" and path.is_file():
            return load(path)
    raise InputError(f"no table {table!r}; there are {', '.join(d.id for d in definitions())}")


def definitions() -> list[Definition]:
    """Every table that comes with arae: the paper's own first, then its appendix's, by number."""
    found = [load(path) for path in FOLDER.glob("*.yaml")]
    return sorted(found, key=lambda d: (d.id.rstrip("0123456789"), int(d.id.removeprefix(d.id.rstrip("0123456789")))))


def trips(definition: Definition, scale: ScaleName, overrides: Sequence[str] = ()) -> list[Trip]:
    """The runs of a table that its rows name; `overrides` (`dotted.key=value`) hold for all of them.

    InputError: the scale, a run or a recipe is not there; a key or value that a recipe can't have.
    """
    given = dict(parse_override(text) for text in overrides)
    for key in ("name", "scale", "map", "base"):
        if key in given:
            raise InputError(f"override {key}: a table's runs have their own; leave it out")
    chosen, made = definition.scale(scale), list[Trip]()
    for key in definition.used:
        recipe = _recipe(definition, scale, key).replace(given)
        wanted = [e.set for e in chosen.evaluations if e.runs is None or key in e.runs]
        made.append(Trip(key, recipe, tuple(recipe.replace(each | given) for each in wanted)))
    return made


def _recipe(definition: Definition, scale: ScaleName, key: str) -> Recipe:
    """The recipe of one run, from the definition or from the one whose runs it shares."""
    chosen = definition.scale(scale)
    parent = find(chosen.runs_of) if chosen.runs_of else None
    if key not in chosen.runs:
        if parent is None:
            raise InputError(f"{definition.id}: no run {key!r} at --scale {scale}; there are {', '.join(chosen.runs)}")
        return _recipe(parent, scale, key)
    above = parent.scale(scale) if parent else chosen
    base, prefix = chosen.recipe or above.recipe, chosen.prefix or above.prefix
    if base is None:
        raise InputError(f"{definition.id}: no recipe at --scale {scale}")
    named = {"name": f"tables/{scale}/{prefix}-{chosen.names.get(key, key)}", "scale": scale, "map": None}
    made = {what: _placed(definition, scale, value) for what, value in chosen.runs[key].items()}
    return load_recipe(base).replace(made | named)


def _placed(definition: Definition, scale: ScaleName, value: object) -> object:
    """A run's key as its name, which holds wherever the runs lie."""
    if not isinstance(value, str) or not value.startswith(RUN):
        return value
    return RUN + _recipe(definition, scale, value.removeprefix(RUN)).name
