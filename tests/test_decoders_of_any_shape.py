"""Decoders derived from any shapes: the mirror, and DeePSiM's in proportion."""

import pytest
import torch
from torch import nn

from arae.models import create_decoder, mirror
from arae.models.blocks import natural_size


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small: a second thread would wait more than work


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
    ((8, 1, 1), (1, 28, 28)),
    ((8, 1, 1), (3, 1, 1)),
    ((8, 1, 3), (1, 20, 96)),
    ((1, 4, 4), (1, 32, 32)),
]


@pytest.mark.parametrize(("features", "image"), MIRRORS)
@pytest.mark.parametrize("name", ["mirror", "deepsim"])
def test_any_shape_is_reached_exactly(name, features, image):
    with torch.device("meta"):
        decoder = create_decoder(name, features, image).eval()
    full = decoder.layers(torch.empty(2, *features, device="meta")).shape[2:]
    assert tuple(full) == natural_size(decoder.layers, *features[1:])
    assert all(side >= wanted for side, wanted in zip(full, image[1:], strict=True))
    assert decoder(torch.empty(2, *features, device="meta")).shape == (2, *image)
    assert decoder.output_size(*features[1:]) == image[1:]


def test_mirror_follows_the_papers_layout():
    """For conv5 it grows 6 to 7 and doubles five times, as the authors' decoder does; 28 is cropped from 32."""
    strides = [m.stride[0] for m in mirror((256, 6, 6), (3, 224, 224)).layers if isinstance(m, nn.ConvTranspose2d)]
    assert strides == [1, 2, 2, 2, 2, 2]
    small = mirror((128, 4, 4), (1, 28, 28)).eval()
    z = torch.randn(2, 128, 4, 4)
    torch.testing.assert_close(small(z), (small.layers(z)[:, :, 2:30, 2:30] + 1) / 2)
    widths = [m.out_channels for m in small.layers if isinstance(m, nn.ConvTranspose2d)]
    assert widths == [64, 32, 16]


def test_a_pixel_stays_where_it_was_when_the_features_grow():
    """The crop is that of the trained size: larger features, whose first ones are the same, give the same first pixels.

    Each doubling looks at neighbours, so only what lies out of sight of the new features is compared.
    """
    decoder = mirror((8, 4, 4), (1, 28, 28)).double().eval()
    large = torch.randn(1, 8, 12, 13, dtype=torch.float64)
    images, again = decoder(large), decoder(large[:, :, :9, :11])
    assert images.shape == (1, 1, 8 * 12 - 4, 8 * 13 - 4)
    torch.testing.assert_close(images[:, :, :40, :56], again[:, :, :40, :56])


def test_mirror_takes_spectral_norm_as_an_option():
    with_norm, without = (mirror((32, 4, 4), (1, 16, 16), spectral=flag) for flag in (True, False))
    counts = [sum(p.numel() for p in model.parameters()) for model in (with_norm, without)]
    assert counts[0] == counts[1]
    assert nn.utils.parametrize.is_parametrized(with_norm.layers[0])
    assert not nn.utils.parametrize.is_parametrized(without.layers[0])
