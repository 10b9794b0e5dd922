"""How many trials run side by side, and with what of the machine or cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from arae.config import Recipe
from arae.errors import InputError
from arae.launch import Where
from arae.storage import runs_place
from tune.journal import Entry
from tune.search import Points
from tune.trial import Task

# Ray Tune's own files are of no use to us, and its working folder would break relative paths.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "120",
    "TUNE_MAX_PENDING_TRIALS_PG": "8",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Side:
    """How many trials run side by side, and with what."""

    def __init__(self, recipe: Recipe, where: Where, jobs: int | None) -> None:
        """InputError for more trials at once than there is room for: trials would wait for workers for ever."""
        from cluster.connect import address_of, connect
        from cluster.launch import wants_gpu

        os.environ["ARAE_RUNS"] = runs_place()  # for trials, which begin elsewhere
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.name, self.where = recipe.name, where
        cores = len(os.sched_getaffinity(0))
        alone = where.workers is None
        first = where.torch_device()
        if alone and first.index:
            raise InputError(
                f"--device {where.device}: a sweep gives each of its trials a GPU; write --device cuda, and name those "
                "that it may use in CUDA_VISIBLE_DEVICES"
            )
        gpus = torch.cuda.device_count() if alone and first.type == "cuda" else 0
        most = where.most or where.workers or 1
        wanted = jobs or (gpus or min(cores, 8) if alone else 1)
        connect(replace(where, workers=wanted * most, most=None, cpus=None if alone else where.cpus))
        import ray

        gpu = not alone and wants_gpu(where, ray.cluster_resources(), alone=address_of(where) is None)
        room = max(gpus, 1) if gpus else cores if alone else room_for_trials(where, ray.nodes(), gpu=gpu)
        if room < 1:
            raise InputError(f"--workers {where.workers}: the cluster has no room for that many at once")
        if jobs is not None and jobs > room:
            raise InputError(f"--jobs {jobs}: there is room for {room} trials at once")
        self.jobs = jobs or (wanted if alone else room)
        self.gpu_elsewhere = gpu
        # A trial whose workers train holds no core itself: while it waits for them it would keep them from others. But
        # something it has to hold, says Ray Tune: a mebibyte.
        self.resources = {"cpu": 1.0, "gpu": 1.0} if gpus else {"cpu": 1.0} if alone else {"memory": 2.0**20}

    def task(self, points: Points, entry: Entry) -> Task:
        """What a trial is told."""
        point, recipe = points.recipe_of(entry)
        return Task(
            entry.id,
            self.name,
            point.label,
            dict(point.values),
            recipe.model_dump(mode="json"),
            asdict(self.where),
            str(Path.cwd()),
            points.limits(entry),
            self.gpu_elsewhere,
        )


def room_for_trials(where: Where, nodes: list[Mapping[str, Any]], *, gpu: bool) -> int:
    """How many trials a cluster can hold with all their workers, of elastic ones the most; at least one where the
    least fit. Workers of a group get their places all at once or not at all, so that no trials can block each other."""
    cpus = where.cpus or 1
    places = 0
    for node in nodes:
        has = node["Resources"] if node["Alive"] else {}
        fits = int(has.get("CPU", 0) // cpus)
        places += min(fits, int(has.get("GPU", 0))) if gpu else fits
    least = where.workers or 1
    return max(places // (where.most or least), int(places >= least))
