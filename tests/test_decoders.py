"""Decoders by the paper's tables: counts, every intermediate shape, initialisation and spectral norm."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from arae.errors import InputError
from arae.models import create_decoder, mirror
from arae.models.decoder import DECODERS
from arae.models.generators import LAYOUTS
from arae.models.spectral import normalise_spectrum


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def without_weights(name, features=None, image=None):
    """The decoder on the meta device and without spectral norm: shapes and counts at no cost."""
    with torch.device("meta"), mock.patch("arae.models.blocks.normalise_spectrum"):
        return create_decoder(name, features, image).eval()


def outputs(decoder, features):
    """(channels, side) after each convolution and upsampling, for one code."""
    seen: list[tuple[int, int]] = []
    for layer in decoder.layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Upsample):
            layer.register_forward_hook(lambda *call: seen.append((call[2].shape[1], call[2].shape[3])))
    images = decoder(torch.empty(1, *features, device="meta"))
    return seen, tuple(images.shape[1:])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small: a second thread would wait more than work


# Output channels and sizes, row by row. A4 as the authors' code has it: the transposed convolutions drop channels.
A4_CODE = [
    *[(256, 6), (256, 7), (256, 7), (256, 14), (256, 14), (128, 28), (128, 28), (64, 56), (64, 56), (32, 112)],
    *[(32, 112), (3, 224), (3, 224)],
]
A4_PRINTED = [
    *[(256, 6), (256, 7), (256, 7), (256, 14), (256, 14), (256, 28), (128, 28), (128, 56), (64, 56), (64, 112)],
    *[(32, 112), (32, 224), (3, 224), (3, 224)],
]
A4_INTERP = [
    *[(256, 6), (256, 7), (256, 7), (256, 14), (256, 14), (256, 28), (128, 28), (128, 56), (64, 56), (64, 112)],
    *[(32, 112), (32, 224), (3, 224), (3, 224)],
]
A6 = [
    *[(64, 27), (64, 28), (64, 28), (64, 56), (64, 56), (32, 56), (32, 112), (32, 112), (32, 224), (16, 224)],
    *[(3, 224), (3, 224)],
]
A7 = [
    *[(192, 13), (192, 14), (96, 14), (96, 28), (96, 28), (64, 28), (64, 56), (64, 56), (64, 112), (64, 112)],
    *[(64, 224), (32, 224), (3, 224), (3, 224)],
]
VGG = [(512, 14), (512, 28), (512, 28), (256, 56), (256, 56), (128, 112), (128, 112), (3, 224), (3, 224)]
DEEPSIM = [
    *[(512, 6), (512, 6), (512, 4), (256, 8), (512, 8), (256, 16), (256, 16), (128, 32), (128, 32), (64, 64)],
    *[(32, 128), (3, 256)],
]
ROWS = {
    "alexnet-conv5": ((256, 6, 6), A4_CODE, 4_753_370),
    "alexnet-conv5-printed": ((256, 6, 6), A4_PRINTED, 5_651_258),
    "alexnet-conv5-interp": ((256, 6, 6), A4_INTERP, 3_208_570),
    "alexnet-conv2": ((192, 13, 13), A7, 1_320_442),
    "alexnet-conv1": ((64, 27, 27), A6, 209_578),
    "vgg16-conv5_1": ((512, 14, 14), VGG, 12_282_458),
    "resnet18-cifar-layer4": (
        (512, 4, 4),
        [(512, 4), (256, 8), (256, 8), (128, 16), (128, 16), (3, 32), (3, 32)],
        5_726_810,
    ),
    "wrn-28-10-block3": ((640, 8, 8), [(640, 8), (320, 16), (320, 16), (3, 32), (3, 32)], 7_902_810),
    "deepsim": ((256, 6, 6), DEEPSIM, 12_700_672),
}
AT_TWICE = {4: 8, 6: 13, 7: 14, 13: 27, 14: 28, 27: 55, 28: 56}  # sides at twice the images' size; the others double


def twice(side: int) -> int:
    return AT_TWICE.get(side, 2 * side)


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_every_shape_of_the_tables(name):
    features, rows, parameters = ROWS[name]
    decoder = without_weights(name)
    assert decoder.feature_shape == features
    assert count(decoder) == parameters
    seen, image = outputs(decoder, features)
    assert seen == rows
    assert image == decoder.image_shape
    assert image == ((3, 32, 32) if rows[-1][1] == 32 else (3, 224, 224))


@pytest.mark.parametrize("name", [name for name in ROWS if name != "deepsim"])  # which doubles once too often: below
def test_every_shape_at_twice_the_size(name):
    """448 px for 224 (64 for 32): by a decoder made for the smaller images, and by one made for the larger."""
    features, rows, parameters = ROWS[name]
    small = without_weights(name)
    large = (features[0], twice(features[1]), twice(features[2]))
    image = (3, 2 * small.image_shape[1], 2 * small.image_shape[2])
    made_for_it = without_weights(name, large, image)
    assert count(made_for_it) == parameters
    for decoder in (small, made_for_it):
        assert outputs(decoder, large) == ([(channels, twice(side)) for channels, side in rows], image)
        assert decoder.output_size(*large[1:]) == image[1:]


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_last_convolution_has_a_bias_and_all_are_normalised(name):
    decoder = create_decoder(name)
    layers = [m for m in decoder.layers if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert all(nn.utils.parametrize.is_parametrized(layer, "weight") for layer in layers)
    assert [layer.bias is not None for layer in layers] == [False] * (len(layers) - 1) + [True]
    assert all(m.kernel_size == (4, 4) for m in layers if isinstance(m, nn.ConvTranspose2d))
    assert all(m.kernel_size == (3, 3) for m in layers if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("alexnet")])
def test_widths_go_in_proportion(name):
    features, rows, _ = ROWS[name]
    decoder = without_weights(name, (features[0] // 4, *features[1:]), (1, 224, 224))
    seen, image = outputs(decoder, (features[0] // 4, *features[1:]))
    assert seen == [(1 if channels == 3 else channels // 4, side) for channels, side in rows]
    assert image == (1, 224, 224)


@pytest.mark.parametrize("name", DECODERS)
def test_images_lie_in_the_unit_range_and_sizes_are_foretold(name):
    if name == "deepsim":
        decoder, feature_shape = create_decoder(name, (16, 4, 4), (1, 32, 32)), (16, 5, 3)
    elif name == "mirror":
        decoder, feature_shape = create_decoder(name, (16, 4, 4), (1, 28, 28)), (16, 5, 3)
    elif name.startswith("alexnet-wavelet"):
        decoder, feature_shape = create_decoder(name, (256, 2, 2), (3, 96, 96)), (256, 1, 2)
    else:
        (c, h, w), (_, height, _) = LAYOUTS[name].features, LAYOUTS[name].image
        smaller = (c // 4, h, w), (3, height, height)
        decoder, feature_shape = create_decoder(name, *smaller), (c // 4, 2, 3)
    images = decoder(torch.randn(2, *feature_shape))  # in training mode: batch norm keeps the signal's scale
    assert images.shape == (2, decoder.image_shape[0], *decoder.output_size(*feature_shape[1:]))
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 1e-3


def weights_of(layer):
    return layer.parametrizations.weight.original if nn.utils.parametrize.is_parametrized(layer) else layer.weight


@pytest.mark.parametrize("name", ["alexnet-conv5", "alexnet-conv1", "resnet18-cifar-layer4"])
def test_initialisation_is_the_authors(name):
    decoder = create_decoder(name)
    convs = [m for m in decoder.layers if isinstance(m, nn.Conv2d)]
    tconvs = [m for m in decoder.layers if isinstance(m, nn.ConvTranspose2d)]
    norms = [m for m in decoder.layers if isinstance(m, nn.BatchNorm2d)]
    values = torch.cat([weights_of(m).flatten() for m in convs])
    assert values.std().item() == pytest.approx(0.02, rel=0.02)
    assert values.mean().item() == pytest.approx(0, abs=1e-3)
    for layer in tconvs:  # PyTorch's default: uniform within 1/sqrt(n), n its output channels times the 4×4 kernel
        bound = 1 / (4 * layer.out_channels**0.5)
        assert weights_of(layer).abs().max().item() == pytest.approx(bound, rel=0.02)
    scales = torch.cat([norm.weight for norm in norms])
    assert scales.std().item() == pytest.approx(0.02, rel=0.15)
    assert scales.mean().item() == pytest.approx(1, abs=0.01)
    assert all(not norm.bias.any() for norm in norms)


def matrix(layer, weight):
    """The weight with its output channels as rows."""
    return (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).flatten(1)


def test_spectral_norm_is_warm_from_the_start():
    """Without warm-up, or warmed up before the initialisation, the singular values would be far above 1."""
    decoder = create_decoder("alexnet-conv5").eval()
    layers = [layer for layer in decoder.layers if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) == 13
    for layer in layers:
        rows = matrix(layer, layer.weight.detach())
        largest = torch.linalg.eigvalsh(rows @ rows.T)[-1].sqrt().item()
        assert 1 - 1e-4 <= largest <= 1.06


@pytest.mark.parametrize("make", [
    lambda: nn.Conv2d(6, 5, 3), lambda: nn.ConvTranspose2d(6, 5, 4), lambda: nn.Linear(7, 9),
])  # fmt: skip
def test_spectral_norm_equals_the_svd_and_pytorchs_two(make):
    ours, older, newer = make(), make(), make()
    with torch.no_grad():  # a dominant direction, so that few iterations find it
        out, inp = matrix(ours, ours.weight).shape
        rank_one = torch.randn(out, 1) * torch.randn(inp)
        ours.weight += 0.1 * (rank_one.view(out, -1, *ours.weight.shape[2:]).transpose(0, 1)
                              if isinstance(ours, nn.ConvTranspose2d) else rank_one.view_as(ours.weight))  # fmt: skip
    weight = ours.weight.detach().clone()
    for layer in (older, newer):
        layer.load_state_dict(ours.state_dict())
    normalise_spectrum(ours)
    nn.utils.spectral_norm(older)
    nn.utils.parametrizations.spectral_norm(newer)
    x = torch.randn(1, 7) if isinstance(ours, nn.Linear) else torch.randn(1, 6, 4, 4)
    with torch.no_grad():
        for layer in (ours, older, newer):
            for _ in range(40):  # each pass in training mode is one power iteration
                layer(x)
            layer.eval()(x)
    exact = weight / torch.linalg.svdvals(matrix(ours, weight))[0]
    for layer in (ours, older, newer):
        torch.testing.assert_close(layer.weight.detach(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [
    lambda: nn.Conv2d(6, 5, 3), lambda: nn.ConvTranspose2d(6, 5, 4), lambda: nn.Linear(7, 9),
])  # fmt: skip
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_spectral_norm_has_the_gradients_that_autograd_finds(make, low: bool, training: bool):
    """PyTorch's own, in float64, and under autocast, where the division is followed by a cast."""
    torch.manual_seed(0)
    ours = make() if low else make().double()
    theirs = copy.deepcopy(ours)
    normalise_spectrum(ours)
    nn.utils.parametrizations.spectral_norm(theirs)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 7) if isinstance(ours, nn.Linear) else torch.randn(4, 6, 5, 5)
    found = []
    for layer in (ours.train(training), theirs.train(training)):
        for _ in range(2):  # twice before the backward pass: each sees its own u and v
            with torch.autocast("cpu", enabled=low):
                made = layer(x if low else x.double())
            found.append([made])
        loss = found[-1][0].float().square().mean() + found[-2][0].float().tanh().sum()
        found.append(torch.autograd.grad(loss, layer.parameters()))
    for one, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, tuple(other) if isinstance(one, tuple) else list(other))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_spectral_norm_works_where_only_shapes_are():
    with torch.device("meta"):
        decoder, z = create_decoder("alexnet-conv5"), torch.zeros(2, 256, 6, 6)
    assert decoder(z).shape == (2, 3, 224, 224)


def test_names_and_random_weights_are_those_of_saved_models():
    """Rebuilt by hand in the order of old: blocks first, then the initialisation, one random stream."""
    parts: list[nn.Module] = []
    widths = [(128, 128, 0), (128, 64, 2), (64, 32, 2), (32, 16, 2)]
    for inp, out, stride in widths:
        if stride:
            parts += [nn.ConvTranspose2d(inp, out, 4, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        parts += [nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    layers = nn.Sequential(*parts, nn.Conv2d(16, 1, 3, padding=1), nn.Tanh())
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.02)
    torch.manual_seed(0)
    made = mirror((128, 4, 4), (1, 28, 28))
    old = {f"layers.{name}": value for name, value in layers.state_dict().items()}
    assert list(made.state_dict()) == list(old)
    assert all(torch.equal(value, old[name]) for name, value in made.state_dict().items())
    names = set(create_decoder("alexnet-conv5").state_dict())
    assert {"layers.0.parametrizations.weight.original", "layers.36.bias", "layers.33.parametrizations.weight.0._u",
            "layers.34.running_mean"} <= names  # fmt: skip
    assert all(name.startswith("layers.") for name in names)


def test_deepsim_is_as_published_and_starts_at_scale():
    decoder = create_decoder("deepsim", (32, 6, 6), (3, 224, 224)).eval()
    convs = [m for m in decoder.layers if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert [m.bias is not None for m in convs] == [True] * 3 + [False] * 9
    assert [m.padding[0] for m in convs] == [1, 1, 0] + [1] * 9
    assert {m.negative_slope for m in decoder.layers if isinstance(m, nn.LeakyReLU)} == {0.3}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in decoder.layers)
    assert decoder.crop == (32, 32)
    seen: list[float] = []
    for layer in convs:
        layer.register_forward_hook(lambda *call: seen.append(call[2].std().item()))
    decoder(torch.randn(2, 32, 6, 6).relu())
    assert all(0.2 < spread < 3 for spread in seen)  # He: from layer to layer the spread stays


@pytest.mark.parametrize(
    ("name", "features", "image", "message"),
    [
        ("mirror", (8, 64, 64), (1, 32, 32), "larger than the images"),
        ("mirror", (8, 4, 8), (3, 32, 32), "shaped unlike"),
        ("deepsim", (8, 64, 64), (1, 32, 32), "take another layer"),
        ("mirror", (8, 0, 4), (3, 32, 32), "at least 1"),
        ("alexnet-conv5", (256, 6, 6), (3, 225, 225), "makes 224×224 px .* not 3×225×225.* multiples of 32"),
        ("alexnet-conv5", (256, 4, 4), (3, 32, 32), "decoder mirror"),
        ("alexnet-conv1", (64, 27, 27), (3, 32, 32), "multiples of 8"),
        ("resnet18-cifar-layer4", (512, 8, 8), (3, 32, 32), "makes 64×64"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, features, image, message):
    with pytest.raises(InputError, match=message):
        create_decoder(name, features, image)


def test_features_too_small_to_leave_an_image_are_refused():
    decoder = without_weights("deepsim")
    with pytest.raises(InputError, match="makes no image of features of 2×2"):
        decoder.output_size(2, 2)
