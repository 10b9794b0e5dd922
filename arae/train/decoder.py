"""One step of decoder training: pixel, feature and adversarial losses over a frozen encoder (Eqs. 3 to 7 of the paper).

The discriminator steps first, then the generator, once each a batch, as in the authors' code. The features are
encoded once, and the reconstruction is made once where a worker has a single micro-batch; with several, the
generator's graph is made anew in its own half of the step, for the discriminator must have seen the whole batch before
the generator moves.

What is compared, by the feature loss and by the discriminator, need not be what is decoded: as in the authors' code,
the decoder may get the features of images normalised by 2x - 1, or another network may compare
(`decoder.normalisation`, `decoder.comparator`). Then the images are encoded a second time, by the comparator, which
keeps its own normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arae.attacks.network import quicken
from arae.config import Losses, Recipe
from arae.models.encoder import Encoder
from arae.models.wavelet import WaveletCode
from arae.precision import full
from arae.seeds import mix
from arae.train import losses
from arae.train.engine import Engine, StepBuffers
from arae.train.micro import Average, Micro
from arae.train.networks import code
from arae.train.optimisers import Adam
from arae.train.schedule import factor


class Codes(NamedTuple):
    """One micro-batch, encoded."""

    decoded: Tensor | WaveletCode
    """What the decoder decodes."""
    compared: Tensor
    """What the feature loss and the discriminator compare; the same tensor where the encoder itself compares."""


class DecoderTrainer:
    """Generator, discriminator (where there is an adversarial loss), their optimisers; the encoder stays as it is."""

    name = "decoder"

    def __init__(
        self,
        recipe: Recipe,
        encoder: Encoder,
        generator: nn.Module,
        discriminator: nn.Module | None,
        engine: Engine,
        total: int,
        *,
        weights: Losses | None = None,
        comparator: Encoder | None = None,
    ) -> None:
        """`total`: optimiser steps of the stage; `discriminator` is for an adversarial loss, which requires it.

        weights: those of the losses, which a preset leaves to the shapes (`losses.resolved`); default: the recipe's.
        comparator: the recipe's, if it has one; default: the encoder.
        """
        assert recipe.decoder is not None
        self.recipe, self.part, self.engine, self.total = recipe, recipe.decoder, engine, total
        self.weights = weights or self.part.losses
        assert self.weights.preset is None, "a preset is to be resolved first"
        # Frozen and in eval mode for good: batch norm of a "frozen" encoder in train mode would still drift.
        own = engine.place(encoder).eval().requires_grad_(False)
        quicken(own.net)
        self.encoder = engine.place(own.normalised_by(self.part.normalisation)).eval().requires_grad_(False)
        self.comparator, self.compared_layer = own, self.recipe.encoder.layer
        if self.part.comparator is not None:
            assert comparator is not None, "the recipe has a comparator"
            self.comparator = engine.place(comparator).eval().requires_grad_(False)
            quicken(self.comparator.net)
            self.compared_layer = self.part.comparator.layer
        betas = (float(self.part.betas[0]), float(self.part.betas[1]))
        adam = partial(Adam, lr=self.part.lr, betas=betas, weight_decay=self.part.weight_decay)
        self.generator = generator
        self.learner = engine.learner(generator, adam)
        self.buffers = StepBuffers(self.generator)
        with self.learner.whole():
            self.average = Average(self.generator, self.part.ema)
        self.discriminator: nn.Module | None = None
        if self.weights.adversarial:
            assert discriminator is not None, "an adversarial loss needs a discriminator"
            self.discriminator = discriminator
            self.critic = engine.learner(discriminator, adam)
            self.d_buffers = StepBuffers(self.discriminator)

    def step(self, step: int, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """One discriminator and one generator step on a batch; returns each loss, mean over the micro-batches."""
        self.generator.train()
        scale = factor(self.part.schedule, step, self.total)
        self.buffers.begin()
        codes = [self._encode(micro.images) for micro in micros]
        once = self._reconstruct(codes[0].decoded) if len(micros) == 1 else None
        seen: dict[str, Tensor] = {}
        if self.discriminator is not None:
            self.critic.start(self.part.discriminator_lr * scale)
            seen |= self._discriminator_step(step, micros, codes, once)
        self.learner.start(self.part.lr * scale)
        seen |= self._generator_step(step, micros, codes, once)
        self.buffers.end(self.engine, micros[0].of / self.engine.size)
        if self.part.ema:
            with self.learner.whole():
                self.average.update()
        return seen

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Codes:
        with self.engine.autocast():
            decoded = code(self.encoder, images, self.part_layer)
            if self.comparator is self.encoder or not (self.weights.feature or self.discriminator):
                return Codes(decoded, decoded.code if isinstance(decoded, WaveletCode) else decoded)
            return Codes(decoded, full(self.comparator.features(images, self.compared_layer)))

    def _reconstruct(self, features: Tensor | WaveletCode) -> Tensor:
        with self.engine.autocast():
            return full(self.learner(features))

    @property
    def part_layer(self) -> str | None:
        """The recipe's tap."""
        return self.recipe.encoder.layer

    def _discriminator_step(
        self, step: int, micros: Sequence[Micro], codes: Sequence[Codes], once: Tensor | None
    ) -> dict[str, Tensor]:
        assert self.discriminator is not None
        self.discriminator.train().requires_grad_(True)
        self.d_buffers.begin()
        seen, share = [], micros[0].of / self.engine.size
        for micro, coded in zip(micros, codes, strict=True):
            fake = once.detach() if once is not None else self._fake(coded.decoded)
            last = micro is micros[-1]
            torch.manual_seed(mix(self.recipe.seed, "discriminator", step, micro.index))  # dropout
            with self.critic.accumulating(last=last):
                with self.engine.autocast():
                    both = torch.cat([micro.images, fake])
                    real_logits, fake_logits = self.critic(both, coded.compared).chunk(2)
                loss = losses.discriminator(real_logits, fake_logits)
                self.critic.backward(self.weights.discriminator * loss / share, last=last)
            self.d_buffers.keep()
            seen.append(loss.detach())
        self.critic.update()
        self.d_buffers.end(self.engine, share)
        return {"discriminator_loss": torch.stack(seen).sum() / share}

    @torch.no_grad()
    def _fake(self, features: Tensor | WaveletCode) -> Tensor:
        with self.engine.autocast():
            fake = full(self.generator(features))
        self.buffers.drop()  # the generator's own half of the step counts, this pass does not
        return fake

    def _generator_step(
        self, step: int, micros: Sequence[Micro], codes: Sequence[Codes], once: Tensor | None
    ) -> dict[str, Tensor]:
        if self.discriminator is not None:
            # Its weight gradients are not wanted here, and the group must not wait for them.
            self.discriminator.requires_grad_(False)
        if self.discriminator is not None:
            self.d_buffers.begin()
        seen, share = [], micros[0].of / self.engine.size
        for micro, coded in zip(micros, codes, strict=True):
            last = micro is micros[-1]
            with self.learner.accumulating(last=last):
                fake = once if once is not None else self._reconstruct(coded.decoded)
                torch.manual_seed(mix(self.recipe.seed, "generator", step, micro.index))  # dropout
                terms = self._terms(micro.images, coded.compared, fake)
                self.learner.backward(terms["loss"] / share, last=last)
            self.buffers.keep()
            if self.discriminator is not None:
                self.d_buffers.keep()
            seen.append({key: value.detach() for key, value in terms.items()})
        self.learner.update()
        if self.discriminator is not None:
            self.d_buffers.end(self.engine, share)
        return {key: torch.stack([one[key] for one in seen]).sum() / share for key in seen[0]}

    def _terms(self, images: Tensor, compared: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Eq. 3: the weighted sum as `loss`, and each term by its name."""
        weights = self.weights
        terms: dict[str, Tensor] = {"pixel": losses.pixel(fake, images, weights.pixel_norm)}
        total = weights.pixel * terms["pixel"]
        if weights.feature:
            with self.engine.autocast():
                again = full(self.comparator.features(fake, self.compared_layer))
            terms["feature"] = losses.feature(again, compared)
            total = total + weights.feature * terms["feature"]
        if self.discriminator is not None:
            with self.engine.autocast():
                logits = self.discriminator(fake, compared)
            terms["adversarial"] = losses.adversarial(logits)
            total = total + weights.adversarial * terms["adversarial"]
        return {"loss": total, **terms}

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, the encoder aside; random numbers depend on their address alone."""
        learnt = self.learner.state()
        state: dict[str, Any] = {
            "generator": learnt["weights"],
            "optimizer": learnt["optimizer"],
            "scaler": learnt["scaler"],
            "average": self.average.state(),
        }
        if self.discriminator is not None:
            learnt = self.critic.state()
            state["discriminator"] = learnt["weights"]
            state["d_optimizer"] = learnt["optimizer"]
            state["d_scaler"] = learnt["scaler"]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Set all of `state()` back."""
        learnt = {"weights": state["generator"], "optimizer": state["optimizer"], "scaler": state["scaler"]}
        self.learner.restore(learnt)
        self.average.restore(state["average"])
        if self.discriminator is not None:
            weights, optimizer, scaler = state["discriminator"], state["d_optimizer"], state["d_scaler"]
            self.critic.restore({"weights": weights, "optimizer": optimizer, "scaler": scaler})

    def exported(self) -> dict[str, Tensor]:
        """The generator's weights to keep: the moving average where there is one."""
        return self.average.weights(self.learner.state()["weights"])
