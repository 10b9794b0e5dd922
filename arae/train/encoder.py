"""One step of adversarial training: PGD's (Madry et al. 2018; Eq. 2 of the ARAE paper), or TRADES, MART or GAIRAT.

Radius 0 is standard training, whatever the objective. Every attack sees the network in evaluation mode. TRADES and MART
compare the attacked images with the clean ones: each kind goes through the network in training mode on its own, the
clean one first, as in the authors' code, so batch norm does not mix them; its running statistics take up both in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arae.attacks.gradient import perturb
from arae.config import Attack, Recipe
from arae.models.encoder import Encoder
from arae.seeds import mix
from arae.train import losses, objectives
from arae.train.engine import Engine, StepBuffers
from arae.train.micro import Average, Micro
from arae.train.schedule import factor


class EncoderTrainer:
    """The classifier, its optimiser, and all that its next step depends on."""

    name = "encoder"

    def __init__(self, recipe: Recipe, model: Encoder, engine: Engine, total: int) -> None:
        """`total`: optimiser steps of the stage."""
        objectives.check_objective(recipe.encoder)
        self.recipe, self.part, self.engine, self.total = recipe, recipe.encoder, engine, total
        self.kind = self.part.objective.kind if self.part.attack.eps else "at"
        self.beta = self.part.objective.beta or objectives.BETA.get(self.kind, 0.0)
        self.model = model
        self.learner = engine.learner(model, self._optimizer)
        self.buffers = StepBuffers(self.model)
        with self.learner.whole():
            self.average = Average(self.model, self.part.ema)

    def _optimizer(self, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(weights, self.part.lr, self.part.momentum, weight_decay=self.part.weight_decay)

    def step(self, step: int, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """Attack, then descend, over this worker's micro-batches of one batch; returns their mean loss and accuracy."""
        self.model.train()
        self.learner.start(self.part.lr * factor(self.part.schedule, step, self.total))
        self.buffers.begin()
        share = micros[0].of / self.engine.size
        seen = [self._descend(step, micro, share, last=micro is micros[-1]) for micro in micros]
        self.learner.update()
        self.buffers.end(self.engine, share)
        if self.part.ema:
            with self.learner.whole():
                self.average.update()
        return {key: torch.stack([one[key] for one in seen]).sum() / share for key in seen[0]}

    def _descend(self, step: int, micro: Micro, share: float, *, last: bool) -> dict[str, Tensor]:
        seed = mix(self.recipe.seed, "encoder", step, micro.index)
        with self.engine.autocast():
            attacked, weights = self._attack(step, micro, torch.Generator(self.engine.device).manual_seed(seed))
        torch.manual_seed(seed)  # dropout
        with self.learner.accumulating(last=last):
            with self.engine.autocast():
                clean = self.learner(micro.images) if self.kind in ("trades", "mart") else None
                logits = self.learner(attacked)
            loss = self._loss(clean, logits, micro.labels, weights)
            self.learner.backward(loss / share, last=last)
        self.buffers.keep()
        hits = (logits.detach().argmax(1) == micro.labels).float().mean()
        return {"loss": loss.detach(), "train_accuracy": hits}

    def _attack(self, step: int, micro: Micro, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The images to learn from, and GAIRAT's weights once they count."""
        part, x, y = self._radius(step), micro.images, micro.labels
        if self.kind == "trades":
            return objectives.perturb_divergence(self.model, x, part, generator), None
        if self.kind == "gairat" and step >= self.part.objective.burn_in * self.total:
            attacked, held = objectives.perturb_counting(self.model, x, y, part, generator)
            return attacked, objectives.geometry_weights(held, part.steps, self.part.objective.shift)
        return perturb(self.model, x, y, part, generator), None

    def _radius(self, step: int) -> Attack:
        """The attack at a step: while the radius warms up, a smaller one."""
        attack, share = self.part.attack, (step + 1) / max(self.part.radius_warmup * self.total, 1)
        if share >= 1 or not attack.eps:
            return attack
        size = None if attack.step_size is None else attack.step_size * share
        return attack.model_copy(update={"eps": attack.eps * share, "step_size": size})

    def _loss(self, clean: Tensor | None, logits: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """The objective's mean loss, from the clean images' logits, where it needs them, and the attacked ones'."""
        if clean is not None:
            return (objectives.trades if self.kind == "trades" else objectives.mart)(clean, logits, y, self.beta)
        if weights is not None:
            return objectives.gairat(logits, y, weights)
        return losses.classification(logits, y, self.part.label_smoothing)

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on; the random numbers depend on (seed, step, micro-batch) alone."""
        learnt = self.learner.state()
        return {
            "model": learnt["weights"],
            "optimizer": learnt["optimizer"],
            "scaler": learnt["scaler"],
            "average": self.average.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set all of `state()` back."""
        self.learner.restore({"weights": state["model"], "optimizer": state["optimizer"], "scaler": state["scaler"]})
        self.average.restore(state["average"])

    def exported(self) -> dict[str, Tensor]:
        """The weights to keep: the moving average where there is one."""
        return self.average.weights(self.learner.state()["weights"])
