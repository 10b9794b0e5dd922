"""Points and lines of figures: how they are told apart, and what they say where they are hovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from arae.report.figures import COLOURS, DASHES, INK, MARKERS
from arae.report.table import NORMS, radius_text
from tune.map.draw import Named
from tune.map.table import Cell, Group, Line, MapTable, Measure, Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 6
"""Entries in a row of a legend."""
_MARK: dict[str, Any] = {"markersize": 5.5, "elinewidth": 0.7, "capsize": 1.8, "capthick": 0.7}


@dataclass(frozen=True)
class Look:
    """How points are told apart: by colour and marker at once, of radii and lines or, with many lines, of radii."""

    table: MapTable

    @property
    def by_radius(self) -> bool:
        """Whether colours stand for training radii."""
        return len(self.table.radii) > 1

    @property
    def numbered(self) -> bool:
        """Whether there are more lines than markers, so that points bear their numbers."""
        return len(self.table.lines) > len(MARKERS)

    def colour(self, group: Group) -> Any:
        """Of a point."""
        if not self.by_radius:
            return COLOURS[self._line(group) % len(COLOURS)] if not self.numbered else COLOURS[0]
        return self.shade(group.eps)

    def shade(self, eps: float) -> Any:
        """Of a training radius: from dark to light, in colours that all can tell apart."""
        from matplotlib import colormaps

        places = np.linspace(0.0, 0.85, len(self.table.radii))
        return colormaps["viridis"](places[self.table.radii.index(eps)])

    def marker(self, group: Group) -> str:
        """Of a point."""
        return "o" if self.numbered else MARKERS[self._line(group)]

    def _line(self, group: Group) -> int:
        return next(i for i, line in enumerate(self.table.lines) if group in line.groups)

    def handles(self) -> tuple[list[Any], int]:
        """A legend's entries and columns: radii, lines, what filled and hollow points are, each in rows of their own.

        A legend is filled column by column: short rows are filled up.
        """
        from matplotlib.lines import Line2D

        rows = [part[i : i + ACROSS] for part in self._parts() for i in range(0, len(part), ACROSS)]
        empty = Line2D([], [], linestyle="none", label=" ")
        return [one for column in zip_longest(*rows, fillvalue=empty) for one in column], max(map(len, rows))

    def _parts(self) -> list[list[Any]]:
        from matplotlib.lines import Line2D

        def dot(label: str, **how: Any) -> Line2D:
            return Line2D([], [], linestyle="none", markersize=5.5, label=label, **how)

        radii, lines = list[Line2D](), list[Line2D]()
        if self.by_radius:
            radii = [dot(f"ε = {radius_text(e)}", marker="o", color=self.shade(e)) for e in self.table.radii]
        if len(self.table.lines) > 1 and not self.numbered:
            for i, line in enumerate(self.table.lines):
                colour = "#777777" if self.by_radius else COLOURS[i]
                lines.append(dot(line.label, marker=MARKERS[i], color=colour))
        places = [
            dot("on the front", marker="o", color="#bbbbbb", markeredgecolor=INK, markeredgewidth=1.1),
            dot("not told from it", marker="o", color="#bbbbbb", markeredgecolor="#bbbbbb"),
            dot("below it", marker="o", color="#888888", markerfacecolor="white"),
        ]
        return [radii, lines, places]


def mark(
    axes: Axes, look: Look, group: Group, pair: tuple[Cell, Cell], standing: Standing, scale: float
) -> list[Named]:
    """One point with its intervals, by its place among the others; returns all that can be hovered."""
    x, y = pair
    colour = look.colour(group)
    face, edge = colour, colour
    if group.number in standing.front:
        edge = INK
    elif group.number not in standing.near:
        face = "white"
    best = group.number in standing.front
    drawn = axes.errorbar(
        [scale * x.value], [y.value], xerr=error(x, scale), yerr=error(y), marker=look.marker(group), color=colour,
        markerfacecolor=face, markeredgecolor=edge, markeredgewidth=1.1, linestyle="none", zorder=5 if best else 3,
        **_MARK,
    )  # fmt: skip
    return [artist for part in drawn.lines if part for artist in (part if isinstance(part, tuple) else (part,))]


def error(cell: Cell, scale: float = 1.0) -> np.ndarray:
    """[[below], [above]] of the interval."""
    return scale * np.array([[max(cell.value - cell.low, 0)], [max(cell.high - cell.value, 0)]])


def told(group: Group, *named: tuple[Measure, Cell]) -> str:
    """What hovering a point shows: what it is, its values, its trials and their records."""
    lines = [f"point {group.number}: {group.label}"]
    for measure, cell in named:
        lines.append(f"{measure.label}: {with_interval(measure, cell)}")
        lines += [f"  {source.text}" for source in cell.sources]
        if not cell.sources:
            lines.append(f"  trials.jsonl, {', '.join(trial.id for trial in group.trials)}")
    return "\n".join(lines)


def with_interval(measure: Measure, cell: Cell) -> str:
    """`62.1 % (59.8 … 64.4 %)`."""
    if cell.low == cell.high:
        return measure.text(cell.value)
    low = measure.text(cell.low).removesuffix(" %").removesuffix(" dB").removesuffix(" h")
    return f"{measure.text(cell.value)} ({low} … {measure.text(cell.high)})"


def line_style(i: int) -> dict[str, Any]:
    """Colour, marker and dashes of the i-th line of several; they say the same three times."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[(i + i // len(MARKERS)) % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
    }


def radius_at(table: MapTable, group: Group) -> float:
    """Where a point lies on the axis of the training radius: its share of the norm's largest, where norms differ."""
    return group.eps / largest[group.norm] if len(largest := _largest(table)) > 1 and group.norm else group.eps


def radius_axis(axes: Axes, table: MapTable, others: Sequence[float] = ()) -> None:
    """Make the x axis that of the training radius; `others`: radii that are drawn and not the sweep's."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    largest = _largest(table)
    if len(largest) > 1:
        told = ", ".join(f"{NORMS[norm]} {radius_text(eps)}" for norm, eps in largest.items())
        axes.set_xlabel(f"training radius, as a share of the\nlargest ({told})")
        return
    radii = sorted({*table.radii, *others})
    if len(radii) <= 10 and min(np.diff(radii), default=1.0) > 0.07 * (radii[-1] - radii[0]):
        axes.xaxis.set_major_locator(FixedLocator(radii))
        if len(radii) > 7:
            axes.tick_params(axis="x", rotation=45)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: radius_text(x)))
    axes.set_xlabel(f"training radius ε{''.join(f' ({NORMS[norm]})' for norm in largest)}")


def _largest(table: MapTable) -> dict[str, float]:
    """Of each norm the largest training radius."""
    found: dict[str, float] = {}
    for group in table.groups:
        if group.norm:
            found[group.norm] = max(group.eps, found.get(group.norm, 0.0))
    return found


def lines_of(line: Line, measure: Measure) -> list[tuple[Group, Cell]]:
    """The points of a line that have the measure."""
    return [(group, cell) for group in line.groups if (cell := group.cell(measure))]
