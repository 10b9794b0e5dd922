"""Run a recipe's training in this process or through Ray Train: the same worker code, one log, one listener."""

from __future__ import annotations

import importlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Literal

import torch

from arae.config import Recipe, flatten, load_recipe
from arae.errors import InputError, Stopped
from arae.models.autoencoder import read_config
from arae.runs import RunFolder
from arae.train.engine import check_share, default_device
from arae.train.log import Listener
from arae.train.run import train
from arae.train.state import list_states


@dataclass(frozen=True)
class Where:
    """Where to run; never part of a recipe."""

    workers: int | None = None
    """Ray Train workers; None trains in this process, without Ray."""
    address: str | None = None
    """A running Ray cluster (`auto`, `ray://…`); None starts one on this machine for the command's time."""
    device: str | None = None
    """`cpu`, `cuda`, `cuda:1`; None takes the first GPU where there is one."""

    def __post_init__(self) -> None:
        """InputError for fewer than one worker, an address without workers, a device that is not there."""
        if self.workers is not None and self.workers < 1:
            raise InputError(
                f"--workers {self.workers}: at least 1 worker must train; leave it out to train in this process"
            )
        if self.device is not None:
            self._check_device(self.device)
        if self.address is not None and self.workers is None:
            raise InputError(f"--address {self.address} needs --workers N: how many of the cluster's workers to use")

    def torch_device(self) -> torch.device:
        """The device of an in-process run, and of evaluation."""
        return default_device() if self.device is None else torch.device(self.device)

    @staticmethod
    def _check_device(name: str) -> None:
        """InputError for a device that is not of a known kind, or that this machine does not have."""
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise InputError(f"--device {name}: write cpu, cuda or cuda:N")
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")


def launch(recipe: Recipe, folder: RunFolder, where: Where, listener: Listener) -> None:
    """Train the recipe into its run folder, which `session` holds; returns when it is trained.

    Raises what `arae.train.run.train` raises, wherever it was raised.
    """
    for what, part in (("encoder", recipe.encoder), ("decoder", recipe.decoder)):
        if part is not None:  # said here, before a cluster is started for it
            check_share(part.batch // part.micro, where.workers or 1, what)
    folder.stop.unlink(missing_ok=True)
    with stop_requested() as stop:
        if where.workers is None:
            train(recipe, folder, where.torch_device(), listener, stop)
        else:
            checkout_module("cluster.launch").launch(recipe, folder, where, listener, stop)
        if stop():  # it came too late for the training to hear, but not for what comes next
            raise Stopped(f"{folder.path}: trained, then stopped; the same command goes on from there")


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
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


def checkout_module(name: str) -> ModuleType:
    """A module of the drivers beside the package, which run from a checkout only.

    Raises InputError where arae was installed without them.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / name.split(".")[0]).is_dir():
        raise InputError(
            f"this needs {name}, which is run from a checkout of arae and is not part of the installed package"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(name)
