"""Ray Train as this package uses it: the trainer of one launch, and the only place that knows Ray Train from inside."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from arae.config import Recipe, dump_recipe
from arae.launch import Where
from arae.runs import RunFolder
from cluster.watch import Watch
from cluster.worker import loop

# Helpers that Ray Train starts with every group and that have nothing to do here. There is no Ray dataset; and what
# clears away the placement group of a controller that was killed asks the dashboard, once a second: where none runs it
# hangs, for ten seconds of every command's end. The group's place goes with the command in any case.
NEEDLESS = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


class Trainer(TorchTrainer):
    """TorchTrainer without the needless, whose controller tells `desk` how it can be ended from outside.

    Ray Train offers neither. A Ray that has no such method any more calls nothing here: all goes on as before, slower,
    and a group that does not end by itself is left to the end of the process.
    """

    def __init__(self, desk: Any, **options: Any) -> None:
        super().__init__(loop, **options)
        self._desk = desk

    def _create_default_callbacks(self) -> list[Any]:
        from ray.train.v2._internal.execution.callback import ControllerCallback

        class Handed(ControllerCallback):
            def __init__(self, desk: Any) -> None:
                self.desk = desk

            def after_controller_start(self, train_run_context: Any) -> None:
                self.desk.begun.remote(ray.get_runtime_context().current_actor, train_run_context.run_id)

        kept = [c for c in super()._create_default_callbacks() if type(c).__name__ not in NEEDLESS]
        return [Handed(self._desk), *kept]


def end_controller(controller: Any, run: str) -> None:
    """End a launch from outside, and its workers with it; `run` is Ray Train's name for it."""
    ray.kill(controller)
    # What it has reserved would be kept for three minutes more, and an elastic group that comes next waits for it.
    with suppress(ImportError, RayError):
        from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as coordinator

        coordinator.TrainAutoscalingCoordinatorClient(f"train-{run}").cancel_resource_request()


def make_trainer(recipe: Recipe, folder: RunFolder, where: Where, desk: Any, notes: str, *, gpu: bool) -> Trainer:
    """A trainer that runs `cluster.worker.loop` as `where` says; `notes` is a folder of Ray's own, for nothing."""
    least = where.workers or 1
    return Trainer(
        desk,
        train_loop_config={
            "recipe": dump_recipe(recipe),
            "folder": str(folder.path),
            "cwd": str(Path.cwd()),
            "desk": desk,
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=where.timeout),
        scaling_config=ScalingConfig(
            num_workers=least if where.most is None else (least, where.most),
            use_gpu=gpu,
            resources_per_worker={"CPU": where.cpus or 1} | ({"GPU": 1} if gpu else {}),
            placement_strategy=where.placement.upper(),
        ),
        run_config=RunConfig(
            # A name of its own each time: Ray would otherwise resume from its own bookkeeping, and ours is what counts.
            name=f"{time.time_ns():x}",
            storage_path=notes,
            failure_config=FailureConfig(max_failures=where.restarts),
            callbacks=[Watch(desk)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
