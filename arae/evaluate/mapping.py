"""Robustness and reconstruction at the training size: the protocols `map`, `reconstruction` and `robustness`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arae import metrics
from arae.attacks.dispatch import attack as perturbed
from arae.attacks.sanity import checks
from arae.attacks.suite import autoattack
from arae.attacks.threat import Threat as Ball
from arae.config import Attack, Recipe
from arae.data.augment import to_float
from arae.evaluate.measure import Recorder, name_of, threat_of
from arae.evaluate.quality import Quality
from arae.models.autoencoder import Autoencoder
from arae.records import Record
from arae.seeds import mix

Progress = Callable[[str, int, int], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Attacked:
    """A batch, what an attack made of it, and which samples [N] the model still classifies as labelled."""

    x: Tensor
    adversarial: Tensor
    robust: Tensor


class Evaluation:
    """One model on one set of held-out images."""

    def __init__(
        self,
        recipe: Recipe,
        model: Autoencoder,
        images: Tensor,
        labels: Tensor,
        progress: Progress,
        note: Note = lambda text: None,
        state: Path | None = None,
        kept: list[Path] | None = None,
    ) -> None:
        """`images` uint8 [n, C, H, W], `labels` [n]; `state`: folder where AutoAttack keeps what it has finished.

        `kept` is told where in it this evaluation's own parts are.
        """
        self.kept = [] if kept is None else kept
        self.recipe, self.model, self.images, self.labels = recipe, model, images, labels
        self.progress, self.note, self.state = progress, note, state
        self.record = Recorder(recipe, model)
        self.classifies = recipe.evaluate.protocol != "reconstruction"
        self.decodes = recipe.evaluate.protocol != "robustness" and model.decoder is not None
        self._flags: dict[tuple[str, float], tuple[str, ...]] = {}

    def records(self) -> list[Record]:
        """All that the protocol asks for."""
        attacks = self.recipe.evaluate.attacks if self.classifies else ()
        return self.clean() + [r for i, attack in enumerate(attacks) for r in self.attacked(i, attack)]

    def clean(self) -> list[Record]:
        """Accuracy, reconstructions and what they must beat, on the images as they are."""
        hits, quality = [], Quality(self.recipe.evaluate)
        baseline: dict[str, list[Tensor]] = {"mean-image": [], "other-features": []}
        mean = self._mean_image()
        for x, y in self._batches("clean"):
            if self.classifies:
                hits.append(self._hits(x, y))
            if self.decodes:
                again = self.model.reconstruct(x)
                quality.add(again, x)
                baseline["mean-image"].append(metrics.psnr(mean.expand_as(x), x))
                if len(x) > 1:  # the last batch may hold one image, which has no other
                    baseline["other-features"].append(metrics.psnr(again.roll(1, 0), x))
        records = [self.record.accuracy("clean_accuracy", torch.cat(hits))] if hits else []
        if self.decodes:
            records += self.record.quality(quality, "reconstruction")
            records += [self.record.mean("psnr", torch.cat(v), name) for name, v in baseline.items() if v]
        return records

    def attacked(self, number: int, attack: Attack) -> list[Record]:
        """Accuracy, and reconstructions of what the attack made, against the clean images.

        AutoAttack leaves the samples that it can't break as they are; so do the attacks of the APGD family with those
        that are misclassified already.
        """
        hits, quality, flags = [], Quality(self.recipe.evaluate), list[str]()
        threat = threat_of(attack)
        # At radius 0 the suite would spend its whole effort on images that can't move.
        suite = attack.kind == "autoattack" and attack.eps > 0
        for batch in (self._by_suite if suite else self._by_gradient)(number, attack, flags):
            hits.append(batch.robust)
            if self.decodes:
                quality.add(self.model.reconstruct(batch.adversarial), batch.x)
        records = [self.record.accuracy("robust_accuracy", torch.cat(hits), threat, tuple(dict.fromkeys(flags)))]
        return records + (self.record.quality(quality, "reconstruction", threat=threat) if self.decodes else [])

    def _by_gradient(self, number: int, attack: Attack, flags: list[str]) -> Iterator[Attacked]:
        """Batch by batch through PGD or one of the APGD family; appends the first batch's sanity remarks to `flags`."""
        for i, (x, y) in enumerate(self._batches(name_of(attack))):
            if i == 0:
                flags.extend(self._sanity(x, y, attack))
            generator = torch.Generator(x.device).manual_seed(mix(self.recipe.seed, "evaluate", number, i))
            # At radius 0 of any kind the images are themselves.
            made = perturbed(self.model.encoder, x, y, attack, generator) if attack.eps else x
            yield Attacked(x, made, self._hits(made, y))

    def _sanity(self, x: Tensor, y: Tensor, attack: Attack) -> tuple[str, ...]:
        """The cheap checks of a threat model, made once."""
        if attack.norm is None or attack.eps == 0:
            return ()
        key = (attack.norm, attack.eps)
        if key not in self._flags:
            self._flags[key] = tuple(checks(self.model.encoder, x, y, Ball(*key)))
        return self._flags[key]

    def _by_suite(self, number: int, attack: Attack, flags: list[str]) -> Iterator[Attacked]:
        """AutoAttack on all images, then batch by batch what it made; appends its remarks to `flags`."""
        assert attack.norm is not None
        outcome = autoattack(
            self.model.encoder,
            self.images,
            self.labels,
            Ball(attack.norm, attack.eps),
            batch=self.recipe.evaluate.batch,
            seed=mix(self.recipe.seed, "evaluate", number),
            state=self.state / f"attack-{number}" if self.state else None,
            progress=lambda part, done, total: self.progress(f"{name_of(attack)}: {part}", done, total),
            log=self.note,
        )
        flags.extend(outcome.flags)
        self.kept += [outcome.kept] if outcome.kept else []
        size = self.recipe.evaluate.batch
        for made, robust, levels in zip(
            outcome.adversarial.split(size), outcome.robust.split(size), self.images.split(size), strict=True
        ):
            yield Attacked(to_float(levels), made.to(levels.device), robust.to(levels.device))

    def _mean_image(self) -> Tensor:
        """Mean [1, C, H, W] in [0, 1] of the evaluated images: the best answer that looks at none of them."""
        parts = self.images.split(self.recipe.evaluate.batch)
        total = torch.stack([part.double().sum(0, keepdim=True) for part in parts]).sum(0)
        return (total / (255 * len(self.images))).float()

    def _batches(self, label: str) -> Iterator[tuple[Tensor, Tensor]]:
        size, n = self.recipe.evaluate.batch, len(self.images)
        for start in range(0, n, size):
            self.progress(label, start, n)
            yield to_float(self.images[start : start + size]), self.labels[start : start + size]
        self.progress(label, n, n)

    @torch.no_grad()
    def _hits(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model.encoder(x).argmax(1) == y
