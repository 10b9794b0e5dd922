"""The attack that a recipe describes, for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from arae.attacks.apgd import Loss, apgd
from arae.attacks.gradient import Model, check_images, evaluation_mode, pgd
from arae.attacks.threat import Threat
from arae.config import Attack
from arae.errors import InputError

CASCADE = ("apgd-ce", "apgd-t")
LOSSES: dict[str, Loss] = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}


def attack(model: Model, x: Tensor, y: Tensor, attack: Attack, generator: torch.Generator | None = None) -> Tensor:
    """Attacked images [N, C, H, W] in [0, 1] of x, as `pgd` or `apgd` returns them; at eps 0, x itself.

    `cascade` is APGD on the cross-entropy, and on the samples that withstand it APGD on the targeted DLR: the two of
    AutoAttack that decide nearly all samples, each of which is left alone once it is misclassified.

    Raises InputError for `kind: autoattack`, which keeps its work on disk (`arae.attacks.suite.autoattack`), and for
    keys that the kind has no use for; ValueError as `pgd` and `apgd` do.
    """
    check_images(x, y)
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
    if attack.kind not in {*LOSSES, "cascade"}:
        raise InputError(
            f"attack.kind = {attack.kind} is no single attack: write pgd, cascade or one of {', '.join(LOSSES)}"
        )
    if attack.step_size is not None:
        raise InputError(
            f"attack.step_size = {attack.step_size:g} is for kind pgd; {attack.kind} chooses its own: remove it"
        )
    if attack.kind == "cascade":
        return _cascade(model, x, y, threat, attack, generator)
    return apgd(model, x, y, threat, attack.steps, LOSSES[attack.kind], attack.restarts, generator=generator)


def _cascade(
    model: Model, x: Tensor, y: Tensor, threat: Threat, effort: Attack, generator: torch.Generator | None
) -> Tensor:
    """The attacks from the cheap to the dear, each on what the ones before it left standing."""
    found = x
    for kind in CASCADE:
        with evaluation_mode(model), torch.no_grad():
            left = torch.nonzero(model(found).argmax(1) == y).squeeze(1)
        if len(left) == 0:
            break
        made = apgd(model, x[left], y[left], threat, effort.steps, LOSSES[kind], effort.restarts, generator=generator)
        found = found.index_copy(0, left, made)
    return found
