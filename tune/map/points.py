"""One point of a sweep: the trials that differ in their seed alone, their numbers, and the records of each number."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from arae.records import Record
from arae.report.table import NORMS, number_text, radius_text, threat_text
from tune.results import Trial, record_of, strength
from tune.settings import SIGNS

NAMES = {
    "clean_accuracy": "clean accuracy",
    "robust_accuracy": "robust accuracy",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "gpu_hours": "device-hours",
}
UNITS = {"clean_accuracy": "fraction", "robust_accuracy": "fraction", "psnr": "dB", "gpu_hours": "h"}


@dataclass(frozen=True)
class Measure:
    """One kind of measurement; without norm and eps, robust accuracy is that under a trial's strongest attack."""

    metric: str
    norm: str | None = None
    eps: float | None = None

    @property
    def sign(self) -> int:
        """+1 where more is better."""
        return SIGNS[self.metric]

    @property
    def unit(self) -> str:
        """As records write it; `h` for device-hours."""
        return UNITS.get(self.metric, "1")

    @property
    def label(self) -> str:
        """For people: `robust accuracy at ℓ₂ ε = 0.5`."""
        at = f" at {NORMS[self.norm]} ε = {radius_text(self.eps)}" if self.norm and self.eps is not None else ""
        return NAMES[self.metric] + at

    def record(self, trial: Trial) -> Record | None:
        """The trial's record of it, the one under the strongest attack; it may have a reason in place of a value."""
        if self.eps is None:
            return record_of(trial.records, self.metric)
        found = [
            r for r in trial.records
            if r.metric == self.metric and r.threat and (r.threat.norm, r.threat.eps) == (self.norm, self.eps)
        ]  # fmt: skip
        return max(found, key=strength, default=None)

    def text(self, value: float) -> str:
        """The value as shown, with its unit."""
        ending = {"fraction": " %", "dB": " dB", "h": " h"}.get(self.unit, "")
        return number_text(value, self.unit) + ending


@dataclass(frozen=True)
class Source:
    """One record behind a number, and where it lies."""

    trial: str
    line: int
    """Of the trial's `records.jsonl`, from 1."""
    record: Record

    @property
    def text(self) -> str:
        """All that leads back to it, in one line."""
        r = self.record
        parts = [f"{self.trial}/records.jsonl, line {self.line}", f"recipe {r.digest[:12]}", f"seed {r.seed}"]
        parts += [f"n = {r.n:,}"] if r.n else []
        return ", ".join(parts + ([threat_text(r.threat)] if r.threat else []))


@dataclass(frozen=True)
class Cell:
    """One number of a point: the mean over its seeds; low and high are the outermost ends of their intervals."""

    value: float
    low: float
    high: float
    sources: tuple[Source, ...] = ()
    """A record a seed; none for device-hours, which the sweep's own book has."""


@dataclass(frozen=True)
class Group:
    """One point of the space: its finished trials, which differ in nothing but the seed."""

    number: int
    """In the table, from 1."""
    label: str
    trials: tuple[Trial, ...]
    line: tuple[tuple[str, str], ...]
    """The listed axes other than radius and seed, and their values: what points of one line have in common."""

    @property
    def eps(self) -> float:
        """Training radius, for images in [0, 1]."""
        return float(self.trials[0].recipe.encoder.attack.eps)

    @property
    def norm(self) -> str | None:
        """Norm of the training attack; None for standard training."""
        attack = self.trials[0].recipe.encoder.attack
        return attack.norm if attack.eps else None

    def cell(self, measure: Measure) -> Cell | None:
        """Its number of that kind, over the seeds that have one; None where none has."""
        if measure.metric == "gpu_hours":
            hours = [h for t in self.trials if (h := t.entry.objectives.get("gpu_hours")) is not None]
            return Cell(fmean(hours), min(hours), max(hours)) if hours else None
        found = [
            Source(trial.id, _place(trial, record), record)
            for trial in self.trials
            if (record := measure.record(trial)) is not None and record.value is not None
        ]
        if not found:
            return None
        ends = [source.record.interval or (_value(source.record),) * 2 for source in found]
        return Cell(
            fmean(_value(source.record) for source in found),
            min(low for low, _ in ends),
            max(high for _, high in ends),
            tuple(found),
        )

    def reason(self, measure: Measure) -> str:
        """Why it has no number of that kind."""
        records = [record for trial in self.trials if (record := measure.record(trial)) is not None]
        return next((record.reason for record in records if record.reason), "not measured at this point")


def _value(record: Record) -> float:
    assert record.value is not None  # only records with a value are asked
    return record.value


def _place(trial: Trial, record: Record) -> int:
    """The line of a trial's record, from 1."""
    return next(i for i, each in enumerate(trial.records, 1) if each is record)
