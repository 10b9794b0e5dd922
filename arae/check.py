"""Check a recipe against the networks and the data it names, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from arae.config import Losses, Recipe, Stage
from arae.data.images import list_folder
from arae.data.load import Described, augmented, describe, same_kind
from arae.errors import InputError
from arae.models import create_encoder
from arae.precision import resolve_precision
from arae.train.encoder import sides
from arae.train.networks import decoding, load_comparator
from arae.train.objectives import check_objective

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


def check(recipe: Recipe, device: torch.device) -> Iterator[str]:
    """What was checked, a line each; InputError at the first thing that would not train.

    Data that the recipe does not name yet is passed over, and that is said.
    """
    found = _described(recipe)
    for split in SPLITS:
        if split in found:
            n, images, names = found[split]
            yield f"data.{split}: {n} images {images}, {len(names)} classes"
        else:
            yield f"data.{split}: not named yet, so not checked"
    size = recipe.data.size or 224
    shape, classes = (recipe.data.channels or 3, size, size), 10
    if "train" in found:
        shape, classes = found["train"].shape, len(found["train"].classes)
    encoder = create_encoder(
        recipe.encoder.name,
        num_classes=classes,
        in_channels=shape[0],
        image_size=shape[1],
        width=recipe.encoder.width,
    )
    check_objective(recipe.encoder)
    features = encoder.feature_shape(shape, recipe.encoder.layer)
    for scale in {1.0, *(phase.scale for phase in recipe.encoder.phases)}:
        size = (shape[0], *sides(shape[1:], scale))
        encoder.refuse_unfit(size)
        _trains_alone(encoder, torch.zeros(1, *size), recipe.encoder, "encoder")
    yield f"encoder: {recipe.encoder.name}, features {features} at {recipe.encoder.layer or encoder.layer}"
    if (part := recipe.decoder) is not None:
        if part.augment is not None and recipe.data.train is not None:
            describe(augmented(recipe.data, part.augment), "train")  # what can't be cropped is said now
        networks = decoding(recipe, encoder, load_comparator(part.comparator, shape), shape)
        _trains_alone(networks.generator(), torch.zeros(1, *features), part, "decoder")
        networks.discriminator()
        yield f"decoder: {part.name}, images {shape}"
        if part.comparator is not None:
            layer = part.comparator.layer or "its own layer"
            yield f"comparator: {part.comparator.name}, features {networks.compared} at {layer}"
        if part.losses.preset is not None:
            yield f"losses: {part.losses.preset}, {weighted(networks.weights)}"
    if recipe.evaluate.protocol == "high-resolution" and recipe.evaluate.images is not None:
        yield f"evaluate.images: {len(list_folder(Path(recipe.evaluate.images), 'all', ()).paths)} image files"
    yield f"precision: {recipe.precision}, here {resolve_precision(recipe.precision, device)} on {device.type}"


def _described(recipe: Recipe) -> dict[str, Described]:
    """The splits that the recipe names; InputError where they can't be learnt from, or do not belong together."""
    found = {split: describe(recipe.data, split) for split in SPLITS if getattr(recipe.data, split) is not None}
    if "train" in found and (count := len(found["train"].classes)) < 2:
        raise InputError(f"data.train: {count} class; an encoder needs two or more (one folder a class)")
    if len(found) == len(SPLITS):
        same_kind(found["train"], found["test"])
    return found


def _trains_alone(network: nn.Module, one: Tensor, part: Stage, stage: str) -> None:
    """InputError where micro-batches of one image leave a batch norm one value a channel, which has no variance."""
    if part.micro > 1 or not (part.steps or part.epochs):
        return
    try:
        with torch.no_grad():
            network.train()(one)
    except ValueError as error:
        key = f"{stage}.{'micro_batch' if part.micro_batch else 'batch'}"
        raise InputError(
            f"{key} = 1 is too few for a batch norm of the {stage}: set it to 2 or more ({error})"
        ) from None


def weighted(weights: Losses) -> str:
    """The weights of the losses that there are, such as `pixel 38.5, feature 11800`."""
    named = {"pixel": weights.pixel, "feature": weights.feature, "adversarial": weights.adversarial}
    return ", ".join(f"{name} {weight:.6g}" for name, weight in named.items() if weight)
