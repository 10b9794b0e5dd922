"""What a stage is run with: its trainer, and all that surrounds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from arae.config import Data, Recipe, Stage
from arae.data.load import Source
from arae.runs import RunFolder
from arae.seeds import mix
from arae.train.engine import Engine
from arae.train.learner import Learner
from arae.train.log import Log
from arae.train.micro import Micro


class Trainer(Protocol):
    """One stage's networks and optimisers."""

    name: str
    learner: Learner
    """The network that the stage is for."""

    def step(self, step: int, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """One optimiser step on this worker's micro-batches.

        Returns scalars to report, among them `loss`: their mean over the workers is the mean over the batch.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on; every worker must call it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Set `state()` back."""
        ...

    def exported(self) -> dict[str, Tensor]:
        """The weights the stage is for; every worker must call it."""
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

    @property
    def interval(self) -> int:
        """Steps between two reports."""
        return max(1, min(50, self.total // 50))


def digest_of_stage(stage: str, run: Fit) -> str:
    """The part of the recipe that the stage's result depends on, hashed."""
    return run.recipe.stage_digest("encoder" if stage == "encoder" else "decoder")


def order_seed(stage: str, run: Fit) -> int:
    """Addresses the order of a stage's samples."""
    return mix(run.recipe.seed, "order", stage)
