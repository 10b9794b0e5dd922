"""Signs that a measured robustness is not to be trusted, in the manner of AutoAttack's and RobustBench's checks.

After Athalye et al. 2018 (obfuscated gradients), Carlini et al. 2019 (on evaluating adversarial robustness), Croce &
Hein 2020. Each remark is one plain line. None proves anything by itself: it says what to look into.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arae.attacks.apgd import margin
from arae.attacks.gradient import Model, check_images, evaluation_mode, fgsm, pgd
from arae.attacks.threat import Threat

SAME = 1e-4  # of the logits' length: what the order of sums may change
PASSES = 5
WEAK_STEPS, STRONG_STEPS = 10, 20
NOISE = 0.05  # the share of samples by which attacks may differ for no reason
SQUARE_GAIN = 0.002  # robust accuracy that Square may take off what the gradient attacks left

NO_GRADIENT = "the outputs have no gradient in the images (a detach or an argmax on the way?): only Square can attack"


def checks(model: Model, x: Tensor, y: Tensor, threat: Threat, *, limit: int = 64) -> list[str]:
    """Remarks on a model [N, C, H, W] in [0, 1] -> logits [N, K], from the first `limit` images; [] where all is well.

    Looks for random outputs; outputs that are probabilities or decisions in place of logits; gradients that are missing
    or exactly zero; one step that beats many, a wider ball that protects, and an unbounded attack that fails; and fewer
    classes than the DLR losses were made for. Costs about 50 passes there and back of `limit` images, and draws
    no random numbers. Raises ValueError for images not in [0, 1].
    """
    check_images(x, y)
    x, y = x[:limit].detach(), y[:limit]
    if len(x) == 0:
        return []
    with evaluation_mode(model):
        remarks, usable = _of_outputs(model, x)
        if usable:
            found, usable = _of_gradients(model, x, y)
            remarks += found
        if usable and threat.eps > 0:
            remarks += _of_attacks(model, x, y, threat)
    return remarks


def square_remark(broken_by: dict[str, int], n: int) -> list[str]:
    """A remark where Square, which sees no gradient, breaks what gradient attacks left of the n samples."""
    gained, others = broken_by.get("square", 0), set(broken_by) - {"square"}
    if not others or gained <= SQUARE_GAIN * n:
        return []
    return [
        f"masked gradients? Square, which uses none, broke {gained} of {n} images that the gradient attacks could not: "
        f"give Square more queries, or attack adaptively"
    ]


def _of_outputs(model: Model, x: Tensor) -> tuple[list[str], bool]:
    """Remarks on the logits as numbers, and whether there is any use in going on."""
    remarks = []
    with torch.no_grad():
        passes = torch.stack([model(x).to(x.dtype) for _ in range(PASSES)])
    logits = passes[0]
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits)).any(1).sum())
        return [f"the logits of {bad} of {len(x)} images are not finite: every attack on them is void"], False
    length = logits.norm(dim=1).clamp_min(1e-10)
    spread = ((passes - logits).norm(dim=2) / length).amax().item()
    if spread > SAME:
        flips = int((passes.argmax(2) != logits.argmax(1)).any(0).sum())
        remarks.append(
            f"randomised model: the same images gave logits up to {spread:.1g} of their length apart, and {flips} of "
            f"{len(x)} other classes: attack the mean over its noise"
        )
    classes = logits.shape[1]
    if classes < 4:
        remarks.append(
            f"{classes} classes: the DLR losses, published for four or more, are replaced by their nearest kin"
        )
    if logits.min() >= 0 and logits.max() <= 1 + SAME and (logits.sum(1) - 1).abs().max() <= SAME:
        what = "decisions (0 or 1)" if bool(((logits == 0) | (logits == 1)).all()) else "probabilities"
        remarks.append(f"the outputs are {what}, not logits: losses on them saturate; give the layer before")
    return remarks, True


def _of_gradients(model: Model, x: Tensor, y: Tensor) -> tuple[list[str], bool]:
    """Remarks on the gradients in the images, and whether gradient attacks can run at all."""
    with torch.enable_grad():
        images = x.clone().requires_grad_()
        logits = model(images).to(x.dtype)
        losses = (F.cross_entropy(logits, y, reduction="sum"), margin(logits, y).sum())
        if not losses[0].requires_grad:
            return [NO_GRADIENT], False
        gradients = [torch.autograd.grad(each, images, allow_unused=True, retain_graph=True)[0] for each in losses]
    zeros = [(gradient.flatten(1) == 0).all(1) for gradient in gradients if gradient is not None]
    if len(zeros) < len(losses):
        return [NO_GRADIENT], False
    flat, level = zeros
    n, remarks = len(x), []
    void = torch.stack([(~each.isfinite()).flatten(1).any(1) for each in gradients if each is not None]).any(0)
    if void.any():
        remarks.append(f"the gradients of {int(void.sum())} of {n} images are not finite: attacks there are void")
    if level.any():
        remarks.append(
            f"masked gradients: the logits of {int(level.sum())} of {n} images do not change with the image "
            f"(gradient exactly 0): a step function on the way?"
        )
    if (flat & ~level).any():
        remarks.append(
            f"the cross-entropy's gradient is exactly 0 in {int((flat & ~level).sum())} of {n} images, for the logits "
            f"are too far apart for the softmax: trust the DLR attacks"
        )
    return remarks, not bool(void.any())


def _of_attacks(model: Model, x: Tensor, y: Tensor, threat: Threat) -> list[str]:
    """Remarks on attacks that should be stronger than others, and are not."""

    def left(images: Tensor) -> float:
        with torch.no_grad():
            return (model(images).argmax(1) == y).float().mean().item()

    diameter = 1.0 if threat.norm == "linf" else x[0].numel() ** 0.5
    wider = Threat(threat.norm, min(2 * threat.eps, diameter))
    once, often = left(fgsm(model, x, y, threat)), left(pgd(model, x, y, threat, WEAK_STEPS))
    wide = left(pgd(model, x, y, wider, WEAK_STEPS))
    with torch.no_grad():
        spread = margin(model(x).to(x.dtype), y).abs().mean().clamp_min(torch.finfo(x.dtype).tiny)
    # The logits tempered, so that no confident sample is spared: that the cross-entropy saturates is said elsewhere.
    unbounded = left(pgd(lambda images: model(images) / spread, x, y, Threat("linf", 1.0), STRONG_STEPS))
    remarks = []
    if often > once + NOISE:
        remarks.append(
            f"masked gradients: {WEAK_STEPS} steps leave {often:.0%} of {len(x)} images right, one step of the whole "
            f"radius only {once:.0%}"
        )
    if wide > often + NOISE:
        remarks.append(
            f"masked gradients: twice the radius leaves {wide:.0%} of {len(x)} images right, the radius itself only "
            f"{often:.0%}"
        )
    if unbounded > NOISE:
        remarks.append(
            f"masked gradients: an attack that may change the image at will leaves {unbounded:.0%} of {len(x)} images "
            f"right, where 0% are expected"
        )
    return remarks
