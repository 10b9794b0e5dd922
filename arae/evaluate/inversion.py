"""Images by descent on the distance of their features, without a decoder: the protocol `inversion`.

Robust representations can be inverted so (Engstrom et al. 2019, Adversarial Robustness as a Prior for Learned
Representations, Sec. 4.1): the method RI that the ARAE paper compares with (Table 7).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from arae.attacks.threat import Threat
from arae.config import Recipe
from arae.data.augment import to_float
from arae.errors import InputError
from arae.evaluate.measure import Recorder
from arae.evaluate.quality import Quality
from arae.files import write_bytes
from arae.models.autoencoder import Autoencoder, load_weights
from arae.records import Record
from arae.seeds import mix

if TYPE_CHECKING:
    from arae.evaluate.batches import Batches, Progress, Team

_EVERY = 10  # descent steps between looks at the progress


def invert(
    encoder_features: Callable[[Tensor], Tensor],
    target: Tensor,
    start: Tensor,
    steps: int,
    step_size: float,
    told: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Images whose features come near `target`, by normalised-gradient descent on ||f(x') - f(x)||_2 / ||f(x)||_2.

    encoder_features: images [N, C, H, W] in [0, 1] -> features [N, ...]. target: features f(x) [N, ...], not all zero.
    start: images [N, C, H, W] to begin at. step_size: l2 length of every step; after each the images are clamped to
    [0, 1]. told: hears the number of steps done.

    A step of fixed length can't settle, so of each image the best point on its way is returned, [N, C, H, W], detached;
    the start counts among them.
    """
    if steps < 1 or not step_size > 0:
        raise ValueError(f"inversion needs steps >= 1 and step_size > 0, not {steps} and {step_size}")
    target, images = target.detach(), start.detach().clamp(0, 1)
    scale = target.flatten(1).norm(dim=1).clamp_min(torch.finfo(target.dtype).tiny)
    best, least = images, torch.full_like(scale, torch.inf)
    ball = Threat("l2", step_size)
    for step in range(steps + 1):
        with torch.enable_grad():
            images = images.requires_grad_()
            distance = (encoder_features(images) - target).flatten(1).norm(dim=1) / scale
            gradient = torch.autograd.grad(distance.sum(), images)[0] if step < steps else None
        images, distance = images.detach(), distance.detach()
        better = distance < least
        best = torch.where(better.view(-1, *[1] * (images.dim() - 1)), images, best)
        least = torch.where(better, distance, least)
        if gradient is not None:
            images = (images - step_size * ball.steepest(gradient)).clamp(0, 1)
        told(step)
    return best


def inverted(
    batches: Batches, images: Tensor, team: Team, progress: Progress, state: Path, kept: list[Path]
) -> list[Record]:
    """Quality of the images found for the features of `images`, uint8 [n, C, H, W], as protocol `inversion`.

    team: calls `batches`, or what is like it elsewhere. Each finished batch is kept under `state`, in a folder that
    `kept` is told, and not computed again. InputError: a start from other images where there is one alone.
    """
    recipe, model, settings = batches.recipe, batches.model, batches.recipe.evaluate
    if settings.inversion.start == "other" and len(images) < 2:
        raise InputError(
            "evaluate.inversion.start = other needs two images or more: raise evaluate.n, or start at noise"
        )
    size = settings.batch
    folder, quality = state / f"inversion-{_job(recipe, model, images)}", Quality(settings)
    kept.append(folder)
    spans, steps = images.split(size), settings.inversion.steps
    parts = [folder / f"{i}.safetensors" for i in range(len(spans))]
    wanted = [i for i, part in enumerate(parts) if not _is_whole(part)]
    before = len(spans) - len(wanted)

    def told(step: int) -> None:
        if step % _EVERY == 0 or step == steps:
            progress("inversion", steps * before + step, steps * len(spans))

    batches.told = told
    told(0)
    calls = ((spans[i], _start(recipe, images, i * size, to_float(spans[i]), i)) for i in wanted)
    for place, found in team.do("inverted", calls):
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(parts[wanted[place]], save({"images": found}))
        before += 1
        told(0)
    for x, part in zip(spans, parts, strict=True):
        quality.add(load_weights(part)["images"].to(x.device), to_float(x))
    return Recorder(recipe, model, team.device, decoder=False).quality(quality, "inversion", stage="encoder")


def _is_whole(path: Path) -> bool:
    """Whether a finished batch is there; a damaged one is removed."""
    try:
        return path.is_file() and "images" in load_weights(path)
    except InputError:
        path.unlink()
        return False


def _start(recipe: Recipe, images: Tensor, begin: int, x: Tensor, number: int) -> Tensor:
    """The next evaluated image for each of the batch `x`, or grey noise: N(0.5, 0.1), seeded by the batch's number."""
    if recipe.evaluate.inversion.start == "other":
        following = torch.arange(begin + 1, begin + 1 + len(x), device=images.device) % len(images)
        return to_float(images[following])
    generator = torch.Generator().manual_seed(mix(recipe.seed, "inversion", number))
    return (0.5 + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1).to(x.device)


def _job(recipe: Recipe, model: Autoencoder, images: Tensor) -> str:
    """What tells this inversion from any other: the recipe, the encoder's weights, the images."""
    parts = [recipe.digest, str(model.config["encoder"].get("sha256")), str(tuple(images.shape))]
    digest = hashlib.sha256("\n".join(parts).encode())
    digest.update(images.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
