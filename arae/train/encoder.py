"""One step of adversarial training (Madry et al. 2018; Eq. 2 of the ARAE paper). Radius 0 is standard training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arae.attacks.gradient import perturb
from arae.config import Recipe
from arae.models.encoder import Encoder
from arae.seeds import mix
from arae.train import losses
from arae.train.engine import Engine, StepBuffers
from arae.train.micro import Average, Micro
from arae.train.schedule import factor, set_rate


class EncoderTrainer:
    """The classifier, its optimiser, and all that its next step depends on."""

    name = "encoder"

    def __init__(self, recipe: Recipe, model: Encoder, engine: Engine, total: int) -> None:
        """`total`: optimiser steps of the stage."""
        self.recipe, self.part, self.engine, self.total = recipe, recipe.encoder, engine, total
        self.model = engine.place(model)
        self.wrapped = engine.wrap(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.part.lr, self.part.momentum, weight_decay=self.part.weight_decay
        )
        self.scaler = engine.scaler()
        self.buffers = StepBuffers(self.model)
        self.average = Average(self.model, self.part.ema)

    def step(self, step: int, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """Attack, then descend, over this worker's micro-batches of one batch; returns their mean loss and accuracy."""
        self.model.train()
        set_rate(self.optimizer, self.part.lr * factor(self.part.schedule, step, self.total))
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.begin()
        seen = [self._descend(step, micro, len(micros), last=micro is micros[-1]) for micro in micros]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.buffers.end(self.engine)
        self.average.update()
        return {key: torch.stack([one[key] for one in seen]).mean() for key in seen[0]}

    def _descend(self, step: int, micro: Micro, count: int, *, last: bool) -> dict[str, Tensor]:
        seed = mix(self.recipe.seed, "encoder", step, micro.index)
        generator = torch.Generator(self.engine.device).manual_seed(seed) if self.part.attack.random_start else None
        with self.engine.autocast():
            attacked = perturb(self.model, micro.images, micro.labels, self.part.attack, generator)
        torch.manual_seed(seed)  # dropout
        with self.engine.accumulating(self.wrapped, last=last):
            with self.engine.autocast():
                logits = self.wrapped(attacked)
            loss = losses.classification(logits, micro.labels, self.part.label_smoothing)
            self.scaler.scale(loss / count).backward()
        self.buffers.keep()
        hits = (logits.detach().argmax(1) == micro.labels).float().mean()
        return {"loss": loss.detach(), "train_accuracy": hits}

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on; the random numbers depend on (seed, step, micro-batch) alone."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set all of `state()` back."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.average.restore(state["average"])

    def exported(self) -> dict[str, Tensor]:
        """The weights to keep: the moving average where there is one."""
        return self.average.weights()
