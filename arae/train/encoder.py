"""One step of adversarial training: PGD's (Madry et al. 2018; Eq. 2 of the ARAE paper), or TRADES, MART or GAIRAT.

Radius 0 is standard training, whatever the objective. Every attack sees the network in evaluation mode. TRADES and MART
compare the attacked images with the clean ones: each kind goes through the network in training mode on its own, the
clean one first, as in the authors' code, so batch norm does not mix them; its running statistics take up both in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arae.attacks.gradient import perturb, perturb_unprojected, perturb_until_misclassified
from arae.attacks.network import AttackNetwork
from arae.attacks.threat import Threat
from arae.config import Attack, Recipe, Span
from arae.errors import InputError
from arae.models.encoder import Encoder
from arae.seeds import mix
from arae.train import losses, objectives
from arae.train.engine import Engine, StepBuffers
from arae.train.micro import Average, Micro
from arae.train.optimisers import SGD
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
        self.quick = AttackNetwork(model) if self.part.quick_attack and self.part.attack.eps else None
        pieces = engine.choice.kind == "deepspeed" and engine.choice.stage == 3
        if pieces and self.part.early_stop is not None and not self.part.quick_attack:
            raise InputError(
                f"encoder.early_stop = {self.part.early_stop}: in ZeRO's stage 3 workers ask for weights together, and "
                "with it each asks another number of times; set encoder.quick_attack=true, or engine.stage=2"
            )
        self.learner = engine.learner(model, self._optimizer)
        self.buffers = StepBuffers(self.model)
        self.spans = self.part.spans()
        self.hardened = False
        """Whether the guard has found catastrophic overfitting."""
        with self.learner.whole():
            self.average = Average(self.model, self.part.ema)

    def _optimizer(self, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return SGD(weights, self.part.lr, self.part.momentum, weight_decay=self.part.weight_decay)

    def step(self, step: int, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """Attack, then descend, over this worker's micro-batches of one batch; returns their mean loss and accuracy."""
        self.model.train()
        if self.part.replays > 1 and self.part.attack.eps and not self.hardened:
            return self._replay(step, micros)
        self.learner.start(self.part.lr * factor(self.part.schedule, step, self.total))
        self.buffers.begin()
        share = micros[0].of / self.engine.size
        attacked = self._attacked()
        seen = [self._descend(step, micro, attacked, share, last=micro is micros[-1]) for micro in micros]
        self.learner.update()
        self.buffers.end(self.engine, share)
        if self.part.ema:
            with self.learner.whole():
                self.average.update()
        return {key: torch.stack([one[key] for one in seen]).sum() / share for key in seen[0]}

    def _replay(self, step: int, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """Free adversarial training (Shafahi et al. 2019, Algorithm 1): several updates on the same batch.

        One backward pass gives the gradients of the weights and those of the images, which move the perturbations of
        the next update. Each batch begins with perturbations of its own (theirs are those that the batch before left),
        so that a step depends on nothing but its address. Returns the mean over the updates.
        """
        span = self._span(step)
        attack = self._radius(step, span.attack)
        assert attack.norm is not None
        threat, size = Threat(attack.norm, attack.eps), attack.eps if attack.step_size is None else attack.step_size
        micros = [resized(micro, span.scale) for micro in micros]
        share, rate = micros[0].of / self.engine.size, self.part.lr * factor(self.part.schedule, step, self.total)
        seeds = [mix(self.recipe.seed, "encoder", step, micro.index) for micro in micros]
        perturbed = [micro.images for micro in micros]
        if attack.random_start:
            generators = [torch.Generator(self.engine.device).manual_seed(seed) for seed in seeds]
            pairs = zip(perturbed, generators, strict=True)
            perturbed = [(images + threat.sample(images, generator)).clamp(0, 1) for images, generator in pairs]
        seen = []
        for replay in range(self.part.replays):
            self.learner.start(rate)
            self.buffers.begin()
            for i, micro in enumerate(micros):
                last = micro is micros[-1]
                torch.manual_seed(mix(seeds[i], "replay", replay))  # dropout
                images = perturbed[i].detach().requires_grad_()
                with self.learner.accumulating(last=last):
                    with self.engine.autocast():
                        logits = self.learner(images)
                    loss = self._loss(None, logits, micro.labels, None)
                    self.learner.backward(loss / share, last=last)
                self.buffers.keep()
                assert images.grad is not None
                # A loss scaled for fp16 may overflow: that update is left out, and a pixel without a number stays.
                gradient = images.grad.nan_to_num(0.0, 0.0, 0.0)
                perturbed[i] = threat.move(images, micro.images, gradient, size)
                hits = (logits.detach().argmax(1) == micro.labels).float().mean()
                seen.append({"loss": loss.detach(), "train_accuracy": hits})
            self.learner.update()
            self.buffers.end(self.engine, share)
        if self.part.ema:
            with self.learner.whole():
                self.average.update()
        return {key: torch.stack([one[key] for one in seen]).mean() * len(micros) / share for key in seen[0]}

    def _attacked(self) -> Encoder | AttackNetwork:
        """The network that a step's attacks see: a copy as of now, made for them, or the network itself."""
        if self.quick is None:
            return self.model
        with self.learner.whole():
            self.quick.refresh(self.engine.dtype)
        return self.quick

    def _descend(
        self, step: int, micro: Micro, network: Encoder | AttackNetwork, share: float, *, last: bool
    ) -> dict[str, Tensor]:
        seed = mix(self.recipe.seed, "encoder", step, micro.index)
        generator = torch.Generator(self.engine.device).manual_seed(seed)
        span = self._span(step)
        micro = resized(micro, span.scale)
        with nullcontext() if network is self.quick else self.engine.autocast():
            attacked, weights = self._attack(step, span, micro, network, generator)
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

    def _attack(
        self, step: int, span: Span, micro: Micro, network: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """The images to learn from, and GAIRAT's weights once they count."""
        part, x, y = self._radius(step, span.attack), micro.images, micro.labels
        if self.part.noise and not self.hardened:
            return perturb_unprojected(network, x, y, part, self.part.noise, generator), None
        if self.part.early_stop is not None and not self.hardened:
            return perturb_until_misclassified(network, x, y, part, self.part.early_stop, generator), None
        if self.kind == "trades":
            return objectives.perturb_divergence(network, x, part, generator), None
        if self.kind == "gairat" and step >= self.part.objective.burn_in * self.total:
            attacked, held = objectives.perturb_counting(network, x, y, part, generator)
            return attacked, objectives.geometry_weights(held, part.steps, self.part.objective.shift)
        return perturb(network, x, y, part, generator), None

    def harden(self) -> None:
        """From now on attack as the recipe's guard says."""
        self.hardened = True

    def _span(self, step: int) -> Span:
        """The part of the stage that a step belongs to."""
        span = next(span for span in self.spans if step < span.until * self.total)
        if not self.hardened or self.part.guard is None:
            return span
        harder = {"steps": self.part.guard.steps, "step_size": None}
        return span._replace(attack=span.attack.model_copy(update=harder))

    def _radius(self, step: int, attack: Attack) -> Attack:
        """The attack at a step: while the radius warms up, a smaller one."""
        share = (step + 1) / max(self.part.radius_warmup * self.total, 1)
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
        } | ({"hardened": self.hardened} if self.part.guard else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Set all of `state()` back."""
        self.learner.restore({"weights": state["model"], "optimizer": state["optimizer"], "scaler": state["scaler"]})
        self.average.restore(state["average"])
        self.hardened = state.get("hardened", False)

    def exported(self) -> dict[str, Tensor]:
        """The weights to keep: the moving average where there is one."""
        return self.average.weights(self.learner.state()["weights"])


def sides(size: Sequence[int], scale: float) -> list[int]:
    """Height and width times `scale`, in whole pixels."""
    return [max(1, round(scale * side)) for side in size]


def resized(micro: Micro, scale: float) -> Micro:
    """The micro-batch with its images' sides times `scale`."""
    if scale == 1:
        return micro
    size = sides(micro.images.shape[2:], scale)
    smaller = F.interpolate(micro.images, size, mode="bilinear", antialias=True).clamp(0, 1)
    return replace(micro, images=smaller.contiguous(memory_format=torch.channels_last))
