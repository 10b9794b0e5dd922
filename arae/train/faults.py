"""What can go wrong in the middle of training, and the one line that is said of it."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from arae.config import Recipe
from arae.errors import AraeError, DiskFull, InputError, Stopped
from arae.models.autoencoder import read_config
from arae.runs import RunFolder
from arae.train.state import list_states

if TYPE_CHECKING:
    from arae.data.load import Source
    from arae.train.engine import Engine

FULL = (errno.ENOSPC, errno.EDQUOT)
GONE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EROFS, errno.ETIMEDOUT, errno.EHOSTDOWN)
ROLLBACKS = 3  # batches left out: a stage that leaves the numbers more often has another fault than an odd batch
GIB = 2**30


class LostNumbers(Exception):  # noqa: N818 -- the loop handles it; it never reaches a user
    """The loss, or a weight, is NaN or infinite; raised on every worker alike."""

    def __init__(self, step: int, loss: float, *, exact: bool) -> None:
        """`step`: the first whose loss it was, or whose update left such weights, counted from 0.

        exact: it is this step's doing; else it may also have been the update of the step before.
        """
        super().__init__(f"loss {loss} in step {step}")
        self.step, self.loss, self.exact = step, loss, exact

    @property
    def suspects(self) -> list[int]:
        """The steps whose batches may have led to it."""
        return [self.step] if self.exact or not self.step else [self.step - 1, self.step]


class Overfitted(Exception):  # noqa: N818 -- the loop handles it; it never reaches a user
    """Catastrophic overfitting: held-out robustness has collapsed; raised on every worker alike."""

    def __init__(self, step: int, score: float, best: float) -> None:
        """`step`: steps made; `score`: robust accuracy there, `best`: the best before."""
        super().__init__(f"robust accuracy {score} after {best}, step {step}")
        self.step, self.score, self.best = step, score, best


def lost_numbers(stage: str, lost: LostNumbers, *, tried: bool) -> AraeError:
    """What ends a stage whose loss is no number; `tried`: after going back did not help."""
    again = f" again, after {ROLLBACKS} batches were left out" if tried else ""
    return AraeError(
        f"the {stage}'s loss is {lost.loss} at step {lost.step + 1}{again}: lower {stage}.lr, or use precision=fp32, "
        "under another name=…; the last state saved is kept, and not_finite.jsonl names the batch's images"
    )


def write_batches(folder: RunFolder, stage: str, lost: LostNumbers, ids: np.ndarray, n: int) -> None:
    """Append what a loss was lost on to `not_finite.jsonl`: `images` are positions in data.train.

    ids: int64 [suspects, batch], epoch * n + index, of the suspected steps; n: training images.
    """
    batches = [
        {"step": step, "epochs": np.unique(row // n).tolist(), "images": (row % n).tolist()}
        for step, row in zip(lost.suspects, ids, strict=True)
    ]
    line = {"stage": stage, "step": lost.step, "loss": str(lost.loss), "batches": batches}
    with (folder.path / "not_finite.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def memory_told(recipe: Recipe, stage: str, source: Source, engine: Engine) -> Iterator[None]:
    """Around a stage: a device that runs out of memory is an InputError that says what would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(recipe, stage, source, _device_memory(engine.device), engine) from error


def out_of_memory(recipe: Recipe, stage: str, source: Source, there: int | None, engine: Engine) -> InputError:
    """What is said of a step that does not fit; `there`: bytes of the device, None where unknown."""
    part = recipe.encoder if stage == "encoder" else recipe.decoder
    assert part is not None
    said = f"{stage}: out of memory"
    lower = f"set {stage}.micro_batch lower" + (", or decoder.recompute higher" if stage == "decoder" else "")
    try:
        return InputError(said + _fitting(recipe, stage, source, there, engine, lower))
    except Exception:  # noqa: BLE001 -- what would fit could not be told; what went wrong must be
        return InputError(f"{said} with a micro-batch of {part.micro} images; {lower}")


def _fitting(recipe: Recipe, stage: str, source: Source, there: int | None, engine: Engine, lower: str) -> str:
    """How much a step needs, and which micro-batch would fit."""
    from arae.cost import Networks
    from arae.footprint import footprint, largest_fitting

    part = recipe.encoder if stage == "encoder" else recipe.decoder
    assert part is not None
    begun = recipe.replace({"precision": engine.precision})
    networks = Networks(begun, source.shape, len(source.classes))
    needed = sum(footprint(networks, stage, engine.device, engine.size).values())
    said = f"; a micro-batch of {part.micro} images needs about {needed / GIB:.2f} GiB"
    if there is None:
        return f"{said}; {lower}"
    said += f" (kernels and the allocator come on top), and the device has {there / GIB:.2f} GiB"
    fitting = largest_fitting(networks, stage, engine.device, int(0.9 * there), engine.size, below=part.micro)
    if fitting is None:
        return f"{said}: not even one image fits; take a device with more memory, or engine=deepspeed"
    return f"{said}; the largest that should fit: {stage}.micro_batch={fitting}"


def _device_memory(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@contextmanager
def storage_told(folder: RunFolder) -> Iterator[None]:
    """A disk that fills up or goes away is an end with one line, and with what is safe said."""
    was_there = folder.path.is_dir()  # what could never be made has not gone away
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _full(folder) from None
        if error.errno in GONE or (was_there and not folder.path.is_dir()):
            raise Stopped(
                f"{folder.path}: the storage does not answer ({error.strerror}); once it is back, the same command "
                "goes on from the newest state that is on it"
            ) from None
        raise


def _full(folder: RunFolder) -> AraeError:
    states = list_states(folder.state)
    if states or (read_config(folder.model) or {}).get("encoder"):
        kept = f"the {states[-1].stage}'s state of step {states[-1].step}" if states else "the finished encoder"
        return DiskFull(f"{folder.path}: the disk is full; {kept} is kept: make room and run the same command again")
    return InputError(f"{folder.path}: the disk is full; make room, or set ARAE_RUNS to a folder on another disk")
