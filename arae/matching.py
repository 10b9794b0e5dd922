"""Two sets of records, matched one to one: what was measured on both sides, by all that must agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from arae.config import Recipe, flatten
from arae.differences import Measured, Pair
from arae.errors import InputError
from arae.records import Record, Threat
from arae.report.table import NORMS, radius_text, threat_text

Key = tuple[object, ...]
Named = Mapping[Key, tuple[str, Record]]
"""Records by all that must agree, and what each is of, in words."""


def by_key(*sides: Sequence[Record]) -> Iterator[dict[Key, tuple[str, Record]]]:
    """Each side's records by all that must agree, with a name for each model.

    The seed is of the key where a side has several of one kind.
    """
    every = [record for side in sides for record in side]
    counts = [Counter(_identity(record) for record in side) for side in sides]
    varying = (
        [part for part in _parts(every[0]) if len({_parts(record)[part] for record in every}) > 1] if every else []
    )
    for side in sides:
        found: dict[Key, tuple[str, Record]] = {}
        for record in side:
            key, where = _identity(record), ", ".join(filter(None, (_parts(record)[part] for part in varying)))
            if any(count[key] > 1 for count in counts):
                key, where = (*key, record.seed), ", ".join(filter(None, (where, f"seed {record.seed}")))
            if key in found:
                raise InputError(
                    f"{where}: {measured_text(record)} is there twice, with digests {found[key][1].digest[:7]} and "
                    f"{record.digest[:7]}: leave one of the records out"
                )
            found[key] = where, record
        yield found


def _identity(record: Record) -> Key:
    return *measure(record), record.model.model_dump_json()


def measure(record: Record) -> Key:
    """What was measured, on whatever model. Attacks agree in every setting, or they are others."""
    threat = record.threat.model_dump_json() if record.threat else None
    return record.metric, record.protocol, record.dataset, record.split, threat, record.unit, record.direction


def matched(mine: Named, theirs: Named) -> tuple[list[Pair], list[str], list[str]]:
    """Pairs of records under the same key, and the names of those that have no other."""
    pairs: list[Pair] = []
    for key, (where, record) in mine.items():
        if key in theirs:
            what, better = measured_text(record), record.direction
            pairs.append(Pair(where, what, record.unit, better, _value(record), _value(theirs[key][1])))
    return pairs, _alone(mine, theirs), _alone(theirs, mine)


def _alone(mine: Named, theirs: Named) -> list[str]:
    found = [named for key, named in mine.items() if key not in theirs]
    return [f"{where}: {measured_text(record)}" if where else measured_text(record) for where, record in found]


def _value(record: Record) -> Measured:
    return Measured(record.value, record.interval, record.n)


def measured_text(record: Record) -> str:
    """What a record is of: metric, protocol where it is none of the usual ones, attack with all its settings."""
    name = record.metric.replace("_", " ") if record.metric.endswith("accuracy") else record.metric.upper()
    how = "" if record.protocol in ("classification", "reconstruction") else f" ({record.protocol})"
    return f"{name}{how}" + (f" under {_threat_text(record.threat)}" if record.threat else "")


def _threat_text(threat: Threat) -> str:
    """With step and start where they are not the usual ones."""
    said = threat_text(threat)
    if threat.attack == "pgd" and abs(threat.step_size - 2.5 * threat.eps / max(threat.steps, 1)) > 1e-9:
        said += f", step {threat.step_size:.3g}"
    return said + (", random start" if threat.random_start else "")


def _parts(record: Record) -> dict[str, str]:
    """What tells a model, and the images it was measured on, from others."""
    model = record.model
    radius = f"{NORMS[model.train_norm]} " if model.train_norm else ""
    return {
        "data": f"{record.dataset} {record.split}",
        "encoder": model.encoder,
        "layer": model.layer or "",
        "training": f"{radius}ε = {radius_text(model.train_eps)}" if model.train_eps else "standard",
        "decoder": model.decoder or "",
        "losses": ", ".join(f"{name} {weight:g}" for name, weight in (model.losses or {}).items()),
    }


def circumstances(mine: Sequence[Record], theirs: Sequence[Record]) -> Iterator[str]:
    """In what the records differ that no value depends on by definition, and each may."""
    asked: dict[str, Callable[[Record], object]] = {
        "seeds": lambda r: r.seed,
        "scale": lambda r: r.scale,
        "precision": lambda r: r.hardware.get("precision"),
        "trained on": lambda r: r.hardware.get("device"),
        "torch": lambda r: r.versions.get("torch"),
        "arae": lambda r: r.git[:12],
    }
    for name, of in asked.items():
        sides = [", ".join(sorted({str(of(record)) for record in side})) for side in (mine, theirs)]
        if sides[0] != sides[1] and all(sides):
            yield f"{name}: {sides[0]} in A, {sides[1]} in B"


def settings(a: Recipe | None, b: Recipe | None, called: str) -> Iterator[str]:
    """In which keys two recipes differ."""
    if a is None or b is None:
        return
    mine, theirs = (flatten(recipe.model_dump(mode="json", exclude={"name", "base"})) for recipe in (a, b))
    found = [f"{key}: {mine.get(key)} / {theirs.get(key)}" for key in mine | theirs if mine.get(key) != theirs.get(key)]
    yield f"The {called} differ in {'; '.join(found)} (A / B)." if found else f"The {called} are the same."
