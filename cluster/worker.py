"""What each Ray Train worker runs: the library's own training, told where it stands."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import yaml

from arae.config import Recipe
from arae.errors import DiskFull, Stopped
from arae.runs import RunFolder


def loop(config: dict[str, Any]) -> str | None:
    """Train `config["recipe"]` (YAML) into `config["folder"]`, paths as seen from `config["cwd"]`.

    Returns why it stopped, None where it is done.
    """
    import ray.train.torch

    from arae.train.run import train

    logging.getLogger("ray").setLevel(logging.ERROR)
    if os.path.isdir(config["cwd"]):
        os.chdir(config["cwd"])  # Ray starts workers elsewhere, and a recipe's paths may be relative
    recipe = Recipe.model_validate(yaml.safe_load(config["recipe"]))
    folder = RunFolder(Path(config["folder"]))
    rank = ray.train.get_context().get_world_rank()
    try:
        # The driver asks for a stop through the folder: it may run on another machine than rank 0.
        train(recipe, folder, ray.train.torch.get_device(), stop=lambda: rank == 0 and folder.stop.exists())
    except DiskFull:
        raise  # rank 0 alone knows: the others must not wait for it
    except Stopped as stopped:
        return str(stopped)
    return None
