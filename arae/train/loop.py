"""The one loop: every stage of every run goes through `fit`, in one process or many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from arae.config import Data, Recipe, Stage
from arae.data.augment import augment
from arae.data.load import Source, stream
from arae.errors import AraeError, InputError, Stopped
from arae.runs import RunFolder
from arae.seeds import mix
from arae.train.engine import Engine
from arae.train.log import Log
from arae.train.micro import Micro
from arae.train.state import newest_state, save_state


class Trainer(Protocol):
    """One stage's networks and optimisers."""

    name: str

    def step(self, step: int, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """One optimiser step on this worker's micro-batches; returns scalars to report."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Set `state()` back."""
        ...

    def exported(self) -> dict[str, Tensor]:
        """The weights the stage is for."""
        ...


@dataclass
class Fit:
    """What a stage is run with."""

    recipe: Recipe
    part: Stage
    data: Data
    """The recipe's, with the stage's own augmentation."""
    folder: RunFolder
    source: Source
    engine: Engine
    log: Log
    total: int
    images: str
    """Fingerprint of the training images; a state goes on with no others."""
    validate: Callable[[int], dict[str, float]]
    """Measures on held-out images after a step; rank 0 alone calls it."""
    stop: Callable[[], bool]
    """Whether somebody asked to save and stop."""


def fit(trainer: Trainer, run: Fit) -> float:
    """Train a stage from its newest state to its end; returns the seconds its steps took, earlier runs counted in.

    Raises Stopped after saving where a stop was asked for; AraeError where the loss is no number.
    """
    first, before = resume(trainer, run)
    batches = micro_batches(trainer.name, run, first)
    interval = max(1, min(50, run.total // 50))
    meter = Meter(run.engine, before)
    for step in range(first, run.total):
        micros = [next(batches) for _ in range(run.part.batch // run.part.micro // run.engine.size)]
        meter.add(trainer.step(step, micros), images=run.part.batch)
        done = step + 1
        at_interval = done % interval == 0 or done == run.total
        if at_interval:
            report(trainer.name, run, done, meter)
        if ends_epoch(run, done):
            with meter.paused():
                check(trainer.name, run, done, meter)
        # Workers must agree to stop, which costs them a word; one alone may look at every step.
        stopping = (at_interval or run.engine.size == 1) and run.engine.any(flag=run.stop())
        if done % run.recipe.state.every == 0 or stopping or done == run.total:
            with meter.paused():
                save(trainer, run, done, meter)
        if stopping and done < run.total:
            raise Stopped(
                f"stopped at step {done} of {run.total} of the {trainer.name}; the same command goes on from there"
            )
    return meter.seconds


def resume(trainer: Trainer, run: Fit) -> tuple[int, float]:
    """Set the newest state back, if there is one; returns the first step to make and the seconds spent so far."""
    found = newest_state(run.folder.state, trainer.name, run.log.note)
    if found is None:
        return 0, 0.0
    saved, payload = found
    if saved.digest != run.recipe.stage_digest("encoder" if trainer.name == "encoder" else "decoder"):
        raise InputError(
            f"{run.folder.path}: its state is of another recipe (data, seed or {trainer.name} differ); "
            "give this run another name=… or delete the folder"
        )
    if payload["images"] != run.images:
        raise InputError(
            f"{run.folder.path}: its state was trained on other images than data.train holds now; "
            "put those back, give this run another name=… or delete the folder"
        )
    if payload["precision"] != run.engine.precision:
        raise InputError(
            f"{run.folder.path}: its {trainer.name} was begun in {payload['precision']}, and here it would go on in "
            f"{run.engine.precision}: add precision={payload['precision']}"
        )
    trainer.restore(payload["trainer"])
    run.log.note(f"resumed the {trainer.name} at step {saved.step} of {run.total}")
    return saved.step, payload["seconds"]


def micro_batches(stage: str, run: Fit, first: int) -> Iterator[Micro]:
    """This worker's micro-batches from step `first` on, augmented, in order."""
    per_step = run.part.batch // run.part.micro
    own = run.engine.share(per_step, stage)
    seed = mix(run.recipe.seed, "order", stage)
    data, n = run.data, run.source.n
    chunk = max(1, n // run.part.batch)  # an epoch of ids at a time, not ninety
    for start in range(first, run.total, chunk):
        stop = min(start + chunk, run.total)
        ids = stream(n, run.part.batch, seed, start, stop).reshape(stop - start, per_step, run.part.micro)
        flat = ids[:, own.start : own.stop].reshape(-1, run.part.micro)
        for i, images in enumerate(run.source.batches(flat)):
            where = torch.from_numpy(flat[i])
            labels = run.source.labels[where % n].to(run.engine.device, non_blocking=True)
            ready = augment(
                images, where.to(images.device), data.augment, data.pad, mix(run.recipe.seed, "augment", stage)
            )
            ready = ready.to(run.engine.device, memory_format=torch.channels_last)
            yield Micro(ready, labels, own.start + i % len(own))


class Meter:
    """Sums of what the steps reported, kept on the device: a number is fetched once an interval, not once a step."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.engine = engine
        self.seconds = seconds
        self._interval: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._epoch: dict[str, list[float]] = {}
        self._busy = 0.0  # seconds of this interval's steps before the last pause
        self._since = time.perf_counter()

    def add(self, values: dict[str, Tensor], images: int) -> None:
        """Count one step."""
        for key, value in values.items():
            self._interval[key] = self._interval[key] + value if key in self._interval else value.clone()
        self._steps += 1
        self._images += images

    def interval(self) -> tuple[dict[str, float], float]:
        """Means over the interval and the group, and images a second; starts the next interval."""
        names = sorted(self._interval)
        means = self.engine.mean(torch.stack([self._interval[k].float() for k in names]) / self._steps)
        metrics = dict(zip(names, means.tolist(), strict=True))
        for key, value in metrics.items():
            self._epoch.setdefault(key, []).append(value)
        self._book()
        rate = self._images / self._busy
        self._interval, self._steps, self._images, self._busy = {}, 0, 0, 0.0
        return metrics, rate

    def latest_loss(self) -> float:
        """Mean loss of the interval so far, on this worker; zero where it has no steps."""
        return self._interval["loss"].item() / self._steps if self._steps else 0.0

    def epoch(self) -> dict[str, float]:
        """Means over the intervals since the last call."""
        means = {key: sum(values) / len(values) for key, values in self._epoch.items()}
        self._epoch = {}
        return means

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside (saving, validating) out of the rate and of the seconds."""
        self._book()
        yield
        self._since = time.perf_counter()

    def _book(self) -> None:
        now = time.perf_counter()
        self._busy += now - self._since
        self.seconds += now - self._since
        self._since = now


def report(stage: str, run: Fit, done: int, meter: Meter) -> None:
    """Tell the interval's means; refuse to go on with a loss that is no number."""
    metrics, rate = meter.interval()
    refuse_no_number(stage, metrics["loss"], done)
    epoch = done * run.part.batch / run.source.n
    run.log.emit("interval", stage=stage, step=done, steps=run.total, epoch=epoch, metrics=metrics, images_per_s=rate)


def refuse_no_number(stage: str, loss: float, done: int) -> None:
    """AraeError where the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise AraeError(
            f"the {stage}'s loss is {loss} at step {done}: lower {stage}.lr, or use precision=fp32, under another "
            "name=…; the last state saved is kept"
        )


def ends_epoch(run: Fit, done: int) -> bool:
    """Whether to validate after this step: at the stage's end, and after epochs, about ten times in a stage."""
    if done == run.total:
        return True
    n, batch = run.source.n, run.part.batch
    every = max(1, run.total * batch // n // 10)
    return (done * batch // n) // every > ((done - 1) * batch // n) // every


def check(stage: str, run: Fit, done: int, meter: Meter) -> None:
    """Measure on held-out images and tell it."""
    if run.log.active:
        measured = run.validate(done)
        epoch = round(done * run.part.batch / run.source.n, 2)
        run.log.emit("epoch", stage=stage, step=done, epoch=epoch, metrics=meter.epoch() | measured)


def save(trainer: Trainer, run: Fit, done: int, meter: Meter) -> None:
    """Write the state; rank 0 alone, for every worker has the same."""
    if run.log.active:
        refuse_no_number(trainer.name, meter.latest_loss(), done)  # a state of NaNs would push a good one out
        stage = "encoder" if trainer.name == "encoder" else "decoder"
        digest, keep = run.recipe.stage_digest(stage), run.recipe.state.keep
        payload = {
            "trainer": trainer.state(),
            "seconds": meter.seconds,
            "images": run.images,
            "precision": run.engine.precision,
        }
        save_state(run.folder.state, payload, stage=stage, step=done, digest=digest, keep=keep)
