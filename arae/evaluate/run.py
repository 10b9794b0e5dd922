"""`evaluate`: from a run folder's model, by the recipe's protocol, to the folder's records."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from arae.allocation import memory_kept
from arae.config import Recipe
from arae.data.load import open_source
from arae.errors import InputError, Stopped
from arae.evaluate.batches import Batches, Note, Progress, Workers, alone
from arae.evaluate.highres import high_resolution
from arae.evaluate.inversion import inverted
from arae.evaluate.mapping import Evaluation
from arae.evaluate.measure import evenly
from arae.evaluate.upscale import upscaled
from arae.models.autoencoder import Autoencoder, load_autoencoder
from arae.records import Record, read_records, write_records
from arae.runs import RunFolder

DECODER_NEEDED = ("reconstruction", "upscale", "high-resolution")
_RECONSTRUCTION = ("reconstruction", "mean-image", "other-features")


def evaluate(
    recipe: Recipe,
    folder: RunFolder,
    device: torch.device,
    progress: Progress = lambda label, done, total: None,
    note: Note = lambda text: None,
    workers: Workers = alone,
) -> list[Record]:
    """Measure what `recipe.evaluate` asks of the run's model; returns the new records.

    They take the place of those of the same protocol in the folder's `records.jsonl`; those of other protocols stay.
    `note` is told in a line what is left out, or found to go on from. `workers`: who measures the batches; default:
    this process; the records are the same up to rounding. What is finished of AutoAttack and of the inversion is kept
    in the folder until the records are written: the same call after a kill goes on from there.

    Raises InputError where there is no model, it lacks the decoder that the protocol needs, the held-out images do not
    fit it, or `records.jsonl` holds something else; Stopped on Ctrl-C where finished parts are kept.
    """
    model = load_autoencoder(folder.path).to(device)
    protocol = recipe.evaluate.protocol
    if model.decoder is None and protocol in DECODER_NEEDED:
        raise InputError(
            f"{folder.path}: evaluate.protocol = {protocol} needs a decoder, and this model has none: train it with a "
            "recipe that has a `decoder`, or set evaluate.protocol=robustness"
        )
    kept, state, parts = others(folder, protocol), folder.evaluation / protocol, list[Path]()
    try:
        with memory_kept(device):
            records = _measured(recipe, model, state, parts, progress, note, workers)
    except KeyboardInterrupt:
        if not state.is_dir():
            raise
        raise Stopped(
            f"{folder.path}: evaluation stopped; the same command goes on from what is finished of it"
        ) from None
    write_records(folder.records, [*kept, *records])
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
        for above in list(part.parents)[: len(part.relative_to(folder.evaluation).parts)]:
            with suppress(OSError):  # the parts of another evaluation are in it
                above.rmdir()
    return records


def _measured(
    recipe: Recipe,
    model: Autoencoder,
    state: Path,
    parts: list[Path],
    progress: Progress,
    note: Note,
    workers: Workers,
) -> list[Record]:
    """The records; `parts` is told which folders under `state` they were finished from."""
    protocol = recipe.evaluate.protocol
    if protocol == "high-resolution":
        if workers is not alone:
            raise InputError("--workers: evaluate.protocol = high-resolution takes its files one by one; leave it out")
        return high_resolution(recipe, model, progress, note)
    images, labels = held_out(recipe, model, model.device)
    batches = Batches.of(recipe, model, images)
    with workers(batches) as team:
        if protocol == "upscale":
            return upscaled(batches, images, team, progress)
        if protocol == "inversion":
            return inverted(batches, images, team, progress, state, parts)
        return Evaluation(batches, images, labels, team, progress, note, state, parts).records()


def others(folder: RunFolder, protocol: str) -> list[Record]:
    """The folder's records that those of `protocol` (as recipes name it) do not replace."""
    if not folder.records.is_file():
        return []
    return [record for record in read_records(folder.records) if not _replaced(record, protocol)]


def _replaced(record: Record, protocol: str) -> bool:
    """Whether an evaluation by `protocol` measures this anew, or with other settings in its place."""
    if protocol == "map":
        return record.protocol in ("classification", *_RECONSTRUCTION)
    if protocol == "reconstruction":  # under attack it measures nothing
        return record.protocol in _RECONSTRUCTION and record.threat is None
    family = {"robustness": "classification", "upscale": "upscale-"}.get(protocol, protocol)
    return record.protocol.startswith(family)


def held_out(recipe: Recipe, model: Autoencoder, device: torch.device) -> tuple[Tensor, Tensor]:
    """The evaluated images [n, C, H, W] as uint8, evenly over the held-out file, and their labels [n]."""
    source = open_source(recipe.data, "test", device)
    names = tuple(model.config["classes"])
    if source.shape != model.image_shape or len(source.classes) != len(names):
        raise InputError(
            f"data.test: images {source.shape} of {len(source.classes)} classes do not fit the model's "
            f"{model.image_shape} and {len(names)} classes"
        )
    # Imported classifiers may know their classes by number only.
    if tuple(source.classes) != names and names != tuple(map(str, range(len(names)))):
        raise InputError(
            f"data.test: its classes ({', '.join(source.classes[:3])}, …) are not the model's "
            f"({', '.join(names[:3])}, …): encode the held-out images as the training images were"
        )
    where = evenly(source.n, recipe.evaluate.n)
    count, size = len(where), recipe.evaluate.batch
    whole = where[: count - count % size].reshape(-1, size)
    parts = list(source.batches(whole)) if len(whole) else []
    if count % size:
        parts += source.batches(where[None, count - count % size :])
    return torch.cat(parts), source.labels[torch.from_numpy(where)].to(device)
