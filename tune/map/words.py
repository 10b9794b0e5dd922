"""What a sweep's numbers say, in sentences: no claim goes beyond the intervals."""

from __future__ import annotations

from collections.abc import Sequence

from arae.report.table import radius_text
from tune.map.cost import growth, unit_of
from tune.map.marks import lines_of, with_interval
from tune.map.table import Cell, Group, Line, MapTable, Measure, listed
from tune.results import Sweep

LINES = 6
"""Lines of which something is said apiece; of more, the figures say it."""


def sentences(table: MapTable) -> list[str]:
    """What one sees on the map, worked out from its points."""
    said = [_subject(table), *_front(table)]
    if len(table.radii) > 1 and len(table.lines) <= LINES:
        said += [_radius(table, line) for line in table.lines]
    return [sentence for sentence in [*said, _growth(table), *reuse(table.sweep)] if sentence]


def reuse(sweep: Sweep) -> list[str]:
    """What was shared among trials, and what it saved."""
    spent = sweep.spent
    shared = [
        f"{spent.needed[kind]} trials needed {'an' if kind == 'encoder' else 'a'} {kind}, for which "
        f"{_were(spent.stages[kind])} trained"
        for kind in spent.needed
    ]
    if not shared:
        return []
    begun = _capital("; ".join(shared))
    paid, saved = spent.device_hours, spent.saved_hours
    if saved <= 0:
        return [f"{begun}. Nothing could be shared: the stages took {hours_text(paid)} of a device."]
    share = saved / (paid + saved)
    return [
        f"{begun}. Each was trained and measured once, which took {hours_text(paid)} of a device; "
        f"alone, the trials would have taken {hours_text(paid + saved)}: sharing saved {hours_text(saved)} "
        f"({100 * share:.0f} %)."
    ]


def hours_text(hours: float) -> str:
    """`12.3 hours`, `4.5 minutes`, `6.0 seconds`."""
    unit, factor = unit_of(hours)
    return f"{hours * factor:.3g} {unit}"


def place_of(group: Group, table: MapTable) -> str:
    """`on the front, its knee`, `not told from the front`, `below the front`, and `` without a front."""
    standing = table.standing
    if group.number in standing.front:
        return "on the front, its knee" if group.number == standing.knee else "on the front"
    if group.number in standing.near:
        return "not told from the front"
    return "below the front" if group in table.having(*table.objectives) and table.objectives else ""


def left_objectives(table: MapTable) -> list[str]:
    """Objectives of the sweep that no finished trial has, with the reason."""
    missing = [m for m in map(Measure, table.sweep.space.search.objectives) if m not in table.objectives]
    first = table.groups[:1]
    return [f"{m.label} ({group.reason(m)})" for m in missing for group in first]


def _subject(table: MapTable) -> str:
    states = [trial.entry.state for trial in table.sweep.trials]
    parts = [f"{states.count('finished')} finished"]
    parts += [f"{states.count('stopped')} cut short"] * ("stopped" in states)
    parts += [f"{states.count('failed')} failed"] * ("failed" in states)
    parts += [f"{states.count(None)} not at their end"] * (None in states)
    seeds = sorted({len(group.trials) for group in table.groups})
    merged = ""
    if seeds and seeds[-1] > 1:
        over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        merged = f" They are {len(table.groups)} points over {over} seeds each."
    return f"Of {len(states)} trial{'s' * (len(states) != 1)} {listed(parts)}.{merged}"


def _front(table: MapTable) -> list[str]:
    """Which points are on the front, which are not told from it, and the knee."""
    standing, measures = table.standing, table.objectives
    if not standing.front:
        return ["There is no front: no point has all of the sweep’s objectives."] if table.groups else []
    what = listed(_objective(table, m) for m in measures)
    best = _points(table, standing.front)
    several = len(standing.front) > 1
    said = [f"On the front of {what} {'are' if several else 'is'} {best}."]
    if standing.near:
        said.append(
            f"Not told from it, for {'their intervals reach' if len(standing.near) > 1 else 'its intervals reach'} it: "
            f"{_points(table, standing.near)}."
        )
    if standing.knee is not None:
        group = next(g for g in table.groups if g.number == standing.knee)
        values = [(m, cell) for m in measures if (cell := group.cell(m))]
        told = listed(f"{m.label} {with_interval(m, cell)}" for m, cell in values)
        said.append(f"Its knee, where more of one begins to cost much of the others, is {_point(group)}: {told}.")
    elif several:
        said.append("The front has no knee: no point of it lies beyond the line through its ends.")
    if left := left_objectives(table):
        said.append(f"No part in the front has {listed(left)}.")
    return said


def _objective(table: MapTable, measure: Measure) -> str:
    return f"{measure.label} ({table.attack(measure)})" if measure.metric == "robust_accuracy" else measure.label


def _points(table: MapTable, numbers: frozenset[int]) -> str:
    found = [group for group in table.groups if group.number in numbers]
    if len(found) > LINES:
        return f"{len(found)} of {len(table.groups)} points ({', '.join(str(g.number) for g in found)})"
    return listed(map(_point, found))


def _point(group: Group) -> str:
    return f"point {group.number} ({group.label})"


def _radius(table: MapTable, line: Line) -> str:
    """What the radius does to the quality along a line, as far as the intervals carry it."""
    if not line.joined or len(line.groups) < 2:
        return ""
    first, last = (f"ε = {radius_text(group.eps)}" for group in (line.groups[0], line.groups[-1]))
    said = [part for measure in table.quality if (part := _course(line, measure))]
    head = f"With {line.label}, from" if line.label else "From"
    return f"{head} {first} to {last}, {'; '.join(said)}." if said else ""


def _course(line: Line, measure: Measure) -> str:
    """How one measure goes from a line's smallest radius to its largest, and where between them it is best."""
    points = lines_of(line, measure)
    if len(points) < 2 or (points[0][0], points[-1][0]) != (line.groups[0], line.groups[-1]):
        return ""
    (first, a), (last, b) = points[0], points[-1]
    said = f"{measure.label} goes from {measure.text(a.value)} to {measure.text(b.value)}{_caution(a, b)}"
    best, cell = max(points, key=lambda p: measure.sign * p[1].value)
    if best not in (first, last):
        near = [group for group, other in points if group is not best and _overlap(other, cell)]
        rivals = f", which the intervals do not tell from {_radii(near)}" if near else ""
        said += f", and is best at ε = {radius_text(best.eps)} ({measure.text(cell.value)}){rivals}"
    return said


def _radii(groups: Sequence[Group]) -> str:
    return listed(f"ε = {radius_text(group.eps)}" for group in groups)


def _overlap(a: Cell, b: Cell) -> bool:
    return a.low <= b.high and b.low <= a.high


def _caution(a: Cell, b: Cell) -> str:
    return " (their intervals overlap)" if _overlap(a, b) else ""


def _growth(table: MapTable) -> str:
    found = growth(table)
    if len(found) < 2 or found[-1][1] == 0:
        return ""
    last = next(i for i, (_, share, _) in enumerate(found, 1) if share >= found[-1][1] - 1e-12)
    return (
        f"The hypervolume is {100 * found[-1][1]:.1f} %; the last finished trial that added to it was the "
        f"{_ordinal(last)} of {len(found)}."
    )


def _ordinal(n: int) -> str:
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _were(count: int) -> str:
    return f"{count} {'was' if count == 1 else 'were'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
