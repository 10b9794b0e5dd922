"""Wavelet pooling and its decoder: the Haar transform against PyWavelets, every shape of Tables A8 and A9."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arae.errors import InputError
from arae.models import create_decoder, create_encoder
from arae.models.autoencoder import Autoencoder
from arae.models.wavelet import WaveletCode, haar_analysis, haar_synthesis, without_details


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def networks():
    """Encoder and decoder in evaluation mode; built once, for AlexNet's dense layers take their time."""
    torch.manual_seed(0)
    return create_encoder("alexnet-wavelet", 2).eval(), create_decoder("alexnet-wavelet").eval()


def test_analysis_is_pywavelets_up_to_the_sign_of_its_high_filter():
    """PyWavelets' high filter is (1, -1)/√2 after its flip, ours (-1, 1)/√2: LH and HL change sign, HH twice."""
    pywt = pytest.importorskip("pywt", reason="PyWavelets is an extra of development")
    x = torch.rand(2, 3, 14, 10)
    low, high = haar_analysis(x)
    approximation, (horizontal, vertical, diagonal) = pywt.dwt2(x.numpy(), "haar")
    for ours, theirs in zip((low, *high.chunk(3, 1)), (approximation, -vertical, -horizontal, diagonal), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)
    again = pywt.idwt2((approximation, (horizontal, vertical, diagonal)), "haar")
    np.testing.assert_allclose(haar_synthesis(low, high).numpy(), again, atol=1e-6)


def test_analysis_is_strided_convolution_with_outer_products():
    one, minus = torch.tensor([1.0, 1.0]) / 2**0.5, torch.tensor([-1.0, 1.0]) / 2**0.5
    filters = [torch.outer(a, b) for a, b in ((one, one), (one, minus), (minus, one), (minus, minus))]
    x = torch.rand(2, 5, 9, 12, dtype=torch.float64)
    low, high = haar_analysis(x)
    bands = [F.conv2d(x, f.double().expand(5, 1, 2, 2), stride=2, groups=5) for f in filters]
    torch.testing.assert_close(low, bands[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(high, torch.cat(bands[1:], 1), rtol=0, atol=1e-6)
    synthesised = [
        F.conv_transpose2d(band, f.double().expand(5, 1, 2, 2), stride=2, groups=5)
        for band, f in zip(bands, filters, strict=True)
    ]
    torch.testing.assert_close(haar_synthesis(low, high), torch.stack(synthesised).sum(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 10), (7, 10), (8, 5), (9, 13)])
def test_synthesis_undoes_analysis_but_for_an_odd_last_line(height, width):
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    again = haar_synthesis(*haar_analysis(x))
    torch.testing.assert_close(again, x[:, :, : height // 2 * 2, : width // 2 * 2])


def test_the_low_band_of_a_constant_doubles_it_and_energy_is_kept():
    low, high = haar_analysis(torch.full((1, 2, 6, 6), 0.7))
    torch.testing.assert_close(low, torch.full((1, 2, 3, 3), 1.4))
    assert high.abs().max() < 1e-6
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    low, high = haar_analysis(x)
    torch.testing.assert_close(low.square().sum() + high.square().sum(), x.square().sum())


# Rows of Tables A8 and A9: (channels, side at 224 px). At 448 px the sides are those of 13×13 codes.
TABLE_A8 = [(64, 55), (64, 27), (192, 27), (192, 13), (384, 13), (256, 13), (256, 13), (256, 6)]
TABLE_A9 = [
    *[(256, 6), (256, 12), (256, 12), (256, 13), (256, 13), (192, 13)],
    *[(192, 26), (192, 27), (128, 27), (64, 27)],
    *[(64, 54), (64, 56), (64, 56)],
    *[(64, 112), (32, 112), (32, 112), (32, 224), (3, 224), (3, 224)],
]
AT_448 = {55: 111, 27: 55, 13: 27, 6: 13, 12: 26, 26: 54, 54: 110, 56: 112, 112: 224, 224: 448}


def outputs_of(model: nn.Module, kinds: tuple[str, ...], run) -> list[tuple[int, int, int]]:
    """Shapes that the modules of these kinds give, in the order they run."""
    seen: list[tuple[int, int, int]] = []
    modules = [module for module in model.modules() if type(module).__name__ in kinds]
    handles = [m.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:]))) for m in modules]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("size", [224, 448])
def test_every_shape_of_tables_a8_and_a9(size):
    scale = {side: side if size == 224 else big for side, big in AT_448.items()}
    with torch.device("meta"):  # shapes without arithmetic
        encoder, decoder, x = (
            create_encoder("alexnet-wavelet", 2),
            create_decoder("alexnet-wavelet"),
            torch.rand(1, 3, size, size),
        )
    made = outputs_of(encoder.net.features, ("Conv2d", "HaarPool"), lambda: encoder.features(x))
    assert made == [(c, scale[side], scale[side]) for c, side in TABLE_A8]
    code = encoder.coded(x)
    assert isinstance(code, WaveletCode)
    assert [tuple(part.shape) for part in code] == [
        (1, c, scale[side], scale[side]) for c, side in [(256, 6), (768, 6), (576, 13), (192, 27)]
    ]
    kinds = ("ParametrizedConv2d", "HaarUnpool", "ReflectionPad2d", "Upsample")
    made = outputs_of(decoder, kinds, lambda: decoder(code))
    assert made == [(c, scale[side], scale[side]) for c, side in TABLE_A9]
    assert decoder.output_size(*code.code.shape[2:]) == (size, size)


@pytest.mark.parametrize("name", ["alexnet-wavelet", "alexnet-wavelet-right"])
def test_parameters_and_range(name):
    decoder = create_decoder(name)
    assert sum(p.numel() for p in decoder.parameters() if p.requires_grad) == 2_574_778
    with torch.no_grad():
        out = decoder(without_details(torch.randn(2, 256, 1, 2)))
    assert out.shape == (2, 3, 64, 96)
    assert 0 <= out.min() < out.max() <= 1


def test_the_variants_pad_at_the_left_or_the_right():
    """By one pixel at the first two levels and by two at the last; rows stay where they were in both."""
    maps = {}
    for name in ("alexnet-wavelet", "alexnet-wavelet-right"):
        torch.manual_seed(0)
        pads = [layer for layer in create_decoder(name).layers if isinstance(layer, nn.ReflectionPad2d)]
        x = torch.arange(16.0).view(1, 1, 4, 4)
        maps[name] = [pad(x) for pad in pads]
    for ours, other in zip(*maps.values(), strict=True):
        lost = ours.shape[-1] - 4
        x = torch.arange(16.0).view(1, 1, 4, 4)
        assert torch.equal(ours[..., :4, lost:], x)  # rows stay where they were in both
        assert torch.equal(other[..., :4, :4], x)
    assert [m.shape[-1] - 4 for m in maps["alexnet-wavelet"]] == [1, 1, 2]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 131), (65, 64), (40, 100)])
def test_any_size_comes_back(networks, height, width):
    encoder, decoder = networks
    model = Autoencoder(encoder, decoder, {"encoder": {"layer": "conv5"}, "image_shape": [3, 224, 224]})
    x = torch.rand(1, 3, height, width)
    again = model.reconstruct(x)
    assert again.shape == x.shape
    wide, tall = (max(64, -(-side // 32) * 32) for side in (width, height))
    padded = F.pad(x, (0, wide - width, 0, tall - height), mode="replicate")
    torch.testing.assert_close(again, model.decode(model.encode(padded))[..., :height, :width])


def test_details_reach_the_image(networks):
    """The skips matter: without them the same code gives another image."""
    encoder, decoder = networks
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        code = encoder.coded(x)
        torch.testing.assert_close(code.code, encoder.features(x))
        assert not torch.allclose(decoder(code), decoder(code.code))
        torch.testing.assert_close(decoder(code.code), decoder(without_details(code.code)))


def test_it_has_alexnets_weights_and_other_features(networks):
    encoder, _ = networks
    plain = create_encoder("alexnet", 2).eval()
    plain.load_state_dict(encoder.state_dict())  # the same names and shapes
    x = torch.rand(1, 3, 64, 64)
    for layer in encoder.layers:
        assert encoder.features(x, layer).shape == plain.features(x, layer).shape
        assert not torch.allclose(encoder.features(x, layer), plain.features(x, layer))
    assert isinstance(encoder.coded(x, "conv2"), torch.Tensor)


def test_gradients_reach_image_and_decoder(networks):
    encoder, _ = networks
    decoder = create_decoder("alexnet-wavelet")
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    decoder(encoder.coded(x)).square().mean().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: create_decoder("alexnet-wavelet", (128, 4, 4), (3, 32, 32)), "multiples of 32"),
        (lambda: create_decoder("alexnet-wavelet", (256, 6, 6), (3, 225, 224)), "3×225×224"),
        (lambda: create_encoder("alexnet-wavelet", 2, in_channels=1), "RGB"),
    ],
)
def test_what_does_not_fit_is_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_images_that_do_not_fit_are_refused(networks):
    with pytest.raises(InputError, match="px at least"):
        networks[0].coded(torch.rand(1, 3, 20, 20))
