"""The paper's own points, for sweeps whose recipe is that of one of its tables."""

from __future__ import annotations

from dataclasses import dataclass

from arae.config import Recipe
from arae.errors import InputError
from benchmarks.tables.definition import Column, Definition, Row, definitions, trips
from tune.map.table import MapTable, Measure


@dataclass(frozen=True)
class Paper:
    """A table of the paper that varies the training radius on the sweep's data, network and norm."""

    table: str
    source: str
    definition: Definition
    radii: dict[str, float]
    """Training radius of each row, by the row's key."""
    differs: tuple[str, ...]
    """In what the sweep departs from the paper's recipe."""

    def points(self, measure: Measure) -> list[tuple[float, float]]:
        """(training radius, the paper's value) of each row that has one; accuracies are fractions.

        Robust accuracy counts where the paper attacked at the measure's own norm and radius.
        """
        found = list[tuple[float, float]]()
        for name, column in self.definition.columns.items():
            if column.metric != measure.metric or column.protocol not in ("reconstruction", "classification"):
                continue
            for key, row in self.definition.rows.items():
                if name in row.paper and key in self.radii and _same_attack(row, column, measure):
                    value = row.paper[name]
                    mean = value[0] if isinstance(value, tuple) else value
                    found.append((self.radii[key], mean / 100 if measure.unit == "fraction" else mean))
        return sorted(found)


def paper_of(table: MapTable) -> Paper | None:
    """The paper's table with the sweep's data set, encoder, layer and norm, and one row a training radius."""
    if not table.groups:
        return None
    trial = table.groups[-1].trials[0]
    norms = {group.norm for group in table.groups if group.norm}
    layers = {record.model.layer for record in trial.records if record.model.decoder}
    for definition in definitions():
        recipes = _recipes(definition)
        radii = {key: recipe.encoder.attack.eps for key, recipe in recipes.items()}
        if len(radii) < 3 or len(set(radii.values())) < len(radii):
            continue  # a table of something else
        theirs = next(recipe for recipe in recipes.values() if recipe.encoder.attack.eps)
        if not _same_subject(trial.recipe, theirs) or norms != {theirs.encoder.attack.norm}:
            continue
        if layers and layers != {theirs.encoder.layer}:
            continue
        return Paper(definition.id, definition.source, definition, radii, tuple(_differs(trial.recipe, theirs)))
    return None


def _recipes(definition: Definition) -> dict[str, Recipe]:
    """What each row with a run is trained by, at the paper's size; empty where the table is not run at all."""
    try:
        made = {trip.key: trip.recipe for trip in trips(definition, "full")}
    except InputError:
        return {}
    return {key: made[row.run] for key, row in definition.rows.items() if row.run and row.protocol is None}


def _same_subject(ours: Recipe, theirs: Recipe) -> bool:
    return (ours.data.name, ours.encoder.name) == (theirs.data.name, theirs.encoder.name)


def _same_attack(row: Row, column: Column, measure: Measure) -> bool:
    if measure.metric != "robust_accuracy":
        return True
    return measure.eps is not None and (column.norm, row.eps) == (measure.norm, measure.eps)


def _differs(ours: Recipe, theirs: Recipe) -> list[str]:
    """What makes the figures hard to compare, in words."""
    said = list[str]()
    if ours.encoder.width != theirs.encoder.width:
        said.append(f"its encoder has {ours.encoder.width:g} of the width")
    if (ours.encoder.epochs, ours.encoder.steps) != (theirs.encoder.epochs, theirs.encoder.steps):
        said.append("its encoder is trained for another time")
    if ours.decoder is not None and theirs.decoder is not None:
        mine, paper = ours.decoder, theirs.decoder
        if (mine.epochs, mine.steps) != (paper.epochs, paper.steps):
            said.append("its decoder is trained for another time")
        if mine.name != paper.name:
            said.append(f"its decoder is {mine.name}, not {paper.name}")
    if ours.data.limit != theirs.data.limit:
        said.append("it trains on other images")
    return said
