"""Gradient attacks: projected gradient ascent on the cross-entropy (Madry et al. 2018) and its single step, FGSM.

Images, perturbations, norms and the loss are float32 (or float64, where the images are), whatever autocast the caller
runs the model under. The loss is summed over the batch, so that the perturbation of a sample does not depend on the
samples beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arae.attacks.threat import Threat
from arae.config import Attack
from arae.errors import NotFinite
from arae.modes import evaluating

Model = Callable[[Tensor], Tensor]
HALF_SCALE = 1024.0


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    steps: int = 7,
    step_size: float | None = None,
    random_start: bool = False,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    *,
    survivors_only: bool = False,
) -> Tensor:
    """Images in the ball around x that the model classifies worst, by projected gradient ascent.

    model: images [N, C, H, W] in [0, 1] -> logits [N, K]; run in evaluation mode, after which each of its submodules is
    put back in its own mode. x: float in [0, 1]. y: class indices [N]. step_size: in the norm of the threat, default
    2.5 · eps / steps. random_start: begin at a uniform point of the ball; every restart after the first does so anyway.
    restarts: keep, of each sample, the worst run: misclassified first, then the highest loss. generator: of the random
    starts. survivors_only: restart only the samples that are still classified correctly (the same samples are broken
    in the end, at less cost; the broken ones just keep their first success).

    Returns images [N, C, H, W], detached, inside the ball (to rounding) and inside [0, 1]; at eps 0, x itself. The
    gradients of the model's parameters are not touched. Raises ValueError for images not in [0, 1], impossible
    arguments, and a model whose output has no gradient in the images.
    """
    check_images(x, y)
    step = 2.5 * threat.eps / max(steps, 1) if step_size is None else step_size
    if steps < 1 or restarts < 1 or not step >= 0:
        raise ValueError(f"PGD needs steps >= 1, restarts >= 1, step_size >= 0, not {steps}, {restarts}, {step}")
    search = _Search(model, threat, steps, step, careful=True)
    return search.run(x, y, restarts, generator, random_start=random_start, survivors_only=survivors_only)


def fgsm(model: Model, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """One step of the whole radius (Goodfellow et al. 2015); arguments and result as in `pgd`."""
    return pgd(model, x, y, threat, steps=1, step_size=threat.eps)


def perturb(model: Model, x: Tensor, y: Tensor, attack: Attack, generator: torch.Generator | None = None) -> Tensor:
    """`pgd` as a recipe's attack describes it, for training: x is not checked, as that would wait for the device."""
    if attack.norm is None or attack.eps == 0:
        return x
    step = 2.5 * attack.eps / attack.steps if attack.step_size is None else attack.step_size
    search = _Search(model, Threat(attack.norm, attack.eps), attack.steps, step, careful=False)
    return search.run(x, y, attack.restarts, generator, random_start=attack.random_start, survivors_only=False)


def perturb_unprojected(
    model: Model, x: Tensor, y: Tensor, attack: Attack, noise: float, generator: torch.Generator | None = None
) -> Tensor:
    """N-FGSM (de Jorge et al. 2022, Algorithm 1), for training: noise, one step, and no projection onto the ball.

    The noise is uniform in the ball of `noise` radii, cut to [0, 1] as in the authors' code, which is for l-inf alone.
    The step is one radius long where the attack names no size.
    Returns images in [0, 1] which may lie outside the ball.
    """
    if attack.norm is None or attack.eps == 0:
        return x
    threat, size = Threat(attack.norm, attack.eps), attack.eps if attack.step_size is None else attack.step_size
    start = (x.detach() + Threat(attack.norm, noise * attack.eps).sample(x, generator)).clamp(0, 1)
    with evaluation_mode(model):
        direction = ascent(model, start, lambda logits: F.cross_entropy(logits, y, reduction="none"))[2]
    return (start + size * threat.steepest(direction)).clamp(0, 1)


def perturb_until_misclassified(
    model: Model, x: Tensor, y: Tensor, attack: Attack, more: int, generator: torch.Generator | None = None
) -> Tensor:
    """PGD that each sample leaves early, for training: friendly adversarial training (Zhang et al. 2020, Algorithm 1).

    A sample that is misclassified takes `more` further steps (their tau) and stops; the network is asked about the
    others alone. As `perturb`, with one run.
    """
    if attack.norm is None or attack.eps == 0:
        return x
    threat = Threat(attack.norm, attack.eps)
    size = 2.5 * attack.eps / attack.steps if attack.step_size is None else attack.step_size
    x = x.detach()
    images = (x + threat.sample(x, generator)).clamp(0, 1) if attack.random_start else x.clone()
    rows, left = torch.arange(len(x), device=x.device), torch.full_like(y, more)
    with evaluation_mode(model):
        for _ in range(attack.steps):
            labels = y[rows]
            logits, _, direction = ascent(
                model, images[rows], lambda z, labels=labels: F.cross_entropy(z, labels, reduction="none")
            )
            wrong = logits.argmax(1) != labels
            going = ~wrong | (left[rows] > 0)
            left[rows] -= wrong.long()
            rows, direction = rows[going], direction[going]
            if len(rows) == 0:
                break
            images[rows] = threat.move(images[rows], x[rows], direction, size)
    return images


def ascent(model: Model, images: Tensor, criterion: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, K] and losses [N] of the images [N, ...], and the direction [N, ...] in which each loss rises most.

    criterion: logits, in the images' precision -> losses [N], each of its own sample alone. The direction is the
    gradient up to a positive factor. Raises ValueError where the losses have no gradient in the images.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images)
        # In half precision a confident sample's gradient would vanish; only its direction is used.
        scale = HALF_SCALE if logits.dtype == torch.float16 else 1.0
        logits = logits.to(images.dtype)
        losses = criterion(logits)
        total = scale * losses.sum()
        gradient = torch.autograd.grad(total, images, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        raise ValueError(
            "no gradient of the loss reaches the images, so the attack would be void: does the model detach?"
        )
    return logits.detach(), losses.detach(), gradient


class _Search:
    """One PGD in one threat model: what `pgd` and `perturb` share."""

    def __init__(self, model: Model, threat: Threat, steps: int, step: float, *, careful: bool) -> None:
        """`careful`: look at every gradient, which waits for the device."""
        self.model, self.threat, self.steps, self.step, self.careful = model, threat, steps, step, careful

    def run(
        self,
        x: Tensor,
        y: Tensor,
        restarts: int,
        generator: torch.Generator | None,
        *,
        random_start: bool,
        survivors_only: bool,
    ) -> Tensor:
        """The worst images of all restarts."""
        if self.threat.eps == 0 or len(x) == 0:
            return x
        x = x.detach()
        with evaluation_mode(self.model):
            worst = self.ascend(x, y, self.start(x, generator) if random_start else x)
            if restarts == 1:
                return worst
            wrong, loss = self.judge(worst, y)
            for _ in range(restarts - 1):
                start = self.start(x, generator)  # for all samples, so that survivors_only sees the same starts
                tried = torch.nonzero(~wrong).squeeze(1) if survivors_only else torch.arange(len(x), device=x.device)
                if len(tried) == 0:
                    break
                images = self.ascend(x[tried], y[tried], start[tried])
                now_wrong, now_loss = self.judge(images, y[tried])
                worse = (now_wrong & ~wrong[tried]) | ((now_wrong == wrong[tried]) & (now_loss > loss[tried]))
                kept = tried[worse]
                worst[kept], wrong[kept], loss[kept] = images[worse], now_wrong[worse], now_loss[worse]
        return worst

    def start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """A random point of the ball around each image, clamped to [0, 1]."""
        return (x + self.threat.sample(x, generator)).clamp(0, 1)

    def ascend(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """Ascend the loss from `start`, and after each step project onto the ball, then onto [0, 1]."""
        images = start
        for _ in range(self.steps):
            images = self.threat.move(images, x, self.gradient(images, y), self.step)
        return images

    def gradient(self, images: Tensor, y: Tensor) -> Tensor:
        """Gradient of each sample's loss in its image."""
        found = ascent(self.model, images, lambda logits: F.cross_entropy(logits, y, reduction="none"))[2]
        return refuse_void(found) if self.careful else found

    def judge(self, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each sample is misclassified, and its loss."""
        with torch.no_grad():
            logits = self.model(images).to(images.dtype)
        return logits.argmax(1) != y, F.cross_entropy(logits, y, reduction="none")


def evaluation_mode(model: Model) -> AbstractContextManager[None]:
    """`evaluating`, for a model that may be a plain function."""
    return evaluating(model) if isinstance(model, nn.Module) else nullcontext()


def refuse_void(gradient: Tensor) -> Tensor:
    """The gradients [N, ...] of an attack's step; NotFinite (a ValueError) where some are NaN or infinite.

    In l-inf such a sample would stay where it is and count as robust; in l2 it would become NaN, which a classifier
    calls some class, and count as broken.
    """
    bad = int((~gradient.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise NotFinite(
            f"the attack met gradients that are not finite on {bad} of {len(gradient)} images, and is void there: look "
            "for square roots and divisions at zero in the model"
        )
    return gradient


def check_images(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless x is float in [0, 1] with one int64 class index in y for each image."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images must be float32 in [0, 1], not {x.dtype}: divide 8-bit images by 255")
    if x.dim() < 2 or y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(
            f"images {tuple(x.shape)} need int64 class indices of shape [N], not {y.dtype} {tuple(y.shape)}"
        )
    if len(x) and not (x.amin() >= 0 and x.amax() <= 1):
        raise ValueError(f"images must lie in [0, 1], not [{x.amin():g}, {x.amax():g}]: normalise inside the model")
