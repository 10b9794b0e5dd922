"""Decoders and discriminators: the authors' layouts by their counts and sizes, and the mirrors of any shape."""

import pytest
import torch
from torch import nn

from arae.models import create_decoder, create_discriminator, mirror


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("name", "parameters"), [("alexnet-conv5", 4_753_370), ("alexnet-conv5-printed", 5_651_258)])
def test_decoders_of_the_paper(name, parameters):
    decoder = create_decoder(name)
    assert count(decoder) == parameters
    wrapped = [m for m in decoder.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(wrapped) == (13 if name == "alexnet-conv5" else 14)
    for layer in wrapped:
        assert nn.utils.parametrize.is_parametrized(layer, "weight")
    assert [layer.bias is not None for layer in wrapped] == [False] * (len(wrapped) - 1) + [True]
    images = decoder.eval()(torch.randn(1, 256, 6, 6))
    assert images.shape == (1, 3, 224, 224)


def test_the_papers_decoder_grows_with_the_features():
    decoder = create_decoder("alexnet-conv5", (256, 13, 13), (3, 448, 448))
    assert decoder.image_shape == (3, 448, 448)
    narrow = create_decoder("alexnet-conv5", (256, 1, 2), (3, 64, 96)).eval()
    assert narrow(torch.randn(1, 256, 1, 2)).shape == (1, 3, 64, 96)


def test_initialisation_of_the_papers_decoder():
    decoder = create_decoder("alexnet-conv5")
    convs = [m for m in decoder.layers if isinstance(m, nn.Conv2d)]
    tconvs = [m for m in decoder.layers if isinstance(m, nn.ConvTranspose2d)]
    norms = [m for m in decoder.layers if isinstance(m, nn.BatchNorm2d)]
    assert convs[0].parametrizations.weight.original.std().item() == pytest.approx(0.02, rel=0.02)
    # PyTorch's default: uniform within 1/sqrt(fan in), which here is 256 channels times the 4×4 kernel.
    assert tconvs[0].parametrizations.weight.original.abs().max().item() == pytest.approx(1 / 64, rel=0.01)
    assert torch.cat([n.weight for n in norms]).std().item() == pytest.approx(0.02, rel=0.1)
    assert all(not n.bias.any() for n in norms)


def test_spectral_norm_bounds_each_layer():
    decoder = create_decoder("alexnet-conv5").eval()
    for layer in decoder.layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
            matrix = weight.flatten(1)
            largest = torch.linalg.eigvalsh(matrix @ matrix.T).max().sqrt().item()
            assert largest == pytest.approx(1, abs=0.2)  # fifteen power iterations come near


MIRRORS = [
    ((128, 4, 4), (1, 28, 28)),
    ((128, 4, 4), (3, 32, 32)),
    ((512, 4, 4), (3, 32, 32)),
    ((32, 8, 6), (3, 64, 48)),
    ((64, 32, 32), (3, 32, 32)),
    ((64, 33, 40), (3, 32, 32)),
    ((256, 6, 6), (3, 224, 224)),
    ((64, 27, 27), (3, 224, 224)),
    ((16, 13, 13), (3, 224, 224)),
    ((8, 5, 7), (1, 37, 51)),
]


@pytest.mark.parametrize(("features", "image"), MIRRORS)
def test_mirror_reaches_the_image_exactly(features, image):
    decoder = mirror(features, image)
    raw = decoder.layers(torch.randn(2, *features))
    assert all(side >= wanted for side, wanted in zip(raw.shape[2:], image[1:], strict=True))
    assert all(
        side < 2 * max(wanted, at) for side, wanted, at in zip(raw.shape[2:], image[1:], features[1:], strict=True)
    )
    images = decoder(torch.randn(2, *features))
    assert images.shape == (2, *image)
    assert images.min() >= 0
    assert images.max() <= 1


def test_mirror_follows_the_papers_layout():
    """For conv5 it grows 6 to 7 and doubles five times, as the authors' decoder does; 28 is cropped from 32."""
    strides = [m.stride[0] for m in mirror((256, 6, 6), (3, 224, 224)).layers if isinstance(m, nn.ConvTranspose2d)]
    assert strides == [1, 2, 2, 2, 2, 2]
    small = mirror((128, 4, 4), (1, 28, 28)).eval()
    z = torch.randn(2, 128, 4, 4)
    torch.testing.assert_close(small(z), (small.layers(z)[:, :, 2:30, 2:30] + 1) / 2)
    widths = [m.out_channels for m in small.layers if isinstance(m, nn.ConvTranspose2d)]
    assert widths == [64, 32, 16]


def test_mirror_takes_spectral_norm_as_an_option():
    with_norm, without = (mirror((32, 4, 4), (1, 16, 16), spectral=flag) for flag in (True, False))
    assert count(with_norm) == count(without)
    assert nn.utils.parametrize.is_parametrized(with_norm.layers[0])
    assert not nn.utils.parametrize.is_parametrized(without.layers[0])


def test_the_papers_discriminator():
    discriminator = create_discriminator("alexnet-conv5").eval()
    assert count(discriminator) == 11_372_353
    linear = [m for m in discriminator.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(nn.utils.parametrize.is_parametrized(layer, "weight") for layer in linear)
    sizes: list[int] = []
    for layer in discriminator.image:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *call: sizes.append(call[2].shape[-1]))
    logits = discriminator(torch.rand(2, 3, 224, 224), torch.randn(2, 256, 6, 6))
    assert logits.shape == (2,)
    assert sizes == [55, 51, 25, 23, 11]
    assert [m.p for m in discriminator.joint if isinstance(m, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("features", "image"), [((128, 4, 4), (1, 28, 28)), ((512, 4, 4), (3, 32, 32)), ((8, 2, 2), (1, 8, 8))]
)
def test_discriminators_take_real_and_fake_together(features, image):
    discriminator = create_discriminator("mirror", features, image).eval()
    real, fake, z = torch.rand(3, *image), torch.rand(3, *image), torch.randn(3, *features)
    together = discriminator(torch.cat([real, fake]), z)
    apart = torch.cat([discriminator(real, z), discriminator(fake, z)])
    torch.testing.assert_close(together, apart)
    assert together.shape == (6,)
    assert not torch.allclose(discriminator(real, z), discriminator(real, z.roll(1, 0)))  # it looks at the features
    with pytest.raises(ValueError, match="multiple of 3"):
        discriminator(torch.cat([real, fake])[:4], z)


def test_gradients_reach_both_branches():
    discriminator = create_discriminator("mirror", (16, 4, 4), (1, 28, 28))
    discriminator(torch.rand(4, 1, 28, 28), torch.randn(2, 16, 4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
