"""What there is by name, and what each recipe key means."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic import BaseModel

from arae.config import Recipe, load_recipe, models_in, shipped_recipes
from arae.data.catalog import DATASETS
from arae.errors import InputError
from arae.metrics import METRICS
from arae.models.autoencoder import read_config
from arae.models.zoo import summaries
from arae.runs import RunFolder, runs_root

Rows = list[tuple[str, str]]


def recipes() -> Rows:
    """Shipped recipes and the first line of each header."""
    return [(name, path.read_text().splitlines()[0].lstrip("# ")) for name, path in shipped_recipes().items()]


def runs() -> Rows:
    """Run folders and how far each is."""
    root = runs_root()
    found = []
    for path in sorted(root.rglob("recipe.yaml")) if root.is_dir() else ():
        if path.relative_to(root).parts[0] == "mlartifacts":  # MLflow's copies
            continue
        folder = RunFolder(path.parent)
        try:
            recipe, config = load_recipe(folder.path), read_config(folder.model) or {}
        except InputError as error:
            found.append((str(path.parent.relative_to(root)), f"unreadable: {error}"))
            continue
        done = [stage for stage in ("encoder", "decoder") if stage in config]
        states = "records" if folder.records.is_file() else " and ".join(done) or "no model yet"
        found.append((recipe.name, f"{states}; {recipe.encoder.name} on {recipe.data.name}"))
    return found


LISTS: dict[str, Callable[[], Rows]] = {
    "recipes": recipes,
    "data": lambda: [(name, d.title) for name, d in DATASETS.items()],
    "encoders": lambda: list(summaries()["encoders"].items()),
    "decoders": lambda: list(summaries()["decoders"].items()),
    "discriminators": lambda: list(summaries()["discriminators"].items()),
    "metrics": lambda: [(name, f"{m.direction} is better, in {m.unit}") for name, m in METRICS.items()],
    "runs": runs,
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
