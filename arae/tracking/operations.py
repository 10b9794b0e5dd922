"""What MLflow is told: recipes, events and records as operations with readable names."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import Any

from arae.config import Recipe, difference
from arae.monitor.pace import Group
from arae.provenance import git_revision
from arae.records import Record, Threat
from arae.tracking.journal import Operation

LONGEST_VALUE = 5000  # characters; MLflow takes 6000 in a parameter, 8000 in a tag
MOST_WORKERS = 16  # that have series of their own; of more, least, middle and most


@dataclass(frozen=True)
class Family:
    """How MLflow shows a run of many that belong together."""

    experiment: str
    name: str
    """Of the run."""
    params: Mapping[str, Any]
    """All its parameters: what tells it from the others. With more, the UI's parallel coordinates can't be read."""
    tags: Mapping[str, str] = field(default_factory=dict)
    delivered: bool = True
    """Whether this process sends it; else whoever leads the family does, by `send_pending`."""


def opening(recipe: Recipe, parent: str | None, family: Family | None = None) -> list[Operation]:
    """What opens a run: itself, its parameters (what differs from the recipe's base, or the family's) and its tags."""
    attack = recipe.encoder.attack
    tags = {
        "recipe": recipe.base or recipe.name,
        "digest": recipe.digest,
        "git": git_revision(),
        "scale": recipe.scale,
        "norm": attack.norm or "none",
        "eps": f"{attack.eps:g}",
        "dataset": recipe.data.name,
    }
    digests = {"encoder": recipe.stage_digest("encoder"), "decoder": recipe.stage_digest("decoder")}
    family = family or Family(recipe.name.split("/")[0], recipe.name, difference(recipe))
    tags |= family.tags
    run = {"op": "run", "name": family.name, "experiment": family.experiment, "parent": parent}
    params = [{"op": "param", "key": key, "value": text(value)} for key, value in family.params.items()]
    return [
        run | {"digests": digests, "time": milliseconds(time.time())},
        *params,
        *({"op": "tag", "key": key, "value": text(value)} for key, value in tags.items()),
    ]


def record_names(records: Iterable[Record], dataset: str) -> dict[str, Record]:
    """A readable and distinct metric name for each record, such as `final/robust_accuracy.l2-1.5.pgd-50x5`,
    `final/psnr.reconstruction` or, attacked, `final/psnr.under-l2-1.5.pgd-50x5`; data other than `dataset` are named.
    """
    named: dict[str, Record] = {}
    for record in records:
        parts = [record.metric]
        accuracy = record.protocol == "classification"
        if not accuracy and not (record.threat and record.protocol == "reconstruction"):
            parts.append(record.protocol)
        if record.threat:
            parts.append(("" if accuracy else "under-") + threat_name(record.threat))
        parts += [record.dataset] * (record.dataset != dataset) + [record.split] * (record.split != "test")
        name = whole = "final/" + metric_name(".".join(part for part in parts if part))
        count = 1
        while name in named:
            count += 1
            name = f"{whole}.{count}"
        named[name] = record
    return named


def threat_name(threat: Threat) -> str:
    """`l2-1.5.pgd-50x5`: norm, radius, attack, steps × restarts; radii in 8-bit levels as `linf-8of255`."""
    levels = threat.eps * 255
    eps = f"{levels:.0f}of255" if threat.norm == "linf" and math.isclose(levels, round(levels)) else f"{threat.eps:g}"
    return f"{threat.norm}-{eps}.{threat.attack}-{threat.steps}x{threat.restarts}"


def speeds(event: Mapping[str, Any]) -> dict[str, float]:
    """The series of an interval that say how fast the group is, such as `images_per_s` and `workers/0/images_per_s`.

    Of a group of one only those of the whole; of more than `MOST_WORKERS` workers least, middle and most.
    """
    group = Group.of(event)
    found = {
        "images_per_s": group.images_per_s,
        "loader_wait": group.loader_wait,
        "saving_s": event.get("saving_s"),
        "eta_s": event.get("eta_s"),
    }
    if group.workers:
        found["world_size"] = len(group.workers)
    if len(group.workers) > 1:
        found["straggler_ratio"] = max(worker.slowness for worker in group.workers)
        found |= _of_each("images_per_s", [(worker.rank, worker.images_per_s) for worker in group.workers])
        found |= _of_each("work_s", [(worker.rank, worker.work_s) for worker in group.workers])
    return numbers(found)


def _of_each(name: str, values: Sequence[tuple[int, float]]) -> dict[str, float]:
    if len(values) <= MOST_WORKERS:
        return {f"workers/{rank}/{name}": value for rank, value in values}
    known = [value for _, value in values]
    return {f"workers/{name}/{how.__name__}": how(known) for how in (min, median, max)}


def metric_name(text: str) -> str:
    """The text with what MLflow doesn't take in a name (all but letters, digits and `_-. :/`) replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "-", text)


def metrics(values: Mapping[str, float], step: int, moment: int) -> Operation:
    """Values of one step at one moment (Unix milliseconds)."""
    return {"op": "metrics", "step": step, "time": moment, "values": dict(values)}


def renamed(values: Mapping[str, float], old: str, new: str) -> dict[str, float]:
    """The values under `old/`, as values under `new/`."""
    return {new + name.removeprefix(old): value for name, value in values.items() if name.startswith(f"{old}/")}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the values that are numbers."""
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def text(value: object) -> str:
    """A value as a parameter or tag of MLflow's, cut where it is too long."""
    return (value if isinstance(value, str) else json.dumps(value))[:LONGEST_VALUE]


def milliseconds(moment: float | str) -> int:
    """Unix milliseconds of Unix seconds or of an ISO time."""
    return round(1000 * (datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else moment))
