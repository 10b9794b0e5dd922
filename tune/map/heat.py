"""Quality by training radius and loss weight, as cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arae.report.figures import INK
from arae.report.table import number_text, radius_text
from tune.map.draw import Hover, LeftOut, Picture, new_figure, written
from tune.map.marks import told
from tune.map.table import Group, MapTable, Measure, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Radius and loss weight"
MOST = 12
"""Columns that are still readable."""


@dataclass(frozen=True)
class Cells:
    """Points by row and column."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    across: str
    """What the columns are."""
    down: str
    points: dict[tuple[str, str], Group]


def draw_heat(table: MapTable) -> Picture:
    """One panel a measure of quality; or the sentence that says why there is nothing to draw."""
    cells = _cells(table)
    if not isinstance(cells, Cells) or not table.quality:
        return LeftOut("heat", TITLE, cells if isinstance(cells, str) else "no reconstructions were measured")
    wide = 3 if len(cells.columns) <= 4 else 2 if len(cells.columns) <= 7 else 1
    columns = min(wide, len(table.quality))
    down = -(-len(table.quality) // columns)
    long = max(map(len, cells.columns)) > 7
    height = down * (0.35 + 0.26 * len(cells.rows)) + (0.75 if long else 0.35)
    figure = new_figure(height, _width(cells, columns))
    hover = Hover()
    grid = figure.subplots(down, columns, squeeze=False)
    for i, axes in enumerate(grid.ravel()):
        if i < len(table.quality):
            _panel(axes, table.quality[i], cells, hover, slanted=long)
            axes.set_ylabel(cells.down if i % columns == 0 else "")
            if i + columns < len(table.quality):  # the panel below says the same
                axes.set_xlabel("")
                axes.tick_params(axis="x", labelbottom=False)
        else:
            axes.set_visible(False)
    caption = (
        f"{listed(m.label for m in table.quality)} by {cells.down} and {cells.across}; the lighter, the better. "
        "Each cell is the mean over its seeds; hatched cells have no finished trial."
    )
    return written("heat", TITLE, caption, figure, hover)


def _width(cells: Cells, columns: int) -> float:
    return min(7.0, columns * (0.75 + 0.72 * len(cells.columns)))


def _cells(table: MapTable) -> Cells | str:
    """The points by radius and the other axes or, with one radius, by two other axes; or why that can't be."""
    if not table.groups:
        return "no trial is finished"
    if not all(line.joined for line in table.lines):
        return "weights were drawn from a range, so that no two points share them; the table has every point"
    if len(table.radii) > 1:
        if len(table.lines) < 2:
            return "nothing but the training radius was varied; the curves show it"
        points = {(radius_text(g.eps), line.label): g for line in table.lines for g in line.groups}
        names = {name for group in table.groups for name, _ in group.line}
        rows, across = tuple(radius_text(eps) for eps in reversed(table.radii)), _axes_named(names)
        columns, down = tuple(line.label for line in table.lines), "training radius ε"
        short = {line.label: line.values for line in table.lines}
        if len(set(short.values())) < len(short):  # lines that differ in their norm alone
            short = {label: label for label in short}
    else:
        names = {name for group in table.groups for name, _ in group.line}
        if len(names) != 2 or any(len(group.line) != 2 for group in table.groups):
            return "all finished trials were trained at one radius, and not just two other axes were varied"
        points = {(group.line[0][1], group.line[1][1]): group for group in table.groups}
        (first, _), (second, _) = table.groups[0].line
        rows, columns = (tuple(dict.fromkeys(key[i] for key in points)) for i in (0, 1))
        down, across = first.rpartition(".")[2], second.rpartition(".")[2]
        short = {column: column for column in columns}
    if len(columns) > MOST:
        return f"{len(columns)} combinations of the other axes are more than cells can show; the table has them"
    return Cells(rows, tuple(short.values()), across, down, {(r, short[c]): g for (r, c), g in points.items()})


def _axes_named(names: set[str]) -> str:
    return listed(sorted(name.rpartition(".")[2] for name in names)) if names else "norm"


def _panel(axes: Axes, measure: Measure, cells: Cells, hover: Hover, *, slanted: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    found = {place: cell for place, group in cells.points.items() if (cell := group.cell(measure))}
    values = [cell.value for cell in found.values()]
    low, high = min(values), max(values)
    shades = colormaps["viridis" if measure.sign > 0 else "viridis_r"]
    for i, row in enumerate(cells.rows):
        for j, column in enumerate(cells.columns):
            group, cell = cells.points.get((row, column)), found.get((row, column))
            if group is None or cell is None:
                axes.add_patch(Rectangle((j, i), 1, 1, facecolor="#f2f2f2", edgecolor="#c8c8c8", hatch="////", lw=0.5))
                continue
            colour = shades((cell.value - low) / (high - low) if high > low else 0.5)
            patch = Rectangle((j, i), 1, 1, facecolor=colour, edgecolor="white", lw=0.8)
            axes.add_patch(patch)
            hover.add(patch, told(group, (measure, cell)))
            light = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] > 0.45
            axes.text(j + 0.5, i + 0.5, number_text(cell.value, measure.unit), ha="center", va="center", fontsize=7,
                      color=INK if light else "white")  # fmt: skip
    axes.set_xlim(0, len(cells.columns))
    axes.set_ylim(len(cells.rows), 0)
    axes.set_xticks([j + 0.5 for j in range(len(cells.columns))], cells.columns)
    axes.set_yticks([i + 0.5 for i in range(len(cells.rows))], cells.rows)
    if slanted:
        axes.tick_params(axis="x", rotation=25)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(cells.across)
    axes.set_title(f"{measure.label}{' (dB)' if measure.unit == 'dB' else ''}", loc="left")
