"""What a table's records say about it, by rules that were fixed before anything was run (`RULES`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from arae.records import Record, Threat
from benchmarks.tables.definition import PARAMETERS, Claim, Column, Definition, Row, Scale, ScaleName, Trip
from benchmarks.tables.planned import planned

RULES = """\
- **Ours** is the mean over the held-out images with its 95 % interval (Wilson's for accuracies). The interval is that
  of the images: each network was trained once, and how much another seed would change is not in it.
- An **ordering** is one pair of cells of which the paper's table or text says that one is better. It *holds* where the
  95 % interval of the difference (Newcombe's, from the two cells' intervals, as if they were of different images, which
  is cautious for the same ones) lies on the paper's side of zero, is *contradicted* where it lies on the other side, is
  *undecided* where it holds zero, and is *not measured* where a cell has no value.
- A **cell** *agrees* with the paper where the paper's mean lies within our interval widened on both sides by the
  metric's tolerance: 1 dB of PSNR, 0.05 of SSIM or LPIPS, 3 points of accuracy, 10 % of a parameter count. The paper
  prints no interval of its means; the ± beside them are deviations over images.
- The table's **verdict** is the first of these that applies:
  1. *not run*: no ordering is measured (parameters are counted, so they say nothing of a run);
  2. *not reproduced*: an ordering is contradicted, or none is decided;
  3. *reproduced*: full scale, every ordering is measured and holds, every cell that the paper prints is measured and
     agrees;
  4. *same direction*: at least one measured ordering holds and none is contradicted. At small scale nothing better can
     be had: other networks, fewer images and a shorter training say nothing about the paper's figures themselves."""


@dataclass(frozen=True)
class Unit:
    """How the paper writes a metric."""

    direction: Literal["higher", "lower"]
    """Which is better."""
    factor: float
    """From the records' unit to the paper's."""
    digits: int
    """Decimals of ours."""
    tolerance: float
    """How far ours may be from the paper's beyond its interval, in the paper's unit; of parameters, as a share."""


UNITS = {
    "psnr": Unit("higher", 1, 2, 1.0),
    "ssim": Unit("higher", 1, 3, 0.05),
    "lpips": Unit("lower", 1, 3, 0.05),
    "clean_accuracy": Unit("higher", 100, 1, 3.0),
    "robust_accuracy": Unit("higher", 100, 1, 3.0),
    PARAMETERS: Unit("lower", 1, 2, 0.1),
}

Verdict = Literal["reproduced", "same direction", "not reproduced", "not run"]
Outcome = Literal["holds", "contradicted", "undecided", "not measured"]


@dataclass(frozen=True)
class Cell:
    """One figure of the paper and ours, in the paper's unit."""

    paper: float | None
    deviation: float | None
    """The paper's, over images."""
    value: float | None
    interval: tuple[float, float] | None
    reason: str = ""
    """Why there is no value."""
    agrees: bool | None = None
    """Within the tolerance; None where either is missing."""


@dataclass(frozen=True)
class Ordering:
    """One pair of rows in one column."""

    column: str
    worse: str
    better: str
    """Keys; `better` as the paper has it."""
    outcome: Outcome


@dataclass(frozen=True)
class Judged:
    """A table as it stands at one scale."""

    definition: Definition
    scale: ScaleName
    cells: dict[tuple[str, str], Cell]
    """By keys of row and column; only cells that the paper prints or that were measured."""
    orderings: tuple[Ordering, ...]
    records: tuple[Record, ...]

    @property
    def verdict(self) -> Verdict:
        """By `RULES`."""
        outcomes = [each.outcome for each in self.orderings]
        run = [each for each in self.orderings if self.definition.columns[each.column].metric != PARAMETERS]
        if all(each.outcome == "not measured" for each in run):
            return "not run"
        if "contradicted" in outcomes or all(each.outcome != "holds" for each in run):
            return "not reproduced"
        printed = [c for c in self.cells.values() if c.paper is not None]
        whole = all(o == "holds" for o in outcomes) and all(c.agrees for c in printed)
        return "reproduced" if self.scale == "full" and whole else "same direction"

    @property
    def said(self) -> str:
        """The verdict with what it rests on."""
        if self.verdict == "not run":
            return self.verdict
        kinds: tuple[Outcome, ...] = ("holds", "contradicted", "undecided", "not measured")
        counted = {kind: sum(each.outcome == kind for each in self.orderings) for kind in kinds}
        held = f"{counted.pop('holds')} of {len(self.orderings)} orderings hold"
        return f"{self.verdict} ({', '.join([held, *(f'{n} {kind}' for kind, n in counted.items() if n)])})"


def judge(
    definition: Definition, scale: ScaleName, trips: Sequence[Trip], records: Mapping[str, Sequence[Record]]
) -> Judged:
    """The table at one scale from the records of its runs, by their keys."""
    by_key = {trip.key: trip for trip in trips}
    cells: dict[tuple[str, str], Cell] = {}
    used: list[Record] = []
    for row_key, row in definition.rows.items():
        for column_key, column in definition.columns.items():
            printed = column_key in row.paper
            trip = by_key.get(row.run or "")
            if column.metric == PARAMETERS:
                cell = _counted(definition, scale, row, column_key, trip) if printed else None
            else:
                found = _found(definition, scale, row, column, records.get(row.run or "", ()))
                used += [found] if found else []
                cell = _measured(row, column_key, column, found) if printed or found else None
            if cell:
                cells[row_key, column_key] = cell
    orderings = tuple(each for claim in definition.claims for each in _orderings(definition, claim, cells))
    return Judged(definition, scale, cells, orderings, tuple(used))


def _found(
    definition: Definition, scale: ScaleName, row: Row, column: Column, records: Sequence[Record]
) -> Record | None:
    """The record of a cell: of several attacks of one kind the strongest, of several measurements the newest."""
    protocol = row.protocol if row.protocol and column.protocol == "reconstruction" else column.protocol
    chosen: Scale | None = getattr(definition, scale)
    eps = row.eps if row.eps is not None or chosen is None else chosen.eps
    fits = [r for r in records if (r.metric, r.protocol) == (column.metric, protocol) and _under(r.threat, column, eps)]
    return max(fits, key=lambda r: (r.threat.steps * r.threat.restarts if r.threat else 0, r.time), default=None)


def _under(threat: Threat | None, column: Column, eps: float | None) -> bool:
    if threat is None or column.attack is None:
        return threat is None and column.attack is None
    return (threat.attack, threat.norm) == (column.attack, column.norm) and threat.eps == eps


def _measured(row: Row, key: str, column: Column, record: Record | None) -> Cell:
    if record is None or record.value is None:
        return _cell(row, key, column, None, None, record.reason or "" if record else "not run")
    low, high = record.interval or (record.value, record.value)
    f = UNITS[column.metric].factor
    return _cell(row, key, column, f * record.value, (f * low, f * high), "")


def _counted(definition: Definition, scale: ScaleName, row: Row, key: str, trip: Trip | None) -> Cell:
    """Parameters of the run's decoder, in millions."""
    if trip is None:
        return _cell(row, key, definition.columns[key], None, None, "not run")
    count = planned(definition, scale).parameters[trip.key] / 1e6
    return _cell(row, key, definition.columns[key], count, (count, count), "")


def _cell(
    row: Row, key: str, column: Column, value: float | None, interval: tuple[float, float] | None, reason: str
) -> Cell:
    printed = row.paper.get(key)
    paper, deviation = printed if isinstance(printed, tuple) else (printed, None)
    agrees = None
    if paper is not None and interval is not None:
        wide = UNITS[column.metric].tolerance * (paper if column.metric == PARAMETERS else 1)
        agrees = interval[0] - wide <= paper <= interval[1] + wide
    return Cell(paper, deviation, value, interval, reason, agrees)


def _orderings(definition: Definition, claim: Claim, cells: Mapping[tuple[str, str], Cell]) -> list[Ordering]:
    sign = 1 if UNITS[definition.columns[claim.column].metric].direction == "higher" else -1
    made = []
    for worse, better in pairwise(claim.order):
        outcome = _outcome(cells.get((worse, claim.column)), cells.get((better, claim.column)), sign)
        made.append(Ordering(claim.column, worse, better, outcome))
    return made


def _outcome(worse: Cell | None, better: Cell | None, sign: int) -> Outcome:
    if not (worse and better and worse.interval and better.interval):
        return "not measured"
    low, high = difference(better, worse)
    if low <= 0 <= high:
        return "undecided"
    return "holds" if sign * low > 0 else "contradicted"


def difference(a: Cell, b: Cell) -> tuple[float, float]:
    """95 % interval of a - b from their own intervals (Newcombe 1998, his method 10; for means the usual one)."""
    assert a.value is not None
    assert b.value is not None
    assert a.interval is not None
    assert b.interval is not None
    d = a.value - b.value
    below = math.hypot(a.value - a.interval[0], b.interval[1] - b.value)
    above = math.hypot(a.interval[1] - a.value, b.value - b.interval[0])
    return d - below, d + above
