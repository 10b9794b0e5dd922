"""Run a recipe's training in this process or through Ray Train: the same worker code, one log, one listener."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import FrameType
from typing import Literal

import torch

from arae.checkout import checkout_module
from arae.config import Recipe, flatten, load_recipe
from arae.errors import InputError, Stopped
from arae.models.autoencoder import read_config
from arae.runs import RunFolder
from arae.train.engine import check_share, default_device
from arae.train.log import Listener
from arae.train.run import train
from arae.train.state import list_states

PLACEMENTS = ("pack", "spread")
Stop = Callable[[], bool]
"""A question whether to save and end."""


@dataclass(frozen=True)
class Where:
    """Where to run, and how long to bear with what happens there; never part of a recipe."""

    workers: int | None = None
    """Ray Train workers; None trains in this process, without Ray."""
    address: str | None = None
    """A running Ray cluster (`auto`, `ray://…`); None starts one on this machine for the command's time."""
    device: str | None = None
    """`cpu`, `cuda`, `cuda:1`; None takes the first GPU where there is one."""
    most: int | None = None
    """An elastic run has from `workers` up to so many, as the cluster has room; None keeps to `workers`."""
    cpus: int | None = None
    """CPU cores for each worker; None: 1."""
    gpus: int | None = None
    """GPUs for each worker, 0 or 1; None: 1 where the cluster has any."""
    placement: str = "pack"
    """`pack`: workers close together; `spread`: on as many machines as can be."""
    restarts: int = 100
    """How often the workers are started anew after a failure, in one launch."""
    wait: float = 30.0
    """Minutes without the workers asked for, at the start or after a failure, before the launch gives up."""
    timeout: int = 600
    """Seconds in which a worker must answer, and the workers must get together in a collective."""

    def __post_init__(self) -> None:
        """InputError for a number out of its range, a flag that needs workers without them, a device not there."""
        if self.workers is not None and self.workers < 1:
            raise InputError(
                f"--workers {self.workers}: at least 1 worker must train; leave it out to train in this process"
            )
        if self.most is not None and self.most < (self.workers or 1):
            raise InputError(f"--workers {self.workers}:{self.most}: the first number is the smaller one")
        if self.device is not None:
            self._check_device()
        for name, value in (("address", self.address), ("cpus", self.cpus), ("gpus", self.gpus)):
            if value is not None and self.workers is None:
                raise InputError(f"--{name} {value} needs --workers N: how many of the cluster's workers to use")
        self._check_numbers()

    def torch_device(self) -> torch.device:
        """The device of an in-process run, and of an evaluation's driver: one of this machine's."""
        there = self.device is not None and (self.device == "cpu" or torch.cuda.is_available())
        return torch.device(str(self.device)) if there else default_device()

    def alone(self) -> Where:
        """This process alone, on this machine's device."""
        return Where(device=str(self.torch_device()))

    def worker_device(self) -> torch.device:
        """What training will be on as far as can be told here: a cluster's head needs no GPU of its own."""
        if self.address is None or self.device == "cpu" or self.gpus == 0:
            return self.torch_device()
        return torch.device("cuda")

    def _check_numbers(self) -> None:
        if self.cpus is not None and self.cpus < 1:
            raise InputError(f"--cpus {self.cpus}: a worker needs at least 1 CPU core")
        if self.gpus not in (None, 0, 1):
            raise InputError(f"--gpus {self.gpus}: write 0 or 1; a worker trains on one GPU, so take more --workers")
        if self.gpus == 1 and self.device == "cpu":
            raise InputError("--gpus 1 --device cpu: they contradict each other; leave one out")
        if self.placement not in PLACEMENTS:
            raise InputError(f"--placement {self.placement}: write {' or '.join(PLACEMENTS)}")
        if self.restarts < 0:
            raise InputError(f"--restarts {self.restarts}: write how many failures to survive, 0 for none")
        for name, value, unit in (("wait", self.wait, "minutes"), ("timeout", self.timeout, "seconds")):
            if not 0 < value < float("inf"):
                raise InputError(f"--{name} {value:g}: write a number of {unit} above 0")

    def _check_device(self) -> None:
        """InputError for a device that is not of a known kind, or that this machine lacks while it is to train."""
        assert self.device is not None
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise InputError(f"--device {self.device}: write cpu, cuda or cuda:N")
        device = torch.device(self.device)
        elsewhere = self.address is not None
        if device.type == "cuda" and not elsewhere and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {self.device}: this machine has {torch.cuda.device_count()} CUDA devices")


def parse_workers(text: str) -> tuple[int, int | None]:
    """`4` as (4, None), `2:8` as (2, 8); InputError for anything else."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if found is None:
        raise InputError(f"--workers {text}: write a number, or MIN:MAX for a group that grows and shrinks")
    least, most = found.groups()
    return int(least), None if most is None else int(most)


def launch(recipe: Recipe, folder: RunFolder, where: Where, listener: Listener, stop: Stop | None = None) -> None:
    """Train the recipe into its run folder, which `session` holds; returns when it is trained.

    `stop` is asked whether to save and end; by default, whether a signal came to this process.

    Raises what `arae.train.run.train` raises, wherever it was raised; with workers also what `cluster.launch` adds.
    """
    parts = [(what, part) for what, part in (("encoder", recipe.encoder), ("decoder", recipe.decoder)) if part]
    least, shares = where.workers or 1, min(part.batch // part.micro for _, part in parts)
    if where.most is not None and least <= shares:  # more than there is work for would be refused by the training
        where = replace(where, most=min(where.most, shares))
    for what, part in parts:  # said here, before a cluster is started for it; of a group that changes, of every size
        for workers in range(least, (where.most or least) + 1):
            check_share(part.batch // part.micro, workers, what, recipe.engine)
    with nullcontext(stop) if stop is not None else stop_requested() as stop:
        if where.workers is None:
            train(recipe, folder, where.torch_device(), listener, stop)
        else:
            checkout_module("cluster.launch").launch(recipe, folder, where, listener, stop)
        if stop():  # it came too late for the training to hear, but not for what comes next
            raise Stopped(f"{folder.path}: trained, then stopped; the same command goes on from there")


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """A question whether Ctrl-C or SIGTERM came; a second Ctrl-C interrupts at once."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_another(recipe: Recipe, folder: RunFolder) -> None:
    """InputError, with the difference, where the folder holds training that this recipe would not have made."""
    if not folder.recipe.is_file():
        return
    old = load_recipe(folder.path)
    begun = {s.stage for s in list_states(folder.state)} | set(read_config(folder.model) or {})
    stages: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    for stage in stages:
        if stage in begun and old.stage_digest(stage) != recipe.stage_digest(stage):
            was, now = (flatten(r.model_dump(mode="json")) for r in (old, recipe))
            changed = [
                k for k in now if now[k] != was.get(k) and k.split(".")[0] in ("seed", "data", "encoder", "decoder")
            ]
            shown = ", ".join(f"{k} = {was.get(k)!r} there, {now[k]!r} here" for k in changed[:4])
            raise InputError(
                f"{folder.path} holds a run of another recipe ({shown}); "
                "give this run another name=… or delete the folder"
            )
