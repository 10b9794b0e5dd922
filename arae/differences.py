"""Two sides' values next to each other: where they differ beyond their intervals, in words, as a table, as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from arae.report.table import number_text

Verdict = Literal["differs beyond intervals", "not told apart", "no interval", "not measured"]
DIFFERS: Verdict = "differs beyond intervals"
LARGEST = 5
"""Differences that are put into a sentence."""
NAMED = 8
"""Names that are listed of what only one side has."""
INTERVALS = (
    "Criterion: two values differ where their 95 % intervals do not overlap; where they overlap they are not told "
    "apart, which does not make them equal."
)


@dataclass(frozen=True)
class Measured:
    """One side's value."""

    value: float | None
    interval: tuple[float, float] | None = None
    n: int | None = None
    """Samples, or rounds, behind it."""

    def text(self, unit: str) -> str:
        """Such as `45.6 [43.1, 48.2]`."""
        if self.value is None:
            return "not measured"
        ends = f" [{', '.join(number_text(end, unit) for end in self.interval)}]" if self.interval else ""
        return number_text(self.value, unit) + ends


@dataclass(frozen=True)
class Pair:
    """The same thing measured on both sides."""

    where: str
    """Of which trial, model or benchmark."""
    what: str
    unit: str
    """As records have it: `fraction`, `dB`, `1`; or words, for what has another."""
    better: Literal["higher", "lower"] | None
    """None where neither is."""
    a: Measured
    b: Measured

    @property
    def difference(self) -> float | None:
        """B's value less A's."""
        return None if self.a.value is None or self.b.value is None else self.b.value - self.a.value

    @property
    def verdict(self) -> Verdict:
        """What the intervals say."""
        if self.difference is None:
            return "not measured"
        if self.a.interval is None or self.b.interval is None:
            return "no interval"
        apart = self.a.interval[1] < self.b.interval[0] or self.b.interval[1] < self.a.interval[0]
        return DIFFERS if apart else "not told apart"

    @property
    def separation(self) -> float:
        """The difference in units of both intervals' half widths together: makes unlike metrics comparable."""
        if self.difference is None or self.a.interval is None or self.b.interval is None:
            return 0.0
        widths = (self.a.interval[1] - self.a.interval[0]) + (self.b.interval[1] - self.b.interval[0])
        return abs(self.difference) / (widths / 2) if widths else float("inf") if self.difference else 0.0

    def swapped(self) -> Pair:
        """The same with the sides exchanged."""
        return replace(self, a=self.b, b=self.a)

    def sentence(self) -> str:
        """A difference in words."""
        assert self.difference is not None
        name, size = unit_name(self.unit), number_text(abs(self.difference), self.unit)
        size += " points" if self.unit == "fraction" else f" {name}" if name else ""
        way = "higher" if self.difference > 0 else "lower"
        side = "" if self.better is None else f": {'B' if way == self.better else 'A'} is better"
        said = f"{self.what} is {size} {way} in B ({self.b.text(self.unit)} against {self.a.text(self.unit)}){side}."
        return f"{self.where}: {said}" if self.where else said


@dataclass(frozen=True)
class Comparison:
    """All that two sides have in common, and what they have not."""

    kind: Literal["sweeps", "records", "benchmarks"]
    a: str
    b: str
    criterion: str
    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    """Names of what B has no match for."""
    only_b: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """In what else the two differ: sentences."""

    @property
    def differing(self) -> tuple[Pair, ...]:
        """The pairs that differ beyond their intervals, the clearest first."""
        return tuple(
            sorted((pair for pair in self.pairs if pair.verdict == DIFFERS), key=lambda p: (-p.separation, p.where))
        )

    def lines(self) -> list[str]:
        """Words first, then the table."""
        return [*self.words(), *([""] if self.pairs else []), *self.table()]

    def words(self) -> list[str]:
        """What there is to say, a sentence a line."""
        counts = Counter(pair.verdict for pair in self.pairs)
        out = [f"A: {self.a}", f"B: {self.b}", ""]
        if not self.pairs:
            out.append("Nothing was measured on both sides, so nothing is compared.")
        else:
            rest = ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if verdict != DIFFERS)
            said = f"{_of(len(self.pairs), 'value')} compared; {counts[DIFFERS]} {_differ(counts[DIFFERS])}"
            out += [f"{said} beyond their intervals{f'; {rest}' if rest else ''}.", self.criterion]
        if shown := self.differing[:LARGEST]:
            out += ["", "The clearest differences:" if len(self.differing) > LARGEST else "The differences:"]
            out += [f"  {pair.sentence()}" for pair in shown]
        if uneven := sum(None not in (p.a.n, p.b.n) and p.a.n != p.b.n for p in self.pairs):
            out += ["", f"{_of(uneven, 'pair')} measured with different n: look at column n."]
        for side, names in (("A", self.only_a), ("B", self.only_b)):
            if names:
                more = f"; and {len(names) - NAMED} more" if len(names) > NAMED else ""
                out += ["", f"In {side} alone, so not compared ({len(names)}): {'; '.join(names[:NAMED])}{more}"]
        return [*out, *([""] if self.notes else []), *self.notes]

    def table(self) -> list[str]:
        """Every pair in a row."""
        if not self.pairs:
            return []
        heads = ("", "measured", "A", "B", "B − A", "n", "")
        rows = [heads, *(_row(pair) for pair in self.pairs)]
        kept = [i for i in range(len(heads)) if any(row[i] for row in rows[1:])]
        widths = {i: max(len(row[i]) for row in rows) for i in kept}
        return ["  ".join(f"{row[i]:<{widths[i]}}" for i in kept).rstrip() for row in rows]

    def document(self) -> dict[str, Any]:
        """As JSON has it; values in their units."""
        return {
            "kind": self.kind,
            "a": self.a,
            "b": self.b,
            "criterion": self.criterion,
            "compared": len(self.pairs),
            "differ": len(self.differing),
            "pairs": [
                {
                    "where": pair.where,
                    "what": pair.what,
                    "unit": pair.unit,
                    "better": pair.better,
                    "a": vars(pair.a),
                    "b": vars(pair.b),
                    "difference": pair.difference,
                    "verdict": pair.verdict,
                }
                for pair in self.pairs
            ],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "notes": list(self.notes),
        }


def unit_name(unit: str) -> str:
    """A unit as it is written behind a number; fractions are shown in per cent."""
    return {"fraction": "%", "1": ""}.get(unit, unit)


def _row(pair: Pair) -> tuple[str, ...]:
    by = "" if pair.difference is None else number_text(pair.difference, pair.unit)
    ns = {f"{n:,}" for n in (pair.a.n, pair.b.n) if n is not None}
    n = f"{pair.a.n:,} / {pair.b.n:,}" if len(ns) == 2 else "".join(ns)
    unit = unit_name(pair.unit)
    what = f"{pair.what} ({unit})" if unit else pair.what
    return pair.where, what, pair.a.text(pair.unit), pair.b.text(pair.unit), by, n, pair.verdict


def _of(number: int, thing: str) -> str:
    return f"{number:,} {thing} was" if number == 1 else f"{number:,} {thing}s were"


def _differ(number: int) -> str:
    return "differs" if number == 1 else "differ"
