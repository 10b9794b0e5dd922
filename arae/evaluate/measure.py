"""From measured values to records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from arae import metrics, provenance
from arae.config import Attack, Recipe
from arae.errors import InputError
from arae.evaluate.quality import Quality
from arae.models.autoencoder import Autoencoder
from arae.records import Model, Record, Threat

Interval = tuple[float, float]
Trained = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Recorder:
    """Makes the records of one model, measured as one recipe says."""

    recipe: Recipe
    model: Autoencoder
    device: Callable[[], str] | None = None
    """Says what measured; default: the model's device."""
    decoder: bool = True
    """Whether what is measured used the model's decoder, where it has one."""
    dataset: str | None = None
    """Default: the recipe's."""
    split: str = "test"

    def accuracy(self, metric: str, hits: Tensor, threat: Threat | None = None, flags: tuple[str, ...] = ()) -> Record:
        """The share of `hits`, bool [N], with its Wilson interval."""
        n, right = len(hits), int(hits.sum())
        record = self.made(metric, right / n, metrics.wilson(right, n), n, "classification", "encoder", threat)
        return record.model_copy(update={"flags": flags})

    def mean(
        self, metric: str, values: Tensor, protocol: str, stage: Trained = "decoder", threat: Threat | None = None
    ) -> Record:
        """The mean of independent values [N], with its interval."""
        values = values.double()
        interval = metrics.mean_interval(values)
        return self.made(metric, values.mean().item(), interval, len(values), protocol, stage, threat)

    def quality(
        self, quality: Quality, protocol: str, stage: Trained = "decoder", threat: Threat | None = None
    ) -> list[Record]:
        """A record for every metric of the reconstructions, and one with its reason for each that can't be had."""
        found = [self.mean(metric, values, protocol, stage, threat) for metric, values in quality.measured.items()]
        return found + [
            self.made(metric, None, None, None, protocol, stage, threat, reason=reason)
            for metric, reason in quality.missing.items()
        ]

    def made(
        self,
        metric: str,
        value: float | None,
        interval: Interval | None,
        n: int | None,
        protocol: str,
        stage: Trained,
        threat: Threat | None,
        *,
        reason: str | None = None,
    ) -> Record:
        """A record of this model; `stage`: the training that the value judges."""
        info, recipe = metrics.METRICS[metric], self.recipe
        return Record(
            metric=metric,
            value=value,
            unit=info.unit,
            direction=info.direction,
            interval=interval,
            n=n,
            reason=reason,
            dataset=self.dataset or recipe.data.name,
            split=self.split,
            protocol=protocol,
            model=described(recipe, self.model, decoder=self.decoder),
            threat=threat,
            digest=recipe.digest,
            training=recipe.stage_digest("decoder" if recipe.decoder else "encoder"),
            stage=stage,
            seed=recipe.seed,
            scale=recipe.scale,
            git=provenance.git_revision(),
            versions=provenance.versions(),
            hardware=self._hardware(stage),
            time=provenance.now(),
        )

    def _hardware(self, stage: Trained) -> dict[str, Any]:
        """What the measured stage was trained on (nothing is known of weights made elsewhere), and what measured it."""
        name = self.device() if self.device else device_name(self.model.device)
        return {**self.model.config[stage].get("training", {}), "evaluated_on": name}


def device_name(device: torch.device) -> str:
    """What a record calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def threat_of(attack: Attack) -> Threat:
    """The record's form of an attack; InputError where it has no norm.

    APGD starts at a random point with a step of 2 eps (Croce & Hein 2020, Algorithm 1); the standard suite runs it for
    100 steps, once.
    """
    if attack.norm is None:
        raise InputError("evaluate.attacks: an attack has no norm; add `norm: l2` or `norm: linf`")
    if attack.kind != "pgd":
        whole = attack.kind == "autoattack"
        steps, restarts = (100, 1) if whole else (attack.steps, attack.restarts)
        return Threat(
            norm=attack.norm,
            eps=attack.eps,
            attack=attack.kind,
            steps=steps,
            step_size=2 * attack.eps,
            restarts=restarts,
            random_start=True,
        )
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
    """A short name, such as `pgd-50x5 l2 1.5` or `autoattack linf 0.0314`."""
    effort = f"-{attack.steps}{f'x{attack.restarts}' if attack.restarts > 1 else ''}"
    return f"{attack.kind}{'' if attack.kind == 'autoattack' else effort} {attack.norm} {attack.eps:.4g}"


def described(recipe: Recipe, model: Autoencoder, *, decoder: bool = True) -> Model:
    """Which networks were measured; without its decoder where that had no part in it."""
    config = model.config
    decodes = decoder and "decoder" in config
    return Model(
        encoder=config["encoder"]["name"],
        layer=config["encoder"]["layer"],
        decoder=config["decoder"]["name"] if decodes else None,
        train_norm=config["train_norm"],
        train_eps=config["train_eps"],
        losses=(config["decoder"].get("losses") or loss_weights(recipe)) if decodes else None,
    )


def loss_weights(recipe: Recipe) -> dict[str, float] | None:
    """The decoder's loss weights, mean-reduced, of a recipe that names them (a preset's depend on the shapes)."""
    if recipe.decoder is None or recipe.decoder.losses.preset is not None:
        return None
    weights = recipe.decoder.losses
    return {"pixel": weights.pixel, "feature": weights.feature, "adversarial": weights.adversarial}


def evenly(n: int, wanted: int | None) -> np.ndarray:
    """At most `wanted` (None: all) of n positions, spread from the first to the last, int64."""
    return np.linspace(0, n - 1, min(wanted or n, n)).round().astype(np.int64)


def in_order(results: Iterable[tuple[int, Any]]) -> list[Any]:
    """What `Team.do` gives, by the calls' places."""
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]


def watched(
    results: Iterable[tuple[int, Any]], label: str, size: int, n: int, progress: Callable[[str, int, int], None]
) -> list[Any]:
    """`in_order`, of batches of `size` that are n images together; `progress` is told of each as it comes."""

    def counted() -> Iterator[tuple[int, Any]]:
        progress(label, 0, n)
        for count, one in enumerate(results, start=1):
            yield one
            progress(label, min(size * count, n), n)

    return in_order(counted())
