"""What both training stages share: the micro-batch and the moving average of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Micro:
    """One micro-batch of a step. images: [m, C, H, W] float in [0, 1]; labels: [m] int64."""

    images: Tensor
    labels: Tensor
    index: int
    """Its number within the global batch: with the step, its address for random numbers."""
    of: int = 1
    """How many micro-batches the global batch has, on all workers."""


class Average:
    """Exponential moving average of a module's weights; decay 0 keeps none and gives the weights themselves."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.shadow = {k: v.detach().clone() for k, v in module.named_parameters()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step: shadow = decay · shadow + (1 - decay) · weights."""
        for name, weight in self.module.named_parameters() if self.decay else ():
            self.shadow[name].lerp_(weight, 1 - self.decay)

    def weights(self, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's whole state dict `plain` with averaged parameters, on the CPU, in plain memory order."""
        merged = plain | self.shadow
        return {k: v.detach().cpu().contiguous().clone() for k, v in merged.items()}

    def state(self) -> dict[str, Tensor]:
        """The averages."""
        return dict(self.shadow)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the averages back."""
        for name, value in state.items():
            self.shadow[name].copy_(value)
