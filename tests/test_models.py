"""The networks: sizes, taps, modes, weights, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from arae.errors import InputError
from arae.models import create_decoder, create_discriminator, create_encoder, mirror
from arae.models.decoder import DECODERS
from arae.models.discriminator import DISCRIMINATORS
from arae.models.encoder import ENCODERS
from arae.models.zoo import summaries


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
def test_taps_equal_what_the_whole_network_computes(name, image):
    encoder = create_encoder(name, 10, in_channels=image[0]).eval()
    x = torch.rand(2, *image)
    normalised = (x - encoder.mean) / encoder.std
    seen: dict[str, torch.Tensor] = {}
    for layer, path in encoder.layers.items():
        keep = lambda _module, _inputs, out, layer=layer: seen.update({layer: out.clone()})  # noqa: E731
        encoder.net.get_submodule(path).register_forward_hook(keep)
    logits = encoder.net(normalised)  # torchvision's own forward, for its networks
    whole = dict(seen)
    for layer in encoder.layers:
        torch.testing.assert_close(encoder.features(x, layer), whole[layer])
    torch.testing.assert_close(encoder(x), logits)


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
