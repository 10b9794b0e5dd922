"""APGD: PGD that chooses its own step size, and the scale-invariant losses it climbs (Croce & Hein 2020).

"Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", Algorithm 1 and
Eqs. 6 and 7. Where the paper leaves a choice, it is that of the authors' code (fra31/auto-attack): the start lies on
the ball's surface, the first step is 2 eps long, and the targets are the likeliest wrong classes of the clean image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from arae.attacks.gradient import Model, ascent, check_images, evaluation_mode, refuse_void
from arae.attacks.threat import Threat, per_sample

Loss = Literal["ce", "dlr", "dlr-targeted"]
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]

MOMENTUM = 0.75
RISES = 0.75  # rho: the share of steps that must raise the loss for the step size to be kept
TINY = 1e-12


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    steps: int = 100,
    loss: Loss = "ce",
    restarts: int = 1,
    targets: int = 9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images in the ball around x that the model misclassifies, or else those with the highest loss that was found.

    model: images [N, C, H, W] in [0, 1] -> logits [N, K], K >= 2; run in evaluation mode, after which each of its
    submodules is put back in its own mode. x: float in [0, 1]. y: class indices [N]. loss: cross-entropy, `dlr`, or
    `dlr-targeted`, which runs once for each of the `targets` likeliest wrong classes (at most K - 1). restarts: runs
    per sample (and target), each from a random point of the ball's surface drawn from `generator`.

    A sample is attacked until it is misclassified: its first such image is kept, and one that is misclassified from the
    start stays as it is. Returns images [N, C, H, W], detached, inside the ball (to rounding) and inside [0, 1]; at
    eps 0, x itself. The gradients of the model's parameters are not touched. Raises ValueError for images not in
    [0, 1], impossible arguments, and a model whose output has no gradient in the images.
    """
    check_images(x, y)
    if loss not in CRITERIA:
        raise ValueError(f"loss {loss!r}: write one of {', '.join(CRITERIA)}")
    if steps < 1 or restarts < 1 or targets < 1:
        raise ValueError(f"APGD needs steps, restarts and targets >= 1, not {steps}, {restarts}, {targets}")
    if threat.eps == 0 or len(x) == 0:
        return x
    climb = _Climb(model, threat, steps, CRITERIA[loss])
    with evaluation_mode(model), torch.no_grad():
        return _worst(climb, x.detach(), y, restarts, targets if loss == "dlr-targeted" else 1, generator)


def _worst(
    climb: _Climb, x: Tensor, y: Tensor, restarts: int, targets: int, generator: torch.Generator | None
) -> Tensor:
    """The first misclassified image of each sample over all runs, else the one with the highest loss."""
    goals, standing = _wrong_classes(climb.model(x).to(x.dtype), y)
    worst, peak = x.clone(), x.new_full((len(x),), -torch.inf)
    for goal in goals.T[:targets]:
        for _ in range(restarts):
            start = climb.start(x, generator)  # for all samples: a sample's starts do not depend on who is left
            tried = torch.nonzero(standing).squeeze(1)
            if len(tried) == 0:
                return worst
            images, loss, broken = climb.run(x[tried], y[tried], goal[tried], start[tried])
            higher = broken | (loss > peak[tried])
            worst[tried[higher]], peak[tried[higher]] = images[higher], loss[higher]
            standing[tried[broken]] = False
    return worst


def _wrong_classes(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The wrong classes, the likeliest first [N, K - 1]; and whether each sample is classified correctly."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"an attack needs logits [N, K] of two classes or more, not {tuple(logits.shape)}")
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, :-1], logits.argmax(1) == y


@dataclass
class _Walk:
    """Where the samples that still stand are on their way up: a row for each."""

    row: Tensor  # its place in the batch that the run began with
    x: Tensor
    y: Tensor
    goal: Tensor
    images: Tensor
    previous: Tensor
    loss: Tensor
    direction: Tensor
    best: Tensor
    best_loss: Tensor
    best_direction: Tensor
    size: Tensor  # of a step
    rises: Tensor  # steps since the last checkpoint that raised the loss
    checked_loss: Tensor  # the best loss at the last checkpoint
    halved: Tensor  # at the last checkpoint

    def keep(self, rows: Tensor) -> None:
        """Only these rows [rows] bool."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


class _Climb:
    """One run of Algorithm 1 in one threat model."""

    def __init__(self, model: Model, threat: Threat, steps: int, criterion: Criterion) -> None:
        self.model, self.threat, self.steps, self.criterion = model, threat, steps, criterion

    def start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """A random point of the ball's surface around each image, clamped to [0, 1]."""
        delta = self.threat.sample(x, generator)
        scale = self.threat.eps / self.threat.length(delta).clamp_min(torch.finfo(x.dtype).tiny)
        return (x + delta * per_sample(scale, x)).clamp(0, 1)

    def run(self, x: Tensor, y: Tensor, goal: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [N, ...], losses [N] and whether each is misclassified [N]."""
        images, loss = start.clone(), x.new_empty(len(x))
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def harvest(walk: _Walk, logits: Tensor) -> None:
            wrong = logits.argmax(1) != walk.y
            if wrong.any():
                rows = walk.row[wrong]
                images[rows], loss[rows], broken[rows] = walk.images[wrong], walk.loss[wrong], True
                walk.keep(~wrong)

        walk, logits = self.begin(x, y, goal, start)
        harvest(walk, logits)
        checks, last = set(checkpoints(self.steps)), 0
        for step in range(1, self.steps + 1):
            if len(walk.row) == 0:
                break
            harvest(walk, self.advance(walk, 1.0 if step == 1 else MOMENTUM))
            if step in checks:
                check(walk, step - last)
                last = step
        images[walk.row], loss[walk.row] = walk.best, walk.best_loss
        return images, loss, broken

    def begin(self, x: Tensor, y: Tensor, goal: Tensor, start: Tensor) -> tuple[_Walk, Tensor]:
        """The walk at its start, and the logits there."""
        logits, loss, direction = ascent(self.model, start, lambda logits: self.criterion(logits, y, goal))
        refuse_void(direction)
        nothing = torch.zeros_like(loss)
        walk = _Walk(
            row=torch.arange(len(x), device=x.device),
            x=x,
            y=y,
            goal=goal,
            images=start,
            previous=start,
            loss=loss,
            direction=direction,
            best=start,
            best_loss=loss,
            best_direction=direction,
            size=torch.full_like(loss, 2 * self.threat.eps),
            rises=nothing,
            checked_loss=loss,
            halved=nothing.bool(),
        )
        return walk, logits

    def advance(self, walk: _Walk, momentum: float) -> Tensor:
        """One step of Algorithm 1 (lines 7 to 11); returns the logits [rows, K] where it leads."""
        step = per_sample(walk.size, walk.x) * self.threat.steepest(walk.direction)
        ahead = self.inside(walk.x, walk.images + step)
        moved = walk.images + momentum * (ahead - walk.images) + (1 - momentum) * (walk.images - walk.previous)
        walk.previous, walk.images = walk.images, self.inside(walk.x, moved)
        before, y, goal = walk.loss, walk.y, walk.goal
        logits, walk.loss, walk.direction = ascent(self.model, walk.images, lambda z: self.criterion(z, y, goal))
        refuse_void(walk.direction)
        walk.rises = walk.rises + (walk.loss > before)
        better = walk.loss > walk.best_loss
        walk.best_loss = walk.loss.where(better, walk.best_loss)
        walk.best = walk.images.where(per_sample(better, walk.x), walk.best)
        walk.best_direction = walk.direction.where(per_sample(better, walk.x), walk.best_direction)
        return logits

    def inside(self, x: Tensor, images: Tensor) -> Tensor:
        """The images projected onto the ball around x, then onto [0, 1]."""
        return (x + self.threat.project(images - x)).clamp(0, 1)


def checkpoints(steps: int) -> list[int]:
    """The steps w after which APGD may halve its step size (Sec. 3.2): 22, 41, 57, 70, 80, 87, 93, 99 of 100."""
    last, percent, found = 0, 22, []
    while percent <= 100:  # in whole percents: 0.57 * 100 is not 57
        found.append(-(-percent * steps // 100))
        last, percent = percent, percent + max(percent - last - 3, 6)
    return sorted(set(found))


def check(walk: _Walk, length: int) -> None:
    """Halve the steps of the samples that climb no more, and take them back to their best point.

    Condition 1: fewer than 3/4 of the `length` steps since the last checkpoint raised the loss. Condition 2: the step
    was not halved at the last checkpoint, and the best loss has not risen since.
    """
    stuck = ~walk.halved & (walk.best_loss <= walk.checked_loss)
    walk.halved = (walk.rises < RISES * length) | stuck
    walk.size = walk.size.where(~walk.halved, walk.size / 2)
    walk.loss = walk.best_loss.where(walk.halved, walk.loss)
    back = per_sample(walk.halved, walk.x)
    walk.images = walk.best.where(back, walk.images)
    walk.direction = walk.best_direction.where(back, walk.direction)
    walk.checked_loss = walk.best_loss
    walk.rises = torch.zeros_like(walk.rises)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit less the right one [N], of logits [N, K]: above 0 where misclassified."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).max(1).values - own


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio [N] of logits [N, K] (Eq. 6): above 0 where misclassified, at most 1.

    With two classes there is no third logit to divide by: it is the plain margin z_other - z_y. APGD only takes the
    direction of its gradient and compares losses of one sample, so the missing scale does not matter to it.
    """
    if logits.shape[1] == 2:
        return margin(logits, y)
    ordered = logits.sort(dim=1, descending=True).values
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + TINY)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio [N] (Eq. 7), from the sorted logits z1 >= z2 >= ...

    It is z_t - z_y over z1 - (z3 + z4) / 2. With three classes, over z1 - (z2 + z3) / 2, which is as invariant to shift
    and scale; z1 - z3 would make it constant, with no gradient, for the least likely target. With two, the plain
    margin, as in `dlr`.
    """
    ahead = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    if logits.shape[1] == 2:
        return ahead
    ordered = logits.sort(dim=1, descending=True).values
    third = 2 if logits.shape[1] > 3 else 1
    return ahead / (ordered[:, 0] - ordered[:, third : third + 2].mean(1) + TINY)


CRITERIA: dict[str, Criterion] = {
    "ce": lambda logits, y, _: F.cross_entropy(logits, y, reduction="none"),
    "dlr": lambda logits, y, _: dlr(logits, y),
    "dlr-targeted": dlr_targeted,
}
