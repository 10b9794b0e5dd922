"""Records as a table: one row an encoder, one column a measurement. Figures, words and page all read from here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from arae.records import Model, Record, Threat

NORMS = {"l2": "ℓ₂", "linf": "ℓ∞"}
CLASSIFICATION = "classification"
RECONSTRUCTION = "reconstruction"
BASELINES = ("mean-image", "other-features")
"""Protocols whose PSNR says what a decoder has to beat: the mean of the evaluated images; another image's features."""
_KINDS = ("pgd", "apgd-ce", "apgd-dlr", "apgd-t", "cascade", "autoattack")
_METRICS = ("clean_accuracy", "robust_accuracy", "psnr", "ssim", "lpips")
_PROTOCOLS = (CLASSIFICATION, RECONSTRUCTION, *BASELINES)


@dataclass(frozen=True)
class Column:
    """One kind of measurement."""

    metric: str
    protocol: str
    threat: Threat | None = None
    unit: str = "1"
    direction: Literal["higher", "lower"] = "higher"

    @property
    def order(self) -> tuple[object, ...]:
        """Clean before attacked, weak attacks before strong ones, metrics as people read them."""
        places = [
            known.index(name) if name in known else len(known)
            for name, known in ((self.protocol, _PROTOCOLS), (self.metric, _METRICS))
        ]
        t = self.threat
        strength = (t.norm, t.eps, *strength_of(t)) if t else ("", 0.0, 0, 0)
        return (places[0], self.protocol, t is not None, *strength, places[1], self.metric)


@dataclass(frozen=True)
class Row:
    """One trained model (an encoder at its radius, with its decoder) and all that was measured of it."""

    model: Model
    dataset: str
    split: str
    seed: int
    digest: str
    """Of the training, where the records know it; of the whole recipe otherwise."""
    cells: dict[Column, Record] = field(default_factory=dict)
    label: str = ""

    @property
    def eps(self) -> float:
        """Training radius, for images in [0, 1]."""
        return self.model.train_eps

    @property
    def family(self) -> dict[str, str]:
        """What rows that differ in their radius alone have in common."""
        m = self.model
        return {
            "data": self.dataset,
            "split": self.split,
            "encoder": m.encoder,
            "layer": m.layer or "",
            "decoder": m.decoder or "",
            "losses": ", ".join(f"{name} {weight:g}" for name, weight in (m.losses or {}).items()),
            "seed": f"seed {self.seed}",
        }

    def get(self, metric: str, protocol: str, threat: Threat | None = None) -> Record | None:
        """The record with a value, or None where there is none."""
        for column, record in self.cells.items():
            if (column.metric, column.protocol, column.threat) == (metric, protocol, threat):
                return record if record.value is not None else None
        return None


@dataclass(frozen=True)
class Table:
    """All rows and columns of a set of records."""

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]

    @property
    def headline(self) -> Threat | None:
        """The threat of the map: the largest radius at which robustness was measured, there the strongest attack.

        Threats in a norm that some encoder was trained in come first.
        """
        trained = {row.model.train_norm for row in self.rows if row.eps > 0}
        threats = [c.threat for c in self.columns if c.metric == "robust_accuracy" and c.threat]
        return max(threats, key=lambda t: (t.norm in trained, t.eps, *strength_of(t)), default=None)

    @property
    def strongest(self) -> tuple[Threat, ...]:
        """For each norm and radius at which robustness was measured, the strongest attack."""
        best: dict[tuple[str, float], Threat] = {}
        for column in self.columns:
            if column.metric == "robust_accuracy" and (t := column.threat):
                best[t.norm, t.eps] = t  # columns run from weak to strong
        return tuple(best.values())

    def series(self) -> list[tuple[str, list[Row]]]:
        """Named lines of the map: rows that differ in their radius alone; each norm's line starts at standard."""
        families: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            families.setdefault(tuple(row.family.values()), []).append(row)
        varying = _varying([rows[0] for rows in families.values()])
        lines = []
        for rows in families.values():
            norms = sorted({r.model.train_norm for r in rows if r.eps > 0 and r.model.train_norm})
            for norm in norms or [None]:
                members = [r for r in rows if r.eps == 0 or r.model.train_norm == norm]
                parts = [rows[0].family[key] or f"no {key}" for key in varying]
                parts += [NORMS[norm]] if norm and len(norms) > 1 else []
                lines.append((", ".join(parts), members))
        return lines


def tabulate(records: Iterable[Record]) -> Table:
    """Rows sorted by data, network and radius; where one thing was measured twice, the newest record counts."""
    rows: dict[tuple[object, ...], Row] = {}
    columns: set[Column] = set()
    for record in sorted(records, key=lambda r: r.time):
        m = record.model
        column = Column(record.metric, record.protocol, record.threat, record.unit, record.direction)
        columns.add(column)
        key = (record.dataset, record.split, m.encoder, m.train_norm if m.train_eps else None, m.train_eps)
        digest = record.training or record.digest
        key = (*key, record.seed, digest)
        row = rows.setdefault(key, Row(m, record.dataset, record.split, record.seed, digest))
        if m.decoder and not row.model.decoder:  # records of the classifier alone may not name the decoder
            rows[key] = row = replace(row, model=m)
        row.cells[column] = record
    ordered = sorted(rows.values(), key=lambda r: (*r.family.values(), r.eps > 0, r.model.train_norm or "", r.eps))
    return Table(_labelled(ordered), tuple(sorted(columns, key=lambda c: c.order)))


def radius_text(eps: float) -> str:
    """A radius as people write it: `1.5`, `8/255`."""
    levels = eps * 255
    if abs(float(f"{eps:.3g}") - eps) > 1e-9 and abs(levels - round(levels)) < 1e-6:
        return f"{round(levels)}/255"
    return f"{eps:.4g}"


def strength_of(threat: Threat) -> tuple[int, int]:
    """Sorts attacks of one norm and radius from weak to strong, as far as their names tell."""
    return _KINDS.index(threat.attack) if threat.attack in _KINDS else 0, threat.steps * threat.restarts


def threat_text(threat: Threat) -> str:
    """Such as `PGD-50 × 5 restarts, ℓ₂ ε = 1.5`."""
    restarts = f" × {threat.restarts} restarts" if threat.restarts > 1 else ""
    short = {"autoattack": "AutoAttack", "cascade": f"cascade of APGD-{threat.steps}{restarts}"}
    name = short.get(threat.attack, f"{threat.attack.upper()}-{threat.steps}{restarts}")
    return f"{name}, {NORMS[threat.norm]} ε = {radius_text(threat.eps)}"


def number_text(value: float, unit: str) -> str:
    """A value as shown: fractions in per cent with one decimal, dB with two, others with three."""
    text = {"fraction": f"{100 * value:.1f}", "dB": f"{value:.2f}", "1": f"{value:.3f}"}.get(unit, f"{value:.4g}")
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def _varying(rows: Sequence[Row]) -> list[str]:
    """Parts of the family in which the rows differ."""
    return [key for key in (rows[0].family if rows else {}) if len({row.family[key] for row in rows}) > 1]


def _labelled(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The radius, and only what else is needed to tell the rows apart."""
    varying = _varying(rows)
    norms = {row.model.train_norm for row in rows if row.eps > 0}
    labels = []
    for row in rows:
        norm = f"{NORMS[row.model.train_norm]} " if len(norms) > 1 and row.model.train_norm else ""
        radius = f"{norm}ε = {radius_text(row.eps)}" if row.eps else "standard (ε = 0)"
        labels.append(", ".join([radius] + [row.family[key] or f"no {key}" for key in varying]))
    return tuple(
        replace(row, label=f"{label}, {row.digest[:7]}" if labels.count(label) > 1 else label)
        for row, label in zip(rows, labels, strict=True)
    )
