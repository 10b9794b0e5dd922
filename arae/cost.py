"""What networks cost: parameters, and FLOPs of an image and of a training step with all its passes.

FLOPs are counted on the networks' own operations, on tensors without data; a multiply-add is two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from arae.config import Attack, Recipe
from arae.models import Encoder, create_encoder
from arae.train.networks import Decoding, Shape, decoding

FLOAT = 4  # bytes: weights, gradients and optimiser states are float32 in every precision
SGD, ADAM = 1, 2  # tensors of the weights' size that the optimiser keeps


@dataclass(frozen=True)
class Network:
    """A network's size: parameters, and FLOPs of one image's forward pass."""

    role: str
    name: str
    parameters: int
    flops: int


@dataclass(frozen=True)
class Passes:
    """FLOPs of one image: forward alone; forward with the gradient of the input; forward with those of the weights."""

    forward: int
    to_input: int
    to_weights: int


class Networks:
    """The recipe's networks, and what an image costs in each."""

    def __init__(self, recipe: Recipe, shape: Shape, num_classes: int) -> None:
        """For images of `shape` (C, H, W); InputError where the networks do not fit them."""
        self.recipe, self.shape, self.layer = recipe, shape, recipe.encoder.layer
        self.encoder: Encoder = create_encoder(
            recipe.encoder.name, max(num_classes, 2), shape[0], shape[1], width=recipe.encoder.width
        )
        self.feature_shape = self.encoder.feature_shape(shape, self.layer)
        self.decoder: nn.Module | None = None
        self.discriminator: nn.Module | None = None
        self.comparator: Encoder | None = None
        self.decoding: Decoding | None = None
        if part := recipe.decoder:
            if part.comparator:  # its size is what counts here, not its weights, which may not be there yet
                self.comparator = create_encoder(part.comparator.name, max(num_classes, 2), shape[0], shape[1])
            self.decoding = decoding(recipe, self.encoder, self.comparator, shape)
            self.decoder, self.discriminator = self.decoding.generator(), self.decoding.discriminator()

    def following(self, recipe: Recipe) -> Networks:
        """The same networks, trained as another recipe says."""
        other = copy.copy(self)
        other.recipe = recipe
        return other

    @cached_property
    def classify(self) -> Passes:
        """The whole encoder."""
        return passes(self.encoder, self.shape)

    @cached_property
    def tap(self) -> Passes:
        """The encoder up to its tap."""
        return passes(_Tap(self.encoder, self.layer), self.shape)

    @cached_property
    def compare(self) -> Passes:
        """The network that compares features, up to its tap."""
        return passes(self._compared(), self.shape) if self.comparator else self.tap

    @cached_property
    def generate(self) -> Passes:
        """The decoder."""
        assert self.decoder is not None
        return passes(self.decoder, self.feature_shape)

    @cached_property
    def judge(self) -> Passes:
        """The discriminator on one image."""
        return passes(self._judge(times=1), self.shape)

    @cached_property
    def judge_both(self) -> Passes:
        """The discriminator on an image and its reconstruction, their features once."""
        return passes(self._judge(times=2), self.shape)

    def listed(self) -> Iterator[Network]:
        """Each network with its size."""
        yield Network("encoder", self.recipe.encoder.name, parameters(self.encoder), self.classify.forward)
        if self.recipe.decoder and self.decoder:
            yield Network("decoder", self.recipe.decoder.name, parameters(self.decoder), self.generate.forward)
        if self.recipe.decoder and self.discriminator:
            size = parameters(self.discriminator)
            yield Network("discriminator", self.recipe.decoder.name, size, self.judge.forward)
        if self.comparator:
            yield Network("comparator", self.comparator.name, parameters(self.comparator), self.compare.forward)

    def encoder_step(self, attack: Attack) -> int:
        """FLOPs an image of adversarial training: the attack, then one descent; the mean over the stage's phases.

        TRADES and MART descend on the clean image too; TRADES's attack first looks at the clean one. Replays are so
        many descents and no attack; of samples that leave PGD early nothing is known before.
        """
        part = self.recipe.encoder.model_copy(update={"attack": attack})
        kind = part.objective.kind if attack.eps else "at"
        look = self.classify.forward if kind == "trades" else 0
        views = 2 if kind in ("trades", "mart") else 1
        begun = flops = 0.0
        for span in part.spans():
            step = attack_flops(self.classify, span.attack) + look + views * self.classify.to_weights
            if part.replays > 1 and attack.eps:
                step = part.replays * self.classify.to_weights
            flops += (span.until - begun) * span.scale**2 * step
            begun = span.until
        return round(flops)

    def decoder_step(self, micros: int) -> int:
        """FLOPs an image of decoder training; `micros` is a worker's number of micro-batches a step.

        Encode, and once more where something else compares; reconstruct and descend; encode the reconstruction (feature
        loss); the discriminator on both images to its weights, then on the reconstruction to its input. With several
        micro-batches the discriminator's half of the step reconstructs on its own.
        """
        assert self.decoding is not None
        total = self.tap.forward + self.generate.to_weights  # with a forward pass more where it is recomputed
        if self.decoding.apart and (self.decoding.weights.feature or self.discriminator is not None):
            total += self.compare.forward
        if self.decoding.weights.feature:
            total += self.compare.to_input
        if self.discriminator is not None:
            total += self.judge_both.to_weights + self.judge.to_input + self.generate.forward * (micros > 1)
        return total

    def evaluation(self) -> int:
        """FLOPs an image of evaluation by the recipe's protocol; of `high-resolution`, an image of the training size.

        Every attack counts with all its restarts, as for a sample that none of them breaks.
        """
        settings = self.recipe.evaluate
        rebuild = self.tap.forward + self.generate.forward if self.decoder is not None else 0
        if settings.protocol == "inversion":
            return settings.inversion.steps * self.tap.to_input
        if settings.protocol == "upscale":
            return rebuild * sum(factor**2 for factor in set(settings.factors))
        if settings.protocol in ("reconstruction", "high-resolution"):
            return rebuild
        attacks, classes = settings.attacks, self.encoder.num_classes
        attacked = sum(attack_flops(self.classify, a, classes) + self.classify.forward for a in attacks)
        rebuilt = (1 + len(attacks)) * rebuild if settings.protocol == "map" else 0
        return self.classify.forward + attacked + rebuilt

    def disk(self) -> dict[str, int]:
        """Bytes a run folder takes: the states kept (the newest, the best, one being written), and the model."""
        keep, recipe = self.recipe.state.keep, self.recipe
        state = model = parameters(self.encoder)
        state *= 1 + SGD + bool(recipe.encoder.ema)
        if recipe.decoder and self.decoder:
            model += parameters(self.decoder)
            average = parameters(self.decoder) * bool(recipe.decoder.ema)
            state = max(state, self._decoder_trained() * (1 + ADAM) + average)
        return {f"states ({keep} kept, the best, a new one)": state * FLOAT * (keep + 2), "model": model * FLOAT}

    def _compared(self) -> _Tap:
        """The network that compares features, up to its tap."""
        part = self.recipe.decoder
        if self.comparator and part and part.comparator:
            return _Tap(self.comparator, part.comparator.layer)
        return _Tap(self.encoder, self.layer)

    def _judge(self, times: int) -> _Judge:
        """The discriminator on `times` images."""
        assert self.discriminator is not None
        assert self.decoding is not None
        return _Judge(self.discriminator, self.decoding.compared, times)

    def _decoder_trained(self) -> int:
        """Parameters that the decoder's stage trains."""
        assert self.decoder is not None
        return parameters(self.decoder) + (parameters(self.discriminator) if self.discriminator else 0)


def attack_flops(classify: Passes, attack: Attack, classes: int = 10) -> int:
    """FLOPs an image of an attack: a step is a forward and an input gradient.

    PGD judges each of several restarts once; APGD looks at its start too, and its targeted form runs once for each of
    at most nine classes; the cascade is both, for a sample that withstands them; AutoAttack is 100 steps of APGD, as
    many for each target of two attacks, and 5000 forwards.
    """
    if attack.eps == 0:
        return 0
    targets = min(9, max(classes - 1, 1))
    if attack.kind == "autoattack":
        return (101 + 201 * targets) * classify.to_input + 5000 * classify.forward
    if attack.kind != "pgd":
        runs = attack.restarts * {"apgd-t": targets, "cascade": 1 + targets}.get(attack.kind, 1)
        return runs * (attack.steps + 1) * classify.to_input
    judged = attack.restarts * classify.forward if attack.restarts > 1 else 0
    return attack.restarts * attack.steps * classify.to_input + judged


def parameters(network: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in network.parameters())


def passes(network: nn.Module, shape: Shape) -> Passes:
    """FLOPs of one input of `shape`, by what is differentiated."""
    bare = _bare(network)

    def count(n: int, wanted: str) -> int:
        bare.requires_grad_(wanted == "weights")
        x = torch.empty(n, *shape, device="meta", requires_grad=wanted == "input")
        with FlopCounterMode(display=False) as counter:
            out = bare(x).sum()
            if out.requires_grad:
                out.backward()
        return counter.get_total_flops()

    return Passes(*(_of_one(lambda n, what=what: count(n, what)) for what in ("", "input", "weights")))


class _Tap(nn.Module):
    """The encoder up to its tap."""

    def __init__(self, encoder: Encoder, layer: str | None) -> None:
        super().__init__()
        self.encoder, self.layer = encoder, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.features(x, self.layer)


class _Judge(nn.Module):
    """The discriminator on `times` images for the same features."""

    def __init__(self, discriminator: nn.Module, feature_shape: Shape, times: int) -> None:
        super().__init__()
        self.discriminator, self.feature_shape, self.times = discriminator, feature_shape, times

    def forward(self, x: Tensor) -> Tensor:
        features = torch.empty(len(x), *self.feature_shape, device=x.device)
        return self.discriminator(torch.cat([x] * self.times), features)


def _bare(network: nn.Module) -> nn.Module:
    """The network with shapes but no data."""
    return copy.deepcopy(network).to("meta")


def _of_one(count: Callable[[int], int]) -> int:
    """The share of one more sample: what does not grow with the batch (weights, their normalisation) falls out."""
    return (count(4) - count(2)) // 2
