"""The main job in small: images, encoders at several radii, a decoder for each, the map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from arae.check import check
from arae.config import Recipe, load_recipe
from arae.data.augment import to_float
from arae.data.encode import EncodeOptions, encode
from arae.errors import InputError
from arae.evaluate import held_out
from arae.launch import Where, refuse_another
from arae.models.autoencoder import load_autoencoder
from arae.records import Record, write_records
from arae.report import Grid, collect, write_report
from arae.runs import RunFolder
from arae.session import Session, session
from arae.storage import fetched, shared
from arae.tracking.mirror import log_note

PICTURES = 10


def demo(recipe: Recipe, where: Where) -> RunFolder:
    """Encode, train and evaluate one trip a radius of `recipe.map`, then report; what is trained is not trained again.

    Returns the parent run folder, with `report.html`, `map.png`, `reconstructions.png` and every record.
    """
    if recipe.map is None:
        raise InputError(f"{recipe.name}: the demo needs map.radii, such as map.radii=[0,0.75,1.5]")
    radii = recipe.map.radii
    with session(recipe) as parent:
        recipe = recipe.replace(encoded(parent))
        trips = [trip(recipe, eps) for eps in radii]
        for one in trips:
            list(check(one, where.worker_device()))
            refuse_another(one, RunFolder.of(one))
        parent.progress.close()  # the trips show their own
        records = [record for one in trips for record in run_trip(one, parent, where)]
        write_records(parent.folder.records, records)
        page = report(recipe, {RunFolder.of(one): one for one in trips}, records, parent.folder)
        parent.tracker.log_records(records)
        for path in (page, page.with_name("map.png"), page.with_name("reconstructions.png")):
            parent.tracker.log_artifact(path)
        return parent.folder


def demo_recipe(overrides: list[str]) -> Recipe:
    """The shipped recipe `demo`, or `demo-images` where `data.source` names a folder of one's own."""
    own = any(text.startswith("data.source=") for text in overrides)
    named = any(text.startswith("data.name=") for text in overrides)
    return load_recipe("demo-images" if own and not named else "demo", overrides)


def report_folder(folder: RunFolder) -> Path:
    """Write the report of a demo's or a single run's folder anew from its records."""
    folder = RunFolder(fetched(folder.path))
    with shared(folder, log_note):
        return _report_folder(folder)


def _report_folder(folder: RunFolder) -> Path:
    recipe = load_recipe(folder.path)
    radii = recipe.map.radii if recipe.map else ()
    folders = [RunFolder(folder.path / f"eps-{eps:g}") for eps in radii] or [folder]
    return report(recipe, {each: load_recipe(each.path) for each in folders}, collect(folder.path), folder)


def encoded(parent: Session) -> dict[str, str]:
    """Encode both splits into the run folder; returns the overrides that name them."""
    data = parent.recipe.data
    source = data.source if data.name == "images" else data.name
    if source is None:
        raise InputError("data.source is missing: name the folder of your images, one folder a class inside")
    paths = {}
    for split in ("train", "test"):
        path = parent.folder.path / "data" / f"{split}.beton"
        path.parent.mkdir(exist_ok=True)
        own = data.name == "images"
        options = EncodeOptions(
            split=split,
            mode="raw",
            size=data.size if own else None,
            crop=own,
            source=None if own else data.source,
        )
        encode(source, path, options, parent.progress.task)
        paths[f"data.{split}"] = str(path)
    return paths


def trip(recipe: Recipe, eps: float) -> Recipe:
    """The recipe of one radius."""
    return recipe.replace({"name": f"{recipe.name}/eps-{eps:g}", "encoder.attack.eps": eps, "map": None})


def run_trip(recipe: Recipe, parent: Session, where: Where) -> list[Record]:
    """Train and measure one radius."""
    with session(recipe, parent=parent.recipe.name) as child:
        child.train(where)
        return child.evaluate(where.alone())


def report(recipe: Recipe, trips: Mapping[RunFolder, Recipe], records: list[Record], folder: RunFolder) -> Path:
    """Write the page and its pictures; `trips` are the runs that the grid shows, and their recipes."""
    name = "cifar10-resnet18"
    commands = [
        ("The same on your own images, one folder a class", "arae demo data.source=/path/to/images"),
        ("CIFAR-10 with ResNet-18, on eight workers of a Ray cluster", f"arae train {name} --workers 8 --address auto"),
    ]
    return write_report(folder.path, records, recipe, grid(trips), commands)


def grid(trips: Mapping[RunFolder, Recipe]) -> Grid:
    """The first held-out images of different classes, and for each radius their reconstructions, clean and attacked."""
    from arae.attacks.gradient import perturb

    rows: list[tuple[str, torch.Tensor]] = []
    originals: torch.Tensor | None = None
    for folder, one in trips.items():
        model = load_autoencoder(folder.path)
        images, labels = held_out(one, model, torch.device("cpu"))
        chosen = torch.from_numpy(pick(labels.numpy()))
        originals, y = to_float(images[chosen]), labels[chosen]
        eps = one.encoder.attack.eps
        label = f"trained at ε = {eps:g}" if eps else "standard (ε = 0)"
        rows.append((label, model.reconstruct(originals)))
        if one.evaluate.attacks:
            attack = max(one.evaluate.attacks, key=lambda a: (a.eps, a.restarts == 1))
            generator = torch.Generator().manual_seed(one.seed)
            attacked = perturb(model.encoder, originals, y, attack, generator)
            rows.append((f"{label}, attacked", model.reconstruct(attacked)))
    assert originals is not None
    return Grid(originals, rows)


def pick(labels: np.ndarray) -> np.ndarray:
    """Indices of `PICTURES` images: the first of each class, then the next, in order of the file."""
    seen: dict[int, int] = {}
    rank = np.empty(len(labels), dtype=np.int64)
    for i, label in enumerate(labels.tolist()):
        rank[i] = seen.get(label, 0)
        seen[label] = rank[i] + 1
    return np.sort(np.lexsort((np.arange(len(labels)), rank))[:PICTURES])
