"""The losses, as pure functions, **mean**-reduced and in float32.

The paper's weights belong to sums over a batch of 128; `from_paper` converts them. Equations are those of the ARAE
paper's Sec. 4; features f, images x, and the discriminator's logits l, with D = sigmoid(l).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from arae.config import Losses, Preset
from arae.precision import full

PRESETS: dict[Preset, tuple[float, float, float]] = {
    "inversion-pixel": (2e-6, 0, 0),
    "inversion-pixel-feature": (2e-6, 1e-2, 0),
    "inversion": (2e-6, 1e-2, 100),
    "anomaly-standard": (2e-3, 1e-2, 0),
    "anomaly-robust": (2e-6, 1e-2, 0),
    "style-standard": (2e-4, 1e-2, 0),
    "style-robust": (2e-6, 1e-2, 0),
    "denoising": (2e-6, 1e-2, 0),
}
"""The paper's weights (Table 1; Sec. A4 of its appendix) of the pixel, feature and adversarial losses, for sums over a
batch of 128. The discriminator's own loss weighs what the adversarial one does, 100, as in the authors' code (the text
prints the pixel loss's 2e-6 there)."""


def classification(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits [N, K] and class indices y [N]."""
    return F.cross_entropy(full(logits), y, label_smoothing=label_smoothing)


def pixel(x_hat: Tensor, x: Tensor, norm: Literal["l1", "l2"] = "l1") -> Tensor:
    """Eq. 4: mean over batch and elements of |x̂ - x| (l1) or (x̂ - x)² (l2), for images [N, C, H, W] in [0, 1]."""
    _same_shape(x_hat, x)
    return F.l1_loss(full(x_hat), full(x)) if norm == "l1" else F.mse_loss(full(x_hat), full(x))


def feature(f_hat: Tensor, f: Tensor) -> Tensor:
    """Eq. 5: mean over batch and elements of (f̂ - f)², features of the reconstruction and of the image."""
    _same_shape(f_hat, f)
    return F.mse_loss(full(f_hat), full(f))


def adversarial(fake_logits: Tensor) -> Tensor:
    """Eq. 6: mean of -log D(reconstruction), from logits [N]; the generator's loss."""
    return F.softplus(-full(fake_logits)).mean()


def discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Eq. 7: mean of -log D(real) plus mean of -log(1 - D(reconstruction)), from logits [N] and [N]."""
    return F.softplus(-full(real_logits)).mean() + F.softplus(full(fake_logits)).mean()


def from_paper(weight: float, elements: int, batch: int = 128) -> float:
    """The weight of a mean-reduced loss that does what `weight` does for a sum over `batch` samples of `elements`.

    2e-6 on images of 3·224·224 gives 38.5; 1e-2 on 9216 features, 11,796; 100 on the discriminator's output, 12,800.
    """
    return weight * elements * batch


def resolved(part: Losses, image_elements: int, feature_elements: int) -> Losses:
    """The weights that train: those of the preset, where there is one, as weights of means; else `part` itself.

    image_elements: C·H·W of an image; feature_elements: c·h·w of the features that the feature loss compares.
    """
    if part.preset is None:
        return part
    pix, feat, gan = PRESETS[part.preset]
    return Losses(
        pixel=from_paper(pix, image_elements),
        pixel_norm=part.pixel_norm,
        feature=from_paper(feat, feature_elements),
        adversarial=from_paper(gan, 1),
        discriminator=from_paper(gan, 1) or part.discriminator,
    )


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")  # broadcasting would hide it
