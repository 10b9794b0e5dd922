"""What adversarial training of the encoder minimises beside the cross-entropy: TRADES, MART, GAIRAT.

The losses are pure functions of logits, **mean**-reduced and in float32; each attack finds the images that its
objective is meant for, with the network in evaluation mode, as the attacks of `arae.attacks` do. In formulas, p is the
softmax of the clean image's logits, q that of the attacked image's, y the class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arae.attacks.gradient import ascent
from arae.attacks.threat import Threat
from arae.config import Attack, Encoder
from arae.errors import InputError
from arae.modes import evaluating
from arae.precision import full

BETA = {"trades": 6.0, "mart": 5.0}
"""Weights of the robust term by default: those with which the authors trained on CIFAR-10."""
START = 1e-3
"""Standard deviation of the noise that TRADES's attack starts from: that of the authors' code."""


def check_objective(part: Encoder) -> None:
    """InputError where a recipe's encoder asks of an objective what it does not do."""
    kind, restarts = part.objective.kind, part.attack.restarts
    if kind in ("trades", "gairat") and restarts > 1:
        raise InputError(f"encoder.attack.restarts = {restarts}: the objective {kind} attacks once; set it to 1")
    if kind not in BETA and part.objective.beta is not None:
        raise InputError(
            f"encoder.objective.beta = {part.objective.beta:g} is for trades and mart, not {kind}: leave it out"
        )


def divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(p || q) of each sample [N], from logits [N, K]; gradients reach both."""
    log_p, log_q = F.log_softmax(full(clean), 1), F.log_softmax(full(attacked), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def trades(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """TRADES (Zhang et al. 2019, Algorithm 1; beta is its 1 / lambda): mean of -log p_y + beta · KL(p || q)."""
    return F.cross_entropy(full(clean), y) + beta * divergence(clean, attacked).mean()


def mart(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """MART (Wang et al. 2020, Table 1; beta is its lambda).

    Mean of -log q_y - log(1 - max of q over the other classes) + beta · KL(p || q) · (1 - p_y). The second logarithm is
    taken of the sum of all other probabilities, which is exact where the authors' code adds 1e-4 inside.
    """
    log_q = F.log_softmax(full(attacked), 1)
    own = F.one_hot(y, log_q.shape[1]).bool()
    rival = log_q.masked_fill(own, -torch.inf).argmax(1, keepdim=True)
    rest = log_q.scatter(1, rival, -torch.inf).logsumexp(1)
    missed = 1 - F.softmax(full(clean), 1).gather(1, y[:, None]).squeeze(1)
    boosted = -log_q.gather(1, y[:, None]).squeeze(1) - rest
    return (boosted + beta * divergence(clean, attacked) * missed).mean()


def geometry_weights(held: Tensor, steps: int, shift: float) -> Tensor:
    """GAIRAT's weights [N], of mean 1 (Zhang et al. 2021, Algorithm 2).

    held: how many steps each sample [N] withstood, k in the paper, 0 to `steps`, K there. The weights are
    (1 + tanh(shift + 5 (1 - 2 k / K))) / 2, divided by their mean over the samples given: a micro-batch, so that they
    do not depend on the number of workers. The less a sample withstands, the more it weighs.
    """
    weights = torch.sigmoid(2 * (shift + 5 * (1 - 2 * held.float() / steps)))  # = (1 + tanh) / 2, and never 0
    return weights / weights.mean()


def gairat(attacked: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """GAIRAT (Zhang et al. 2021, Algorithm 2): mean of w · -log q_y."""
    return (weights * F.cross_entropy(full(attacked), y, reduction="none")).mean()


def perturb_divergence(model: nn.Module, x: Tensor, attack: Attack, generator: torch.Generator) -> Tensor:
    """TRADES's attack: images [N, C, H, W] in the ball around x at which the prediction differs most from that at x.

    It ascends KL(p || q) with p fixed. The gradient of that is zero at x itself, so it starts at a random point of the
    ball (`random_start`) or, as in the authors' code, at x with a little Gaussian noise.
    """
    threat = threat_of(attack)
    with evaluating(model):
        with torch.no_grad():
            log_p = F.log_softmax(model(x).to(x.dtype), 1)
        if attack.random_start:
            noise = threat.sample(x, generator)
        else:
            noise = threat.project(START * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype))

        def criterion(logits: Tensor) -> Tensor:
            return (log_p.exp() * (log_p - F.log_softmax(logits, 1))).sum(1)

        return _climb(model, x, (x + noise).clamp(0, 1), attack, criterion)[0]


def perturb_counting(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """GAIRAT's attack: PGD's images [N, C, H, W], and how many steps each sample [N] withstood.

    That is the number of steps after which it is first misclassified: 0 where it is so at the start, and `steps` where
    it is not before the last. (The authors' code counts the steps at which it is classified correctly, which is the
    same where a sample that has fallen stays so.)
    """
    with evaluating(model):
        start = (x + threat_of(attack).sample(x, generator)).clamp(0, 1) if attack.random_start else x
        images, seen = _climb(model, x, start, attack, lambda logits: F.cross_entropy(logits, y, reduction="none"))
    right = torch.stack([logits.argmax(1) == y for logits in seen])
    return images, right.long().cumprod(0).sum(0)


def threat_of(attack: Attack) -> Threat:
    """The threat model of a recipe's attack, which must have a norm."""
    assert attack.norm is not None
    return Threat(attack.norm, attack.eps)


def _climb(
    model: nn.Module, x: Tensor, start: Tensor, attack: Attack, criterion: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Projected gradient ascent of `criterion`: the images it ends at, and the logits before each step."""
    threat, images, seen = threat_of(attack), start, []
    size = 2.5 * attack.eps / attack.steps if attack.step_size is None else attack.step_size
    for _ in range(attack.steps):
        logits, _, direction = ascent(model, images, criterion)
        images = threat.move(images, x, direction, size)
        seen.append(logits)
    return images, seen
