"""Check a recipe against the networks and the data it names, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from arae.config import Recipe
from arae.data.load import describe
from arae.errors import InputError
from arae.models import create_decoder, create_encoder
from arae.train.engine import resolve_precision


def check(recipe: Recipe) -> Iterator[str]:
    """What was checked, a line each; InputError at the first thing that would not train.

    Data that the recipe does not name yet is passed over, and that is said.
    """
    classes, shape = 10, (recipe.data.channels or 3, recipe.data.size or 224, recipe.data.size or 224)
    for split in ("train", "test"):
        if getattr(recipe.data, split) is None:
            yield f"data.{split}: not named yet, so not checked"
            continue
        found = describe(recipe.data, split)
        classes, shape = len(found.classes), found.shape
        yield f"data.{split}: {found.n} images {shape}, {classes} classes"
    encoder = create_encoder(
        recipe.encoder.name, num_classes=max(classes, 2), in_channels=shape[0], image_size=shape[1]
    )
    features = encoder.feature_shape(shape, recipe.encoder.layer)
    yield f"encoder: {recipe.encoder.name}, features {features} at {recipe.encoder.layer or encoder.layer}"
    if recipe.decoder is not None:
        made = create_decoder(recipe.decoder.name, feature_shape=features, image_shape=shape)(torch.zeros(2, *features))
        if tuple(made.shape[1:]) != shape:
            raise InputError(f"decoder.name = {recipe.decoder.name} makes images {tuple(made.shape[1:])}, not {shape}")
        yield f"decoder: {recipe.decoder.name}, images {shape}"
    yield f"precision: {recipe.precision}, here {resolve_precision(recipe.precision, torch.device('cpu'))} on a CPU"
