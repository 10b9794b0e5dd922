"""What there is by name, and what each recipe key means."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import yaml
from pydantic import BaseModel

from arae.checkout import checkout_module
from arae.config import Recipe, models_in, shipped_recipes
from arae.data.catalog import DATASETS
from arae.metrics import METRICS
from arae.models.zoo import summaries

Rows = list[tuple[str, str]]


def recipes() -> Rows:
    """Shipped recipes and the first line of each header."""
    return [(name, path.read_text().splitlines()[0].lstrip("# ")) for name, path in shipped_recipes().items()]


def spaces() -> Rows:
    """Shipped search spaces and what each asks; InputError where arae is installed without its drivers."""
    found = checkout_module("tune.space").shipped_spaces()
    return [(name, str(yaml.safe_load(path.read_text()).get("about", ""))) for name, path in found.items()]


LISTS: dict[str, Callable[[], Rows]] = {
    "recipes": recipes,
    "spaces": spaces,
    "data": lambda: [(name, d.title) for name, d in DATASETS.items()],
    "encoders": lambda: list(summaries()["encoders"].items()),
    "decoders": lambda: list(summaries()["decoders"].items()),
    "discriminators": lambda: list(summaries()["discriminators"].items()),
    "metrics": lambda: [(name, f"{m.direction} is better, in {m.unit}") for name, m in METRICS.items()],
}


def described_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Rows:
    """Every dotted key with its meaning."""
    return list(_keys(model, prefix))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        inner = list(models_in(field.annotation))
        if not inner or field.description:
            yield prefix + name, " ".join((field.description or "").split())
        for part in inner:
            yield from _keys(part, f"{prefix}{name}.")
