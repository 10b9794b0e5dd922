"""The networks: sizes, taps, modes, weights, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from arae.errors import InputError
from arae.models import create_decoder, create_discriminator, create_encoder, mirror
from arae.models.decoder import DECODERS
from arae.models.discriminator import DISCRIMINATORS
from arae.models.encoder import ENCODERS
from arae.models.zoo import summaries


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SHAPES = [
    ("alexnet", (3, 224, 224), {"conv1": (64, 27, 27), "conv2": (192, 13, 13), "conv5": (256, 6, 6)}),
    ("alexnet", (3, 448, 448), {"conv5": (256, 13, 13)}),
    ("resnet18-cifar", (3, 32, 32), {"layer1": (64, 32, 32), "layer2": (128, 16, 16), "layer4": (512, 4, 4)}),
    ("resnet18-cifar", (1, 28, 28), {"layer3": (256, 7, 7), "layer4": (512, 4, 4)}),
    ("small-cnn", (1, 28, 28), {"conv1": (32, 14, 14), "conv4": (128, 4, 4)}),
    ("small-cnn", (3, 32, 32), {"conv4": (128, 4, 4)}),
    ("small-cnn", (3, 64, 48), {"conv4": (128, 8, 6)}),
]


@pytest.mark.parametrize(("name", "image", "taps"), SHAPES)
def test_feature_shapes(name, image, taps):
    encoder = create_encoder(name, 10, in_channels=image[0])
    x = torch.rand(2, *image)
    for layer, shape in taps.items():
        assert encoder.feature_shape(image, layer) == shape
        assert encoder.features(x, layer).shape == (2, *shape)
    assert encoder(x).shape == (2, 10)
    assert encoder.layer in encoder.layers
    assert encoder.feature_shape(image) == encoder.feature_shape(image, encoder.layer)
    assert encoder.training  # as it was


@pytest.mark.parametrize(
    ("name", "image"), [("alexnet", (3, 96, 96)), ("resnet18-cifar", (1, 16, 16)), ("small-cnn", (3, 32, 32))]
)
def test_taps_equal_an_independent_extraction(name, image):
    encoder = create_encoder(name, 10, in_channels=image[0]).eval()
    x = torch.rand(2, *image)
    normalised = (x - encoder.mean) / encoder.std
    nodes = {path: layer for layer, path in encoder.layers.items()}
    wanted = create_feature_extractor(encoder.net, return_nodes=nodes)(normalised)
    for layer in encoder.layers:
        torch.testing.assert_close(encoder.features(x, layer), wanted[layer])
    torch.testing.assert_close(encoder(x), encoder.net(normalised))


def test_a_tap_runs_nothing_behind_it():
    encoder = create_encoder("small-cnn", 10, in_channels=1)
    ran: list[str] = []
    for name, module in encoder.net.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    encoder.features(torch.rand(1, 1, 28, 28), "conv2")
    assert ran == ["conv1", "relu1", "conv2", "relu2"]


def test_conv5_is_torchvisions_pooled_features():
    encoder = create_encoder("alexnet", 1000).eval()
    net = torchvision.models.alexnet(weights=None).eval()
    net.load_state_dict(encoder.net.state_dict())
    x = torch.rand(2, 3, 224, 224)
    normalised = torchvision.transforms.functional.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(encoder.features(x), net.features(normalised), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(encoder(x), net(normalised), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_features_under_no_grad_autograd_and_channels_last(name):
    size = 64 if name == "alexnet" else 32
    encoder = create_encoder(name, 10).eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        plain, logits = encoder.features(x), encoder(x)
    assert not plain.requires_grad
    inside = x.clone().requires_grad_()
    with_graph = encoder.features(inside)
    torch.testing.assert_close(with_graph, plain)
    assert torch.autograd.grad(with_graph.sum(), inside)[0].abs().sum() > 0
    last = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
    again = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last.features(again), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last(again), logits, rtol=1e-4, atol=1e-5)


def test_features_keep_the_mode_they_are_called_in():
    encoder = create_encoder("resnet18-cifar", 10).train()
    before = encoder.net.bn1.running_mean.clone()
    encoder.features(torch.rand(4, 3, 16, 16))
    assert not torch.equal(encoder.net.bn1.running_mean, before)
    encoder.eval()
    before = encoder.net.bn1.running_mean.clone()
    encoder.feature_shape((3, 16, 16))
    encoder.features(torch.rand(4, 3, 16, 16))
    assert torch.equal(encoder.net.bn1.running_mean, before)


def test_the_small_network_is_small():
    encoder = create_encoder("small-cnn", 10, in_channels=1)
    work = 0

    def add(module: nn.Conv2d, _: object, out: torch.Tensor) -> None:
        nonlocal work
        work += out[0].numel() * module.weight[0].numel()

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    encoder(torch.rand(1, 1, 28, 28))
    assert work < 4.5e6


NETWORK_WEIGHTS = {"own": lambda encoder: encoder.state_dict(), "bare": lambda encoder: encoder.net.state_dict()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", list(NETWORK_WEIGHTS))
def test_pretrained_weights(tmp_path, suffix, kind):
    source = create_encoder("small-cnn", 10, in_channels=1)
    path = tmp_path / f"weights{suffix}"
    weights = NETWORK_WEIGHTS[kind](source)
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(create_encoder("small-cnn", 10, in_channels=1, pretrained=path)(x), source(x))
    assert not torch.equal(create_encoder("small-cnn", 10, in_channels=1)(x), source(x))


def _renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights["net.fc.bias2"] = weights.pop("net.fc.bias")
    return weights


class Harmful:
    """Not tensors: what an unpickler would run."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, r"lacks weights for: net.fc.bias; the file has besides: net.fc.bias2"),
        (lambda w: w | {"net.fc.bias": torch.zeros(7)}, r"shapes differ: net.fc.bias \(7,\) for \(10,\)"),
        (lambda w: {"epoch": 3, "model": w}, "more than tensors.*epoch, model"),
        (lambda w: Harmful(), "can't be read as weights"),
    ],
)
def test_weights_that_do_not_match_are_refused(tmp_path, change, message):
    path = tmp_path / "weights.pt"
    torch.save(change(dict(create_encoder("small-cnn", 10).state_dict())), path)
    with pytest.raises(InputError, match=message):
        create_encoder("small-cnn", 10, pretrained=path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_damaged_or_missing_weights_are_refused(tmp_path: Path, name):
    with pytest.raises(InputError, match="no such file"):
        create_encoder("small-cnn", 10, pretrained=tmp_path / name)
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(InputError, match="can't be read as weights"):
        create_encoder("small-cnn", 10, pretrained=tmp_path / name)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'alexnet'"):
        create_encoder("alexnett", 10)
    with pytest.raises(InputError, match="did you mean 'mirror'"):
        create_decoder("miror", (8, 4, 4), (3, 32, 32))
    with pytest.raises(InputError, match="alexnet-conv5"):
        create_discriminator("nothing-like-it", (8, 4, 4), (3, 32, 32))
    with pytest.raises(InputError, match="did you mean 'conv4'"):
        create_encoder("small-cnn", 10).features(torch.rand(1, 3, 32, 32), "conv44")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_encoder("alexnet", 10, image_size=32), "can't take images of shape"),
        (lambda: create_encoder("alexnet", 10, in_channels=1), "data.channels"),
        (lambda: create_encoder("small-cnn", 1), "2 classes"),
        (lambda: create_decoder("mirror"), "feature_shape is missing"),
        (lambda: create_decoder("mirror", (8, 4), (3, 32, 32)), "channels, height, width"),
        (lambda: create_decoder("alexnet-conv5", (128, 4, 4), (1, 28, 28)), "decoder mirror"),
        (lambda: create_discriminator("alexnet-conv5", (128, 4, 4), (1, 28, 28)), "mirror"),
        (lambda: create_discriminator("mirror", (128, 4, 4)), "image_shape is missing"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


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


@pytest.mark.parametrize("make", [
    lambda: create_encoder("small-cnn", 10), lambda: create_encoder("resnet18-cifar", 10),
    lambda: mirror((64, 4, 4), (1, 28, 28), spectral=True),
    lambda: create_discriminator("mirror", (64, 4, 4), (1, 28, 28)),
])  # fmt: skip
def test_the_seed_decides_the_weights(make):
    torch.manual_seed(7)
    first = make().state_dict()
    torch.manual_seed(7)
    assert all(torch.equal(value, first[key]) for key, value in make().state_dict().items())


def test_the_zoo_lists_every_network():
    listed = summaries()
    assert {kind: set(names) for kind, names in listed.items()} == {
        "encoders": set(ENCODERS), "decoders": set(DECODERS), "discriminators": set(DISCRIMINATORS)
    }  # fmt: skip
    assert set(DECODERS) == set(DISCRIMINATORS)
    assert all(0 < len(line) < 100 for names in listed.values() for line in names.values())
