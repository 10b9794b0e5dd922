"""One run's finished encoder for another: runs that differ in their decoder alone train the encoder once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arae.config import Recipe
from arae.data.load import fingerprint
from arae.errors import InputError
from arae.files import write_bytes, write_text
from arae.models.autoencoder import read_config
from arae.runs import RunFolder

_ENCODERS = ("format", "image_shape", "classes", "train_norm", "train_eps", "encoder")


def has_encoder(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the run folder holds the finished encoder of this recipe, trained on these very images.

    Its training does not depend on the layer that is tapped.
    """
    entry = (read_config(folder.model) or {}).get("encoder")
    return entry is not None and _is_of(recipe, entry) and entry["images"] == fingerprint(recipe.data, "train")


def _is_of(recipe: Recipe, entry: dict[str, Any]) -> bool:
    """Whether a finished encoder is the recipe's; one that was trained with no layer named is every layer's."""
    anywhere = recipe.replace({"encoder.layer": None})
    return entry["digest"] in (recipe.stage_digest("encoder"), anywhere.stage_digest("encoder"))


def adopt_encoder(recipe: Recipe, folder: RunFolder, siblings: Iterable[Path]) -> Path | None:
    """Copy a sibling's finished encoder into the run folder, which `session` holds; returns the sibling's.

    `siblings`: run folders, in the order they are asked. None where the run has an encoder, or no sibling has this one:
    training then finds what is there, or makes it.
    """
    if "encoder" in (read_config(folder.model) or {}):
        return None
    for path in siblings:
        other = RunFolder(path)
        if path != folder.path and has_encoder(recipe, other) and _copied(recipe, other.model, folder.model):
            return path
    return None


def _copied(recipe: Recipe, source: Path, target: Path) -> bool:
    """Whether the encoder was copied: the weights first, so that a config names only what is there."""
    config = read_config(source)
    try:
        data = (source / "encoder.safetensors").read_bytes()
    except OSError:
        return False
    if config is None or hashlib.sha256(data).hexdigest() != config["encoder"]["sha256"]:
        return False
    target.mkdir(parents=True, exist_ok=True)
    write_bytes(target / "encoder.safetensors", data)
    own = {"digest": recipe.stage_digest("encoder"), "layer": recipe.encoder.layer or config["encoder"]["layer"]}
    kept = {key: config[key] for key in _ENCODERS} | {"encoder": config["encoder"] | own}
    write_text(target / "config.json", json.dumps(kept, indent=1))
    return True


def finished(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the run folder holds all that the recipe trains.

    Images that are not at hand are taken to be those it was trained on: what was measured can be looked at anywhere.
    """
    config = read_config(folder.model) or {}
    stages = ("encoder", "decoder") if recipe.decoder is not None else ("encoder",)
    for stage in stages:
        if config.get(stage, {}).get("digest") != recipe.stage_digest(stage):
            return False
    try:
        images = fingerprint(recipe.data, "train")
    except InputError:
        return True
    return all(config[stage]["images"] == images for stage in stages)
