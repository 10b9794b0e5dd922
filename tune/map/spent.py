"""What was planned of a sweep, against what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arae.runs import SHARED, RunFolder, runs_root
from tune.map.words import hours_text
from tune.results import Sweep

UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def planned_and_spent(sweep: Sweep) -> list[tuple[str, str, str]]:
    """(what, planned, spent) rows; `—` where a plan does not say, or nobody can tell any more."""
    spent, plan = sweep.spent, sweep.plan
    ended = sum(trial.entry.state is not None for trial in sweep.trials)
    rows = [("trials", _count(plan.get("trials")), f"{ended:,} at their end, {len(sweep.finished):,} of them finished")]
    stages = plan.get("stages") or {}
    for kind in dict.fromkeys((*stages, *spent.stages)):
        rows.append((f"{kind}s trained", _count(stages.get(kind)), _count(spent.stages.get(kind, 0))))
    rows.append(("device-hours", _hours(plan), f"{spent.device_hours:.3g}"))
    rows.append(("time worked on it", "—", hours_text(sweep.hours)))
    rows.append(("storage", bytes_text(plan.get("storage_bytes")), _storage(sweep)))
    return rows


def bytes_text(count: float | None) -> str:
    """`3.2 GB`; `—` for None."""
    if count is None:
        return "—"
    return next((f"{count / size:.1f} {unit}" for unit, size in UNITS if count >= size), f"{count:.0f} B")


def _hours(plan: Mapping[str, Any]) -> str:
    """What was to be spent; stages that the store had are among those spent, and are said apart."""
    hours, there = plan.get("gpu_hours"), plan.get("gpu_hours_there")
    if hours is None:
        return "—"
    return f"{hours:.3g}" + (f", and {there:.3g} in stages that were there" if there else "")


def _count(number: int | None) -> str:
    return "—" if number is None else f"{number:,}"


def _storage(sweep: Sweep) -> str:
    """What lies on the disk of the sweep and its stages, as of now."""
    keys = dict.fromkeys((outcome.stage, outcome.key) for trial in sweep.trials for outcome in trial.outcomes)
    folders = [RunFolder(runs_root() / SHARED / f"{stage}-{key}").path for stage, key in keys]
    there = [folder for folder in folders if folder.is_dir()]
    total = sum(f.stat().st_size for at in (sweep.folder, *there) for f in at.rglob("*") if f.is_file())
    gone = len(folders) - len(there)
    return bytes_text(total) + (f" ({gone} of {len(folders)} stages are not here any more)" if gone else "")
