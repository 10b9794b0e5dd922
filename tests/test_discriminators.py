"""Discriminators: Table A5 by its counts and sizes, for every decoder's name, and the mirror of any shape."""

from unittest import mock

import pytest
import torch
from torch import nn

from arae.errors import InputError
from arae.models import create_discriminator
from arae.models.decoder import DECODERS
from arae.models.discriminator import DISCRIMINATORS


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def without_weights(name, features=None, image=None):
    """On the meta device and without spectral norm: shapes and counts at no cost."""
    with torch.device("meta"), mock.patch("arae.models.discriminator.normalise_spectrum"):
        return create_discriminator(name, features, image).eval()


def sides(discriminator, images):
    seen: list[int] = []
    for layer in discriminator.image:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *call: seen.append(call[2].shape[-1]))
    discriminator.image(images)
    return seen


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small: a second thread would wait more than work


AT = {
    224: [55, 51, 25, 23, 11],
    448: [111, 107, 53, 51, 25],
    64: [15, 11, 5, 3, 1],
    32: [32, 28, 13, 11, 5],
    28: [28, 24, 11, 9, 4],
    15: [15, 11, 5, 3, 1],
}
PAPER = [
    ("alexnet-conv5", (256, 6, 6), 224, 11_372_353),
    ("alexnet-conv5", (256, 13, 13), 448, 11_372_353),  # 13×13 features are averaged to 6×6
    ("alexnet-conv5", (64, 6, 6), 224, 11_372_353 - 192 * 36 * 1024),
    ("alexnet-conv1", (64, 27, 27), 224, 11_372_353 - 192 * 36 * 1024),
    ("vgg16-conv5_1", (512, 14, 14), 224, 11_372_353 + 256 * 36 * 1024),
    ("wrn-28-10-block3", (640, 8, 8), 32, 11_372_353 + (640 - 256) * 36 * 1024 - 3 * 32 * 40),
    ("resnet18-cifar-layer4", (512, 4, 4), 32, 11_372_353 + (512 * 16 - 256 * 36) * 1024 - 3 * 32 * 40),
    ("deepsim", (256, 6, 6), 224, 11_372_353),
    ("deepsim", (16, 2, 2), 15, 11_372_353 + (16 * 4 - 256 * 36) * 1024 - 3 * 32 * 40),
    ("deepsim", (16, 4, 4), 28, 11_372_353 + (16 * 16 - 256 * 36) * 1024 - 3 * 32 * 40),
    ("deepsim", (16, 4, 4), 64, 11_372_353 + (16 * 16 - 256 * 36) * 1024),
]


@pytest.mark.parametrize(("name", "features", "side", "parameters"), PAPER)
def test_parameters_and_every_size(name, features, side, parameters):
    discriminator = without_weights(name, features, (3, side, side))
    assert count(discriminator) == parameters
    images = torch.empty(4, 3, side, side, device="meta")
    assert discriminator(images, torch.empty(2, *features, device="meta")).shape == (4,)
    assert sides(discriminator, images) == AT[side]


def test_images_may_be_larger_than_the_discriminator_was_made_for():
    discriminator = without_weights("alexnet-conv5")
    assert sides(discriminator, torch.empty(1, 3, 448, 448, device="meta")) == AT[448]


def test_the_papers_discriminator():
    discriminator = create_discriminator("alexnet-conv5").eval()
    layers = [m for m in discriminator.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(nn.utils.parametrize.is_parametrized(layer, "weight") for layer in layers)
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (32, 3, 7, 7), (64, 32, 5, 5), (128, 64, 3, 3), (256, 128, 3, 3), (256, 256, 3, 3),
        (1024, 9216), (512, 1024), (512, 768), (1, 512),
    ]  # fmt: skip
    assert [m.p for m in discriminator.joint if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert {"image.0.bias", "feature.1.bias", "feature.3.bias", "joint.1.bias", "joint.4.bias"} <= set(
        discriminator.state_dict()
    )
    assert discriminator(torch.rand(2, 3, 224, 224), torch.randn(2, 256, 6, 6)).isfinite().all()


def test_every_decoder_has_its_discriminator():
    assert set(DISCRIMINATORS) == set(DECODERS)
    for name in set(DISCRIMINATORS) - {"mirror"}:
        assert without_weights(name).name == name


@pytest.mark.parametrize(
    ("name", "features", "image"),
    [
        ("mirror", (128, 4, 4), (1, 28, 28)),
        ("mirror", (512, 4, 4), (3, 32, 32)),
        ("mirror", (8, 2, 2), (1, 8, 8)),
        ("deepsim", (8, 7, 9), (1, 28, 36)),
    ],
)
def test_discriminators_take_real_and_fake_together(name, features, image):
    discriminator = create_discriminator(name, features, image).eval()
    real, fake, z = torch.rand(3, *image), torch.rand(3, *image), torch.randn(3, *features)
    together = discriminator(torch.cat([real, fake]), z)
    apart = torch.cat([discriminator(real, z), discriminator(fake, z)])
    torch.testing.assert_close(together, apart)
    assert together.shape == (6,)
    assert not torch.allclose(discriminator(real, z), discriminator(real, z.roll(1, 0)))  # it looks at the features
    with pytest.raises(ValueError, match="multiple of 3"):
        discriminator(torch.cat([real, fake])[:4], z)
    with pytest.raises(ValueError, match=f"takes features {features[0]}×.* not {features[0]}×1×2"):
        discriminator(real, torch.zeros(3, features[0], 1, 2))


def test_gradients_reach_both_branches():
    discriminator = create_discriminator("mirror", (16, 4, 4), (1, 28, 28))
    discriminator(torch.rand(4, 1, 28, 28), torch.randn(2, 16, 4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


@pytest.mark.parametrize(
    ("name", "features", "image", "message"),
    [
        ("alexnet-conv5", (128, 4, 4), (1, 28, 28), "mirror"),
        ("resnet18-cifar-layer4", (512, 1, 1), (3, 8, 8), "15 px a side at least"),
        ("deepsim", (8, 2, 2), (1, 14, 14), "15 px a side at least"),
        ("mirror", (8, 2, 2), None, "image_shape is missing"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, features, image, message):
    with pytest.raises(InputError, match=message):
        create_discriminator(name, features, image)
