"""Quality and accuracy against the training radius, a line a set of losses: the shape of the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from arae.report.figures import INK
from tune.map.draw import SOFT, Hover, LeftOut, Picture, new_figure, written
from tune.map.marks import error, line_style, lines_of, radius_at, radius_axis, told
from tune.map.paper import Paper
from tune.map.plane import bars
from tune.map.table import Cell, Group, MapTable, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Quality against training radius"
MOST = 9
"""Panels; of more evaluation radii than fit, those in the middle are left to the table."""

Curve = tuple[str, bool, list[tuple[Group, Cell]]]
"""What the legend calls it, whether its points are joined, the points."""


def draw_curves(table: MapTable, paper: Paper | None) -> Picture:
    """One panel a measure."""
    if len(table.radii) < 2:
        why = "all finished trials were trained at one radius" if table.groups else "no trial is finished"
        return LeftOut("curves", TITLE, why)
    shown = _shown(table)
    if not shown:
        return LeftOut("curves", TITLE, "nothing but hours was measured in the finished trials")
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, hover = new_figure(0.6 + 1.85 * rows), Hover()
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, measure in zip(grid, shown, strict=False):
        handles |= _panel(axes, table, measure, paper, hover)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    if len(handles) > 1:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(len(handles), 4),
                      frameon=False)  # fmt: skip
    return written("curves", TITLE, _caption(table, paper, shown), figure, hover)


def _panel(axes: Axes, table: MapTable, measure: Measure, paper: Paper | None, hover: Hover) -> dict[str, Any]:
    """Draw one measure; returns what the legend calls its lines."""
    scale = 100 if measure.unit == "fraction" else 1
    handles: dict[str, Any] = {}
    points = paper.points(measure) if paper else []
    if paper and points:
        (line,) = axes.plot([e for e, _ in points], [scale * v for _, v in points], color=SOFT, marker="*", zorder=1,
                            markersize=6, linewidth=0.9, linestyle=(0, (1, 1)))  # fmt: skip
        hover.add(
            line, f"{paper.source} ({paper.table})\n" + "\n".join(f"ε = {e:g}: {measure.text(v)}" for e, v in points)
        )
        handles[f"the paper ({paper.table})"] = line
    for i, (label, joined, found) in enumerate(_curves(table, measure)):
        how = line_style(i) if label != SHARED else line_style(0) | {"color": INK, "marker": "o"}
        xs, ys = [radius_at(table, group) for group, _ in found], [scale * cell.value for _, cell in found]
        axes.plot(xs, ys, color=how["color"], linestyle=how["linestyle"] if joined else "none", zorder=2)
        dots = {"color": how["color"], "marker": how["marker"], "markersize": 4, "elinewidth": 0.8, "capsize": 2}
        for x, y, (group, cell) in zip(xs, ys, found, strict=True):
            drawn = axes.errorbar([x], [y], yerr=error(cell, scale), zorder=3, **dots)
            for part in (drawn.lines[0], *drawn.lines[1], *drawn.lines[2]):
                if part is not None:
                    hover.add(part, told(group, (measure, cell)))
        handles[label or "this sweep"] = _handle(how, joined=joined)
    radius_axis(axes, table, [eps for eps, _ in points])
    axes.margins(x=0.07, y=0.1)
    unit = {"fraction": " (%)", "dB": " (dB)"}.get(measure.unit, "")
    axes.set_title(f"{measure.label}{unit}{' ↓' if measure.sign < 0 else ' ↑'}", loc="left")
    return handles


SHARED = "the same for all lines"


def _curves(table: MapTable, measure: Measure) -> list[Curve]:
    """The lines that have the measure; one in place of all where they show the same encoders."""
    found = [(line.label, line.joined, points) for line in table.lines if (points := lines_of(line, measure))]
    values = [[(group.eps, group.norm, cell.value) for group, cell in points] for *_, points in found]
    if len(found) > 1 and measure.metric.endswith("accuracy") and all(each == values[0] for each in values):
        return [(SHARED, found[0][1], found[0][2])]
    return found


def _handle(how: dict[str, Any], *, joined: bool) -> Any:
    from matplotlib.lines import Line2D

    shown: dict[str, Any] = how if joined else {**how, "linestyle": "none"}
    return Line2D([], [], markersize=4, **shown)


def _shown(table: MapTable) -> list[Measure]:
    """Quality, clean accuracy, robust accuracy from the smallest evaluation radius to the largest."""
    clean = [m for m in table.measures if m.metric == "clean_accuracy" and table.having(m)]
    room = MOST - len(table.quality) - len(clean)
    threats = table.threats if len(table.threats) <= room else (*table.threats[: room - 1], table.threats[-1])
    return [*table.quality, *clean, *threats]


def _caption(table: MapTable, paper: Paper | None, shown: Sequence[Measure]) -> str:
    said = "Each measure against the radius of the training attack"
    said += ", a line for each combination of the other axes" if len(table.lines) > 1 else ""
    said += f". Bars: {bars(table)}. ↑ more is better, ↓ less is better."
    if any(m.metric == "robust_accuracy" for m in shown):
        said += " Encoders are shared by all that differ in their decoder alone; one line then stands for all."
    if paper is None:
        return said
    said += f" Grey: {paper.source}"
    if not any(paper.points(m) for m in shown if m.eps is not None):
        said += " (its robust accuracies are at other radii than those measured here, and are not drawn)"
    if table.small or paper.differs:
        why = ["the sweep is small (scale: small)"] * table.small + list(paper.differs)
        said += f"; its figures are not to be compared with these: {', '.join(why)}"
    return f"{said}."
