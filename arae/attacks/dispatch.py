"""The attack that a recipe describes, for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from arae.attacks.apgd import Loss, apgd
from arae.attacks.gradient import Model, pgd
from arae.attacks.threat import Threat
from arae.config import Attack
from arae.errors import InputError

LOSSES: dict[str, Loss] = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}


def attack(model: Model, x: Tensor, y: Tensor, attack: Attack, generator: torch.Generator | None = None) -> Tensor:
    """Attacked images [N, C, H, W] in [0, 1] of x, as `pgd` or `apgd` returns them; at eps 0, x itself.

    Raises InputError for `kind: autoattack`, which keeps its work on disk (`arae.attacks.suite.autoattack`), and for
    keys that the kind has no use for; ValueError as `pgd` and `apgd` do.
    """
    if attack.norm is None or attack.eps == 0:
        return x
    threat = Threat(attack.norm, attack.eps)
    if attack.kind == "pgd":
        return pgd(
            model,
            x,
            y,
            threat,
            attack.steps,
            attack.step_size,
            attack.random_start,
            attack.restarts,
            generator,
            survivors_only=True,
        )
    if attack.kind not in LOSSES:
        raise InputError(f"attack.kind = {attack.kind} is no single attack: write pgd or one of {', '.join(LOSSES)}")
    if attack.step_size is not None:
        raise InputError(
            f"attack.step_size = {attack.step_size:g} is for kind pgd; {attack.kind} chooses its own: remove it"
        )
    return apgd(model, x, y, threat, attack.steps, LOSSES[attack.kind], attack.restarts, generator=generator)
