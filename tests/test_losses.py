"""The losses against torch's sums, NumPy and SciPy, and the conversion of the paper's weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_expit, log_softmax

from arae.config import Losses
from arae.train import losses


def tensors(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g), torch.rand(shape, generator=g)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification(smoothing):
    logits, y = torch.randn(9, 5) * 3, torch.arange(9) % 5
    target = np.eye(5)[y.numpy()] * (1 - smoothing) + smoothing / 5
    expected = -(target * log_softmax(logits.numpy().astype(np.float64), axis=1)).sum(1).mean()
    assert losses.classification(logits, y, smoothing).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
def test_pixel(norm, power):
    a, b = tensors(4, 3, 7, 5)
    expected = np.mean(np.abs(a.double().numpy() - b.double().numpy()) ** power)
    assert losses.pixel(a, b, norm).item() == pytest.approx(expected, rel=1e-6)


def test_feature():
    a, b = tensors(4, 8, 2, 2)
    assert losses.feature(a, b).item() == pytest.approx(((a - b) ** 2).mean().item(), rel=1e-6)


LOGITS = [torch.zeros(3), torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.tensor([-200.0, 200.0])]


@pytest.mark.parametrize("logits", LOGITS)
def test_adversarial(logits):
    assert losses.adversarial(logits).item() == pytest.approx(-log_expit(logits.double().numpy()).mean(), rel=1e-5)


@pytest.mark.parametrize("real", LOGITS)
@pytest.mark.parametrize("fake", LOGITS)
def test_discriminator(real, fake):
    expected = -log_expit(real.double().numpy()).mean() - log_expit(-fake.double().numpy()).mean()
    assert losses.discriminator(real, fake).item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_summed_in_float32():
    a = torch.full((1, 3, 300, 300), 0.5, dtype=torch.bfloat16)
    for value in (losses.pixel(a, a * 0), losses.feature(a, a * 0), losses.adversarial(a.flatten())):
        assert value.dtype == torch.float32
    assert losses.pixel(a, a * 0).item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("loss", [losses.pixel, losses.feature])
def test_shapes_must_agree(loss):
    with pytest.raises(ValueError, match="shapes differ"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("weight", "elements", "expected"), [(2e-6, 3 * 224 * 224, 38.5), (1e-2, 9216, 11796.48), (100, 1, 12800)]
)
def test_weights_from_the_paper(weight, elements, expected):
    assert losses.from_paper(weight, elements) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_converted_weights_give_the_gradient_of_the_papers_sums(norm):
    """At batch 128: the paper's weighted sums against the means with converted weights."""
    g = torch.Generator().manual_seed(0)
    x_hat, x = torch.rand(128, 3, 8, 8, generator=g), torch.rand(128, 3, 8, 8, generator=g)
    maps = torch.randn(192, 20, generator=g), torch.randn(192, generator=g)

    def outputs(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1) @ maps[0], images.flatten(1) @ maps[1] / 10

    f, _ = outputs(x)

    def paper(images: torch.Tensor) -> torch.Tensor:
        f_hat, logits = outputs(images)
        pix = F.l1_loss if norm == "l1" else F.mse_loss
        gan = F.binary_cross_entropy(logits.sigmoid(), torch.ones(128), reduction="sum")
        return 2e-6 * pix(images, x, reduction="sum") + 1e-2 * F.mse_loss(f_hat, f, reduction="sum") + 100 * gan

    def ours(images: torch.Tensor) -> torch.Tensor:
        f_hat, logits = outputs(images)
        return (
            losses.from_paper(2e-6, 192) * losses.pixel(images, x, norm)
            + losses.from_paper(1e-2, 20) * losses.feature(f_hat, f)
            + losses.from_paper(100, 1) * losses.adversarial(logits)
        )

    gradients = []
    for loss in (paper, ours):
        images = x_hat.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(images), images)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5 * gradients[0].abs().max().item())


ALEXNET, CIFAR = (3 * 224 * 224, 256 * 6 * 6), (3 * 32 * 32, 512 * 4 * 4)
PIXEL, FEATURE, GAN = 38.535168, 11796.48, 12800.0
# Preset, elements of image and features -> pixel, feature, adversarial, discriminator.
RESOLVED = [
    ("inversion-pixel", ALEXNET, (PIXEL, 0, 0, 1)),
    ("inversion-pixel-feature", ALEXNET, (PIXEL, FEATURE, 0, 1)),
    ("inversion", ALEXNET, (PIXEL, FEATURE, GAN, GAN)),
    ("anomaly-standard", ALEXNET, (1000 * PIXEL, FEATURE, 0, 1)),
    ("anomaly-robust", ALEXNET, (PIXEL, FEATURE, 0, 1)),
    ("style-standard", ALEXNET, (100 * PIXEL, FEATURE, 0, 1)),
    ("style-robust", (3 * 224 * 224, 64 * 27 * 27), (PIXEL, 59719.68, 0, 1)),
    ("denoising", ALEXNET, (PIXEL, FEATURE, 0, 1)),
    ("inversion-pixel-feature", CIFAR, (0.786432, 10485.76, 0, 1)),
]


@pytest.mark.parametrize(("preset", "elements", "expected"), RESOLVED)
def test_a_preset_is_resolved_at_the_sizes(preset, elements, expected):
    made = losses.resolved(Losses(preset=preset), *elements)
    assert made.preset is None
    got = (made.pixel, made.feature, made.adversarial, made.discriminator)
    assert got == pytest.approx(expected, rel=1e-9)
    assert losses.resolved(made, 1, 1) is made


def test_every_preset_is_tested_and_keeps_the_pixel_norm():
    assert {preset for preset, _, _ in RESOLVED} == set(losses.PRESETS)
    assert losses.resolved(Losses(preset="denoising", pixel_norm="l2"), 10, 10).pixel_norm == "l2"


def test_without_a_preset_the_weights_are_the_recipes():
    part = Losses(pixel=0.3, feature=0.2)
    assert losses.resolved(part, 100, 100) is part
