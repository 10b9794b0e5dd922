"""Measure a trained run on held-out images: a model and a recipe in, records out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arae import metrics, provenance
from arae.attacks.gradient import pgd
from arae.attacks.threat import Threat as Ball
from arae.config import Attack, Recipe
from arae.data.augment import to_float
from arae.data.load import open_source
from arae.errors import InputError
from arae.models.autoencoder import Autoencoder, load_autoencoder
from arae.records import Model, Record, Threat, write_records
from arae.runs import RunFolder
from arae.seeds import mix

Progress = Callable[[str, int, int], None]


def evaluate(
    recipe: Recipe, folder: RunFolder, device: torch.device, progress: Progress = lambda label, done, total: None
) -> list[Record]:
    """Measure what `recipe.evaluate` asks of the run's model, and write `records.jsonl`.

    Raises InputError where there is no model, or the held-out images do not fit it.
    """
    model = load_autoencoder(folder.path).to(device)
    images, labels = held_out(recipe, model, device)
    run = Evaluation(recipe, model, images, labels, progress)
    records = run.clean() + [r for i, attack in enumerate(recipe.evaluate.attacks) for r in run.attacked(i, attack)]
    write_records(folder.records, records)
    return records


def held_out(recipe: Recipe, model: Autoencoder, device: torch.device) -> tuple[Tensor, Tensor]:
    """The evaluated images [n, C, H, W] as uint8, evenly over the held-out file, and their labels [n]."""
    source = open_source(recipe.data, "test", device)
    if source.shape != model.image_shape or tuple(source.classes) != tuple(model.config["classes"]):
        raise InputError(
            f"data.test: images {source.shape} of {len(source.classes)} classes do not fit the model's "
            f"{model.image_shape} and {len(model.config['classes'])} classes"
        )
    count = min(recipe.evaluate.n or source.n, source.n)
    where = np.linspace(0, source.n - 1, count).round().astype(np.int64)
    size = recipe.evaluate.batch
    whole = where[: count - count % size].reshape(-1, size)
    parts = list(source.batches(whole)) if len(whole) else []
    if count % size:
        parts += source.batches(where[None, count - count % size :])
    return torch.cat(parts), source.labels[torch.from_numpy(where)].to(device)


@dataclass
class Evaluation:
    """One model on one set of held-out images."""

    recipe: Recipe
    model: Autoencoder
    images: Tensor
    labels: Tensor
    progress: Progress

    def clean(self) -> list[Record]:
        """Accuracy, reconstructions and what they must beat, on the images as they are."""
        hits, quality = [], Quality(self.recipe.evaluate.lpips, self.recipe.evaluate.lpips_weights)
        baseline: dict[str, list[Tensor]] = {"mean-image": [], "other-features": []}
        mean = self._mean_image()
        for x, y in self._batches("clean"):
            hits.append(self._hits(x, y))
            if self._decodes:
                z = self.model.encode(x)
                quality.add(self.model.decode(z), x)
                baseline["mean-image"].append(metrics.psnr(mean.expand_as(x), x))
                if len(x) > 1:  # the last batch may hold one image, which has no other
                    baseline["other-features"].append(metrics.psnr(self.model.decode(z.roll(1, 0)), x))
        records = [self._accuracy("clean_accuracy", torch.cat(hits), None)]
        if self._decodes:
            records += self._quality(quality, None)
            records += [
                self._record("psnr", torch.cat(values), protocol=protocol, stage="decoder")
                for protocol, values in baseline.items()
                if values
            ]
        return records

    def attacked(self, number: int, attack: Attack) -> list[Record]:
        """Accuracy, and reconstructions of what the attack made, against the clean images."""
        hits, quality = [], Quality(self.recipe.evaluate.lpips, self.recipe.evaluate.lpips_weights)
        threat = threat_of(attack)
        for i, (x, y) in enumerate(self._batches(name_of(attack))):
            generator = torch.Generator(x.device).manual_seed(mix(self.recipe.seed, "evaluate", number, i))
            attacked = pgd(
                self.model.encoder,
                x,
                y,
                Ball(threat.norm, threat.eps),
                attack.steps,
                attack.step_size,
                attack.random_start,
                attack.restarts,
                generator,
                survivors_only=True,
            )
            hits.append(self._hits(attacked, y))
            if self._decodes:
                quality.add(self.model.reconstruct(attacked), x)
        records = [self._accuracy("robust_accuracy", torch.cat(hits), threat)]
        return records + (self._quality(quality, threat) if self._decodes else [])

    def _mean_image(self) -> Tensor:
        """Mean [1, C, H, W] in [0, 1] of the evaluated images: the best answer that looks at none of them."""
        parts = self.images.split(self.recipe.evaluate.batch)
        total = torch.stack([part.double().sum(0, keepdim=True) for part in parts]).sum(0)
        return (total / (255 * len(self.images))).float()

    @property
    def _decodes(self) -> bool:
        return self.model.decoder is not None

    def _batches(self, label: str) -> Iterator[tuple[Tensor, Tensor]]:
        size, n = self.recipe.evaluate.batch, len(self.images)
        for start in range(0, n, size):
            self.progress(label, start, n)
            yield to_float(self.images[start : start + size]), self.labels[start : start + size]
        self.progress(label, n, n)

    @torch.no_grad()
    def _hits(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model.encoder(x).argmax(1) == y

    def _accuracy(self, metric: str, hits: Tensor, threat: Threat | None) -> Record:
        n, right = len(hits), int(hits.sum())
        return self._made(
            metric, right / n, metrics.wilson(right, n), n, protocol="classification", stage="encoder", threat=threat
        )

    def _quality(self, quality: Quality, threat: Threat | None) -> list[Record]:
        made = [
            self._record(metric, torch.cat(values), protocol="reconstruction", stage="decoder", threat=threat)
            for metric, values in quality.values.items()
        ]
        return made + [
            self._made(metric, None, None, None, "reconstruction", "decoder", threat, reason=reason)
            for metric, reason in quality.missing.items()
        ]

    def _record(self, metric: str, values: Tensor, protocol: str, stage: str, threat: Threat | None = None) -> Record:
        values = values.double()
        return self._made(
            metric, values.mean().item(), metrics.mean_interval(values), len(values), protocol, stage, threat
        )

    def _hardware(self, stage: str) -> dict[str, Any]:
        """What the measured stage was trained on, and what measured it."""
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return {**self.model.config[stage]["training"], "evaluated_on": name}

    def _made(
        self,
        metric: str,
        value: float | None,
        interval: tuple[float, float] | None,
        n: int | None,
        protocol: str,
        stage: str,
        threat: Threat | None,
        reason: str | None = None,
    ) -> Record:
        info, recipe = metrics.METRICS[metric], self.recipe
        return Record(
            metric=metric,
            value=value,
            unit=info.unit,
            direction=info.direction,
            interval=interval,
            n=n,
            reason=reason,
            dataset=recipe.data.name,
            split="test",
            protocol=protocol,
            model=described(recipe, self.model),
            threat=threat,
            digest=recipe.digest,
            stage=stage,
            seed=recipe.seed,
            scale=recipe.scale,
            git=provenance.git_revision(),
            versions=provenance.versions(),
            hardware=self._hardware(stage),
            time=provenance.now(),
        )


class Quality:
    """Per-image reconstruction metrics, batch by batch; what can't be measured is kept with its reason."""

    def __init__(self, net: metrics.Backbone | None, weights: str | None) -> None:
        self.net: metrics.Backbone | None = net
        self.weights = weights
        self.values: dict[str, list[Tensor]] = {"psnr": []}
        self.missing: dict[str, str] = {}

    @torch.no_grad()
    def add(self, again: Tensor, x: Tensor) -> None:
        """Compare reconstructions with images, both [N, C, H, W] in [0, 1]."""
        self.values["psnr"].append(metrics.psnr(again, x))
        if min(x.shape[2:]) >= metrics.SSIM_WINDOW:
            self.values.setdefault("ssim", []).append(metrics.ssim(again, x))
        else:
            self.missing["ssim"] = f"images of {min(x.shape[2:])} px are smaller than SSIM's window"
        if self.net is None or "lpips" in self.missing:
            return
        try:
            self.values.setdefault("lpips", []).append(metrics.lpips(again, x, net=self.net, weights=self.weights))
        except metrics.MetricUnavailable as error:
            self.values.pop("lpips", None)
            self.missing["lpips"] = str(error)


def threat_of(attack: Attack) -> Threat:
    """The record's form of an attack; InputError where it has no norm."""
    if attack.norm is None:
        raise InputError("evaluate.attacks: an attack has no norm; add `norm: l2` or `norm: linf`")
    step = attack.step_size if attack.step_size is not None else 2.5 * attack.eps / attack.steps
    return Threat(
        norm=attack.norm,
        eps=attack.eps,
        steps=attack.steps,
        step_size=step,
        restarts=attack.restarts,
        random_start=attack.random_start,
    )


def name_of(attack: Attack) -> str:
    """A short name, such as `pgd-50x5 l2 1.5`."""
    return f"pgd-{attack.steps}{f'x{attack.restarts}' if attack.restarts > 1 else ''} {attack.norm} {attack.eps:g}"


def described(recipe: Recipe, model: Autoencoder) -> Model:
    """Which networks were measured."""
    config = model.config
    return Model(
        encoder=config["encoder"]["name"],
        layer=config["encoder"]["layer"],
        decoder=config["decoder"]["name"] if "decoder" in config else None,
        train_norm=config["train_norm"],
        train_eps=config["train_eps"],
        losses=loss_weights(recipe) if "decoder" in config else None,
    )


def loss_weights(recipe: Recipe) -> dict[str, float] | None:
    """The decoder's loss weights, mean-reduced."""
    if recipe.decoder is None:
        return None
    weights = recipe.decoder.losses
    return {"pixel": weights.pixel, "feature": weights.feature, "adversarial": weights.adversarial}
