"""The map itself: robust accuracy at each evaluation radius against the quality of the reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from arae.report.figures import INK
from arae.report.table import NORMS, radius_text
from tune.map.draw import Drawn, Hover, LeftOut, Picture, new_figure, written
from tune.map.marks import Look, mark, told
from tune.map.table import MapTable, Measure, Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 4
"""Evaluation radii on one figure; more go to `map-2` and so on."""
TITLE = "Robustness against reconstruction"


def draw_map(table: MapTable) -> list[Picture]:
    """One row of panels an evaluation radius, one column a measure of quality."""
    if not table.threats or not table.quality:
        what = "no robust accuracy was measured" if not table.threats else "no reconstructions were measured"
        return [LeftOut("map", TITLE, f"{what} in any finished trial")]
    starts = range(0, len(table.threats), ROWS)
    parts = [table.threats[i : i + ROWS] for i in starts]
    return [_part(table, threats, i, len(parts)) for i, threats in enumerate(parts, 1)]


def _part(table: MapTable, threats: Sequence[Measure], number: int, of: int) -> Drawn:
    figure, hover, look = new_figure(0.85 + 1.95 * len(threats)), Hover(), Look(table)
    grid = figure.subplots(len(threats), len(table.quality), squeeze=False, sharex="row", sharey="col")
    for i, threat in enumerate(threats):
        for j, quality in enumerate(table.quality):
            _panel(grid[i][j], table, (threat, quality), look, hover)
            grid[i][j].set_xlabel(
                f"robust accuracy at {NORMS[threat.norm or 'l2']} ε = {radius_text(threat.eps or 0)} (%)"
            )
    handles, columns = look.handles()
    how: dict[str, Any] = {"frameon": False, "columnspacing": 1.2, "handletextpad": 0.3}
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, **how)
    name = "map" if number == 1 else f"map-{number}"
    attacks = "; ".join(dict.fromkeys(table.attack(threat) for threat in threats))
    caption = (
        f"Robust accuracy ({attacks}) against {_and(table.quality)} of the reconstructions of clean images; up and to "
        "the right is better"
        + (" (the axis of LPIPS, of which less is better, is turned round)" if _has_lpips(table) else "")
        + f". One point a place of the space{', its colour the training radius' if look.by_radius else ''}. Bars: "
        f"{bars(table)}. The grey line is the Pareto front of the panel's two values, of the points with a dark edge; "
        "filled points without one are not told from it, for their intervals reach it; hollow ones are below it."
        + (" Numbers are those of the table; (+n) are n more points in the same place." if look.numbered else "")
        + (f" Figure {number} of {of}." if of > 1 else "")
    )
    return written(name, TITLE, caption, figure, hover)


def _panel(axes: Axes, table: MapTable, pair: tuple[Measure, Measure], look: Look, hover: Hover) -> None:
    threat, quality = pair
    standing = Standing.of(table.groups, pair)
    corners = list[tuple[float, float]]()
    found = [(g, x, y) for g in table.groups if (x := g.cell(threat)) and (y := g.cell(quality))]
    for group, x, y in found:
        for artist in mark(axes, look, group, (x, y), standing, 100):
            hover.add(artist, told(group, (threat, x), (quality, y)))
        if group.number in standing.front:
            corners.append((100 * x.value, y.value))
    if quality.sign < 0 and not axes.yaxis_inverted():
        axes.invert_yaxis()
    ordered = sorted(corners, key=lambda c: (c[0], -quality.sign * c[1]))
    xs, ys = zip(*ordered, strict=True) if ordered else ((), ())
    # What the front attains: from one point on, as good as the next one.
    axes.step(xs, ys, where="pre", color="#8a8a8a", linewidth=0.9, zorder=2)
    axes.margins(0.1)
    if look.numbered:
        _numbers(axes, [(g.number, 100 * x.value, y.value) for g, x, y in found if g.number in standing.front])
    unit = {"dB": " (dB)"}.get(quality.unit, "")
    axes.set_ylabel(f"{quality.label}{unit}{', less is better' if quality.sign < 0 else ''}", color=INK)


def _numbers(axes: Axes, points: Sequence[tuple[int, float, float]]) -> None:
    """Write points' numbers beside them, those of points that lie on one another together."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    near: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
    for number, x, y in points:
        place = (round(16 * (x - left) / (right - left)), round(16 * (y - low) / (high - low)))
        near.setdefault(place, []).append((number, x, y))
    for together in near.values():
        text = f"{together[0][0]}" + (f" (+{len(together) - 1})" if len(together) > 1 else "")
        axes.annotate(text, together[0][1:], (-4, 4), textcoords="offset points", ha="right", fontsize=7)


def bars(table: MapTable) -> str:
    """What the bars of a figure are, in words."""
    if any(len(group.trials) > 1 for group in table.groups):
        return "from the lowest to the highest end of the seeds’ 95 % intervals, around the mean over seeds"
    return "95 % intervals"


def _has_lpips(table: MapTable) -> bool:
    return any(measure.sign < 0 for measure in table.quality)


def _and(measures: Sequence[Measure]) -> str:
    from tune.map.table import listed

    return listed(measure.label for measure in measures)
