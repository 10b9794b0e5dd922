"""What is measured of one batch by one model: the part of an evaluation that does not care where it is done.

A batch's numbers depend on its images and its place in the evaluation alone, so batches can be shared out over workers
(`cluster.evaluate`): the records are those of one process, up to rounding, and to the random numbers of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from arae import metrics
from arae.attacks.dispatch import attack as perturbed
from arae.attacks.ledger import Unit
from arae.attacks.sanity import checks
from arae.attacks.suite import suite_unit
from arae.attacks.threat import Threat
from arae.config import Attack, Recipe
from arae.data.augment import to_float
from arae.evaluate.inversion import invert
from arae.evaluate.measure import device_name
from arae.evaluate.quality import Quality
from arae.evaluate.upscale import enlarged
from arae.models.autoencoder import Autoencoder
from arae.seeds import mix

Progress = Callable[[str, int, int], None]
Note = Callable[[str], None]


class Team(Protocol):
    """Who measures."""

    def do(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Call a method of `Batches` with each of some tuples of arguments: (the call's place, what it returned), in
        whatever order they come."""
        ...

    def device(self) -> str:
        """What those measured on who have measured so far."""
        ...


@dataclass(frozen=True)
class Measured:
    """Values of the images of one batch, on the CPU."""

    hits: Tensor | None = None
    """bool [N]: classified as labelled."""
    quality: dict[str, Tensor] = field(default_factory=dict)
    """Metric of the reconstructions -> [N]."""
    missing: dict[str, str] = field(default_factory=dict)
    """Metric -> why it can't be had."""
    baseline: dict[str, Tensor] = field(default_factory=dict)
    """PSNR of what reconstructions must beat -> [N]."""
    flags: tuple[str, ...] = ()
    """Sanity remarks of the attack."""


class Batches:
    """One model, as one recipe measures it. Images come as uint8 [N, C, H, W], labels as [N], from any device."""

    def __init__(self, recipe: Recipe, model: Autoencoder, mean: Tensor | None) -> None:
        """`mean`: the mean image [1, C, H, W] in [0, 1] of all that are evaluated, where reconstructions are compared
        with it."""
        self.recipe, self.model, self.mean = recipe, model, mean
        self.told: Callable[[int], None] | None = None
        """Hears the steps of a descent, where it is made in this process."""
        self.classifies = recipe.evaluate.protocol != "reconstruction"
        self.decodes = recipe.evaluate.protocol != "robustness" and model.decoder is not None
        self._flags: dict[Threat, tuple[str, ...]] = {}
        self._missing: dict[str, str] = {}

    @classmethod
    def of(cls, recipe: Recipe, model: Autoencoder, images: Tensor) -> Batches:
        """`images`: all that are evaluated, uint8 [n, C, H, W]."""
        made = cls(recipe, model, None)
        if made.decodes and recipe.evaluate.protocol in ("map", "reconstruction"):
            made.mean = mean_image(images, recipe.evaluate.batch)
        return made

    def clean(self, levels: Tensor, labels: Tensor) -> Measured:
        """Accuracy, reconstructions and what they must beat, of images as they are."""
        x, y = self._placed(levels, labels)
        hits = self._hits(x, y) if self.classifies else None
        if not self.decodes:
            return Measured(hits)
        assert self.mean is not None
        again = self.model.reconstruct(x)
        baseline = {"mean-image": metrics.psnr(self.mean.to(x.device).expand_as(x), x).cpu()}
        if len(x) > 1:  # the last batch may hold one image, which has no other
            baseline["other-features"] = metrics.psnr(again.roll(1, 0), x).cpu()
        return Measured(hits, *self._quality(again, x), baseline)

    def attacked(self, number: int, index: int, levels: Tensor, labels: Tensor) -> Measured:
        """The same under the recipe's attack `number`, PGD's or APGD's kind; of the first batch also whether it works.

        Its reconstructions are compared with the clean images.
        """
        attack = self.recipe.evaluate.attacks[number]
        x, y = self._placed(levels, labels)
        flags = self._sanity(x, y, attack) if index == 0 else ()
        generator = torch.Generator(x.device).manual_seed(mix(self.recipe.seed, "evaluate", number, index))
        # At radius 0 of any kind the images are themselves.
        made = perturbed(self.model.encoder, x, y, attack, generator) if attack.eps else x
        quality = self._quality(self.model.reconstruct(made), x) if self.decodes else ({}, {})
        return Measured(self._hits(made, y), *quality, flags=flags)

    def suite(self, number: int, name: str, index: int, levels: Tensor, labels: Tensor) -> Unit:
        """A unit of AutoAttack, the recipe's attack `number`: which samples its part `name` breaks, and with what."""
        attack = self.recipe.evaluate.attacks[number]
        assert attack.norm is not None
        x, y = self._placed(levels, labels)
        seed = mix(self.recipe.seed, "evaluate", number)
        return suite_unit(self.model.encoder, x, y, Threat(attack.norm, attack.eps), seed, name, index)

    def rebuilt(self, images: Tensor, levels: Tensor) -> Measured:
        """Reconstructions of `images` (float), compared with clean ones."""
        x = to_float(levels.to(self.model.device))
        return Measured(None, *self._quality(self.model.reconstruct(images.to(x.device)), x))

    def upscaled(self, factor: int, levels: Tensor) -> Measured:
        """Reconstructions of the images, enlarged `factor` times (`arae.evaluate.upscale`)."""
        x = enlarged(to_float(levels.to(self.model.device)), factor)
        return Measured(None, *self._quality(self.model.reconstruct(x), x))

    def inverted(self, levels: Tensor, start: Tensor) -> Tensor:
        """Images found for the features of these, on the CPU (`arae.evaluate.inversion`); `start` is float."""
        settings, x = self.recipe.evaluate.inversion, to_float(levels.to(self.model.device))
        encoder, layer = self.model.encoder, self.model.layer
        with torch.no_grad():
            target = encoder.features(x, layer)
        start, told = start.to(x.device), self.told or (lambda step: None)

        def features(images: Tensor) -> Tensor:
            return encoder.features(images, layer)

        return invert(features, target, start, settings.steps, settings.step_size, told).cpu()

    def _sanity(self, x: Tensor, y: Tensor, attack: Attack) -> tuple[str, ...]:
        """The cheap checks of a threat model, made once."""
        if attack.norm is None or attack.eps == 0:
            return ()
        threat = Threat(attack.norm, attack.eps)
        if threat not in self._flags:
            self._flags[threat] = tuple(checks(self.model.encoder, x, y, threat))
        return self._flags[threat]

    def _placed(self, levels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        device = self.model.device
        return to_float(levels.to(device)), labels.to(device)

    def _quality(self, again: Tensor, x: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
        quality = Quality(self.recipe.evaluate)
        quality.missing |= self._missing  # what could not be had once is not asked for with every batch
        quality.add(again, x)
        self._missing |= quality.missing
        return {name: values.cpu() for name, values in quality.measured.items()}, quality.missing

    @torch.no_grad()
    def _hits(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model.encoder(x).argmax(1) == y).cpu()


def mean_image(images: Tensor, size: int) -> Tensor:
    """Mean [1, C, H, W] in [0, 1] of images uint8 [n, C, H, W]: the best answer without a look; on the CPU.

    size: images that are added up at a time.
    """
    total = torch.stack([part.double().sum(0, keepdim=True) for part in images.split(size)]).sum(0)
    return (total / (255 * len(images))).float().cpu()


Workers = Callable[[Batches], AbstractContextManager[Team]]
"""Sets up who measures batches as this one would; they are let go when the evaluation is over."""


class Alone:
    """This process, one call after the other."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def do(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """See `Team`; each call is made when it is asked for."""
        return ((place, getattr(self.batches, method)(*call)) for place, call in enumerate(calls))

    def device(self) -> str:
        """See `Team`."""
        return device_name(self.batches.model.device)


@contextmanager
def alone(batches: Batches) -> Iterator[Team]:
    """Nobody else."""
    yield Alone(batches)
