"""What each Ray Train worker runs: the library's own training, told where it stands."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import yaml

from arae.config import Recipe
from arae.errors import AraeError, Stopped
from arae.runs import RunFolder
from arae.storage import is_url, mirrored, runs_place
from arae.train.faults import storage_told
from arae.train.log import Log
from arae.train.state import list_states
from cluster.desk import Verdict
from cluster.seat import Seat, this_worker


def loop(config: dict[str, Any]) -> None:
    """Train `config["recipe"]` (YAML) into `config["folder"]`, paths as seen from `config["cwd"]`.

    How it ends, where it is not done, `config["desk"]` is told: Ray Train's own errors are for what may be tried again.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    seat = Seat(config["desk"], this_worker())
    if seat.greeting.verdict is not None:  # another worker has said how this ends
        seat.leave()
        return
    if os.path.isdir(config["cwd"]):
        os.chdir(config["cwd"])  # Ray starts workers elsewhere, and a recipe's paths may be relative
    recipe = Recipe.model_validate(yaml.safe_load(config["recipe"]))
    try:
        # Runs at a URL have a working copy on each machine, at a place of its own.
        folder = RunFolder.of(recipe) if is_url(runs_place()) else RunFolder(Path(config["folder"]))
        work(recipe, folder, seat)
    except AraeError as error:
        agreed = type(error) is Stopped and seat.asked()  # all of the group have it; anything else is perhaps its own
        # Of those who agreed rank 0 writes the state: before it has said so, there may be none.
        seat.leave(verdict_of(error, seat) if seat.member.rank == 0 or not agreed else None)
        if not agreed:
            raise
    else:
        seat.leave()


def work(recipe: Recipe, folder: RunFolder, seat: Seat) -> None:
    """Train from where the run folder stands."""
    import ray.train.torch

    from arae.train.run import train

    lead = seat.member.rank == 0
    with storage_told(folder), mirrored(folder, writer=lead):
        log = Log(folder, seat.tell, active=lead)
        if seat.greeting.restart is not None:
            states = list_states(folder.state)
            step = states[-1].step if states else 0
            log.emit("restart", **seat.greeting.restart, world_size=seat.member.size, step=step)
        train(recipe, folder, ray.train.torch.get_device(), seat.tell if lead else None, seat.stop)


def verdict_of(error: AraeError, seat: Seat) -> Verdict:
    """The error's code and line; where another than rank 0 says it, who does: what it lacks may be there for others."""
    rank, host = seat.member.rank, seat.member.host
    return Verdict(error.exit_code, f"{error} (worker {rank} on {host})" if rank else str(error))
