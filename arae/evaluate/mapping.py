"""Robustness and reconstruction at the training size: the protocols `map`, `reconstruction` and `robustness`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from arae.attacks.ledger import Unit
from arae.attacks.suite import autoattack
from arae.attacks.threat import Threat as Ball
from arae.config import Attack
from arae.evaluate.batches import Batches, Measured, Note, Progress, Team
from arae.evaluate.measure import Recorder, in_order, name_of, threat_of, watched
from arae.evaluate.quality import Quality
from arae.records import Record, Threat
from arae.seeds import mix


class Evaluation:
    """One model on one set of held-out images."""

    def __init__(
        self,
        batches: Batches,
        images: Tensor,
        labels: Tensor,
        team: Team,
        progress: Progress,
        note: Note = lambda text: None,
        state: Path | None = None,
        kept: list[Path] | None = None,
    ) -> None:
        """`images` uint8 [n, C, H, W], `labels` [n]; `team` calls `batches`, or what is like it elsewhere.

        state: folder where AutoAttack keeps what it has finished; `kept` is told where in it this evaluation's own
        parts are.
        """
        self.kept = [] if kept is None else kept
        self.batches, self.images, self.labels = batches, images, labels
        self.team, self.progress, self.note, self.state = team, progress, note, state
        self.recipe, self.size = batches.recipe, batches.recipe.evaluate.batch
        self.record = Recorder(self.recipe, batches.model, team.device)

    def records(self) -> list[Record]:
        """All that the protocol asks for."""
        attacks = self.recipe.evaluate.attacks if self.batches.classifies else ()
        return self.clean() + [r for i, attack in enumerate(attacks) for r in self.attacked(i, attack)]

    def clean(self) -> list[Record]:
        """Accuracy, reconstructions and what they must beat, on the images as they are."""
        found = self._told("clean", self.team.do("clean", self._batches()))
        records = [self.record.accuracy("clean_accuracy", _hits(found))] if self.batches.classifies else []
        if not self.batches.decodes:
            return records
        records += self._quality(found)
        for name in found[0].baseline:
            values = [one.baseline[name] for one in found if name in one.baseline]
            records.append(self.record.mean("psnr", torch.cat(values), name))
        return records

    def attacked(self, number: int, attack: Attack) -> list[Record]:
        """Accuracy, and reconstructions of what the attack made, against the clean images.

        AutoAttack leaves the samples that it can't break as they are; so do the attacks of the APGD family with those
        that are misclassified already.
        """
        # At radius 0 the suite would spend its whole effort on images that can't move.
        if attack.kind == "autoattack" and attack.eps > 0:
            return self._by_suite(number, attack)
        calls = ((number, i, x, y) for i, (x, y) in enumerate(self._batches()))
        found = self._told(name_of(attack), self.team.do("attacked", calls))
        flags, threat = tuple(dict.fromkeys(flag for one in found for flag in one.flags)), threat_of(attack)
        records = [self.record.accuracy("robust_accuracy", _hits(found), threat, flags)]
        return records + (self._quality(found, threat) if self.batches.decodes else [])

    def _by_suite(self, number: int, attack: Attack) -> list[Record]:
        """AutoAttack on all images, then the reconstructions of what it made."""
        assert attack.norm is not None

        def units(name: str, wanted: Sequence[tuple[int, Tensor]]) -> Iterator[tuple[int, Unit]]:
            return self.team.do(
                "suite", ((number, name, i, self.images[rows], self.labels[rows]) for i, rows in wanted)
            )

        outcome = autoattack(
            self.batches.model.encoder,
            self.images,
            self.labels,
            Ball(attack.norm, attack.eps),
            batch=self.size,
            seed=mix(self.recipe.seed, "evaluate", number),
            state=self.state / f"attack-{number}" if self.state else None,
            progress=lambda part, done, total: self.progress(f"{name_of(attack)}: {part}", done, total),
            log=self.note,
            units=units,
        )
        self.kept += [outcome.kept] if outcome.kept else []
        threat = threat_of(attack)
        records = [self.record.accuracy("robust_accuracy", outcome.robust, threat, outcome.flags)]
        if not self.batches.decodes:
            return records
        pairs = zip(outcome.adversarial.split(self.size), self.images.split(self.size), strict=True)
        return records + self._quality(in_order(self.team.do("rebuilt", pairs)), threat)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(self.size), self.labels.split(self.size), strict=True)

    def _told(self, label: str, results: Iterator[tuple[int, Measured]]) -> list[Measured]:
        """The results by batch, and progress as they come."""
        return watched(results, label, self.size, len(self.images), self.progress)

    def _quality(self, found: Sequence[Measured], threat: Threat | None = None) -> list[Record]:
        quality = Quality(self.recipe.evaluate)
        for one in found:
            quality.take(one.quality, one.missing)
        return self.record.quality(quality, "reconstruction", threat=threat)


def _hits(found: Sequence[Measured]) -> Tensor:
    return torch.cat([one.hits for one in found if one.hits is not None])
