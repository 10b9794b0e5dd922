"""Check a recipe against the networks and the data it names, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from arae.config import Recipe
from arae.data.load import describe, same_kind
from arae.errors import InputError
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.train.engine import resolve_precision

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


def check(recipe: Recipe, device: torch.device) -> Iterator[str]:
    """What was checked, a line each; InputError at the first thing that would not train.

    Data that the recipe does not name yet is passed over, and that is said.
    """
    found = {split: describe(recipe.data, split) for split in SPLITS if getattr(recipe.data, split) is not None}
    for split in SPLITS:
        if split in found:
            n, images, names = found[split]
            yield f"data.{split}: {n} images {images}, {len(names)} classes"
        else:
            yield f"data.{split}: not named yet, so not checked"
    if len(found) == len(SPLITS):
        same_kind(found["train"], found["test"])
    size = recipe.data.size or 224
    shape, classes = (recipe.data.channels or 3, size, size), 10
    if "train" in found:
        shape, classes = found["train"].shape, len(found["train"].classes)
    encoder = create_encoder(
        recipe.encoder.name,
        num_classes=max(classes, 2),
        in_channels=shape[0],
        image_size=shape[1],
        width=recipe.encoder.width,
    )
    features = encoder.feature_shape(shape, recipe.encoder.layer)
    yield f"encoder: {recipe.encoder.name}, features {features} at {recipe.encoder.layer or encoder.layer}"
    if recipe.decoder is not None:
        made = create_decoder(recipe.decoder.name, feature_shape=features, image_shape=shape)(torch.zeros(2, *features))
        if tuple(made.shape[1:]) != shape:
            raise InputError(f"decoder.name = {recipe.decoder.name} makes images {tuple(made.shape[1:])}, not {shape}")
        if recipe.decoder.losses.adversarial:
            create_discriminator(recipe.decoder.name, feature_shape=features, image_shape=shape)
        yield f"decoder: {recipe.decoder.name}, images {shape}"
    yield f"precision: {recipe.precision}, here {resolve_precision(recipe.precision, device)} on {device.type}"
