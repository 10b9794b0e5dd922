"""The encoders that have a name of their own: taps, sizes, widths, normalisation."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from arae.errors import InputError
from arae.models import create_encoder
from arae.models.encoder import ENCODERS

# Image sizes at which each network is tried with numbers, and a width that makes them fast.
SMALL = {"alexnet": 64, "alexnet-wavelet": 64, "vgg16": 32}
WIDTH = 0.1


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for images this small a second thread only costs


def _small(name: str):
    size = SMALL.get(name, 16)
    return create_encoder(name, 10, width=WIDTH), torch.rand(2, 3, size, size)


def _without_weights(name: str, channels: int = 3, width: float = 1.0):
    with torch.device("meta"):
        return create_encoder(name, 10, channels, width=width)


SHAPES = [
    ("alexnet", (3, 224, 224), {"conv1": (64, 27, 27), "conv2": (192, 13, 13), "conv5": (256, 6, 6)}),
    ("alexnet", (3, 448, 448), {"conv1": (64, 55, 55), "conv2": (192, 27, 27), "conv5": (256, 13, 13)}),
    ("vgg16", (3, 224, 224), {"conv1_2": (64, 224, 224), "conv4_3": (512, 28, 28), "conv5_1": (512, 14, 14)}),
    ("vgg16", (3, 448, 448), {"conv5_1": (512, 28, 28)}),
    ("resnet18-cifar", (3, 32, 32), {"layer1": (64, 32, 32), "layer2": (128, 16, 16), "layer4": (512, 4, 4)}),
    ("resnet18-cifar", (1, 28, 28), {"layer3": (256, 7, 7), "layer4": (512, 4, 4)}),
    ("wrn-28-10", (3, 32, 32), {"block1": (160, 32, 32), "block2": (320, 16, 16), "block3": (640, 8, 8)}),
    ("wrn-28-10", (1, 28, 28), {"block3": (640, 7, 7)}),
    ("small-cnn", (1, 28, 28), {"conv1": (32, 14, 14), "conv4": (128, 4, 4)}),
    ("small-cnn", (3, 64, 48), {"conv1": (32, 32, 24), "conv4": (128, 8, 6)}),
]


@pytest.mark.parametrize(("name", "image", "taps"), SHAPES)
def test_feature_shapes(name, image, taps):
    encoder = _without_weights(name, image[0])
    x = torch.empty(2, *image, device="meta")
    for layer, shape in taps.items():
        assert encoder.feature_shape(image, layer) == shape
        assert encoder.features(x, layer).shape == (2, *shape)
    assert encoder(x).shape == (2, 10)
    assert encoder.layer in encoder.layers
    assert encoder.feature_shape(image) == encoder.feature_shape(image, encoder.layer)
    assert encoder.training  # as it was


@pytest.mark.parametrize(
    ("name", "theirs", "count"),
    [
        ("alexnet", "alexnet", None),
        ("vgg16", "vgg16", None),
        ("resnet18-cifar", None, 11_173_962),
        ("wrn-28-10", None, 36_479_194),
    ],
)
def test_parameters(name, theirs, count):
    encoder = _without_weights(name)
    if theirs:
        with torch.device("meta"):
            net = torchvision.models.get_model(theirs, num_classes=10)
        assert list(net.state_dict()) == list(encoder.net.state_dict())
        count = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in encoder.parameters()) == count


@pytest.mark.parametrize(
    ("name", "width", "shape", "hidden"),
    [("alexnet", 0.25, (64, 6, 6), 1024), ("vgg16", 0.5, (256, 14, 14), 2048), ("wrn-28-10", 0.2, (128, 56, 56), None)],
)
def test_widths(name, width, shape, hidden):
    encoder = create_encoder(name, 7, width=width) if name != "vgg16" else _without_weights(name, width=width)
    assert encoder.feature_shape((3, 224, 224)) == shape
    linear = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear[:-1]] == [hidden] * (len(linear) - 1)
    assert linear[-1].out_features == encoder.num_classes
    if name == "wrn-28-10":
        assert encoder.net.conv1.out_channels == 16  # as in WideResNet-28-2
    if name == "vgg16":  # torchvision's initialisation at every width
        narrow = create_encoder(name, 10, width=0.25).net
        assert narrow.features[24].weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.03)
        assert narrow.classifier[3].weight.std().item() == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_taps_equal_what_the_whole_network_computes(name):
    encoder, x = _small(name)
    encoder.eval()
    seen: dict[str, Tensor] = {}
    handles = []
    for layer, path in encoder.layers.items():
        keep = lambda _module, _inputs, out, layer=layer: seen.update({layer: out.clone()})  # noqa: E731
        handles.append(encoder.net.get_submodule(path).register_forward_hook(keep))
    logits = encoder.net((x - encoder.mean) / encoder.std)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(encoder.layers)
    for layer, whole in seen.items():
        torch.testing.assert_close(encoder.features(x, layer), whole)
    torch.testing.assert_close(encoder(x), logits)


def test_a_tap_runs_nothing_behind_it_and_holds_nothing_back():
    encoder = create_encoder("small-cnn", 10, in_channels=1)
    ran: list[str] = []
    made: list[weakref.ref[Tensor]] = []
    for name, module in encoder.net.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    encoder.net.get_submodule("conv1").register_forward_hook(lambda *a: made.append(weakref.ref(a[2])))
    gc.disable()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder.features(torch.rand(1, 1, 28, 28), "conv2")
        assert made[0]() is None
    finally:
        gc.enable()
    assert ran == ["conv1", "relu1", "conv2", "relu2"]
    assert counter.get_total_flops() == 2 * (14 * 14 * 32 * 25 + 7 * 7 * 64 * 32 * 9)


def test_threads_that_tap_one_encoder_get_their_own_features():
    """Both are on their way through the network, at taps of which one lies behind the other, before either is there."""
    encoder, both_inside = create_encoder("small-cnn", 10).eval(), threading.Barrier(2, timeout=20)
    jobs = [(torch.rand(2, 3, 16, 16), layer) for layer in ("conv2", "conv3")]
    alone = [encoder.features(x, layer) for x, layer in jobs]

    def wait(*_: object) -> None:
        both_inside.wait()

    encoder.net.get_submodule("conv1").register_forward_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda job: encoder.features(*job), jobs))
    for features, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(features, expected)


def test_conv5_is_torchvisions_pooled_features():
    encoder = create_encoder("alexnet", 10).eval()
    net = torchvision.models.alexnet(weights=None, num_classes=10).eval()
    net.load_state_dict(encoder.net.state_dict())
    x = torch.rand(1, 3, 224, 224)
    normalised = torchvision.transforms.functional.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(encoder.features(x), net.features(normalised), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(encoder(x), net(normalised), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_features_under_no_grad_autograd_autocast_and_channels_last(name):
    encoder, x = _small(name)
    encoder.eval()
    with torch.no_grad():
        plain, logits = encoder.features(x), encoder(x)
    assert not plain.requires_grad
    inside = x.clone().requires_grad_()
    with_graph = encoder.features(inside)
    torch.testing.assert_close(with_graph, plain)
    assert torch.autograd.grad(with_graph.sum(), inside)[0].abs().sum() > 0
    last = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
    again = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last.features(again), plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last(again), logits, rtol=1e-3, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = encoder.features(x)
    torch.testing.assert_close(half.float(), plain, rtol=0.1, atol=0.1 * plain.abs().max().item())


def test_features_keep_the_mode_they_are_called_in():
    encoder = create_encoder("resnet18-cifar", 10, width=0.25).train()
    before = encoder.net.bn1.running_mean.clone()
    encoder.features(torch.rand(4, 3, 16, 16))
    assert not torch.equal(encoder.net.bn1.running_mean, before)
    before = encoder.net.bn1.running_mean.clone()
    encoder.feature_shape((3, 16, 16))
    encoder.eval()
    encoder.features(torch.rand(4, 3, 16, 16))
    assert torch.equal(encoder.net.bn1.running_mean, before)


def test_the_small_network_is_small():
    encoder = _without_weights("small-cnn", 1)
    with FlopCounterMode(display=False) as counter:
        encoder(torch.empty(1, 1, 28, 28, device="meta"))
    assert counter.get_total_flops() / 2 < 4.5e6


@pytest.mark.parametrize("name", ["small-cnn", "resnet18-cifar"])
def test_another_normalisation_shares_the_network(name):
    encoder = create_encoder(name, 10, width=0.25).eval()
    assert encoder.normalised_by("encoder") is encoder
    signed = encoder.normalised_by("signed")
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(signed(x), encoder.net(2 * x - 1), rtol=1e-4, atol=1e-5)
    own = (x - encoder.mean) / encoder.std
    torch.testing.assert_close(encoder(x), encoder.net(own))
    assert not torch.allclose(signed.features(x), encoder.features(x))
    assert all(a is b for a, b in zip(signed.parameters(), encoder.parameters(), strict=True))
    with torch.no_grad():
        encoder.net.conv1.weight.zero_()
    assert signed(x).equal(signed(torch.zeros_like(x)))
    assert not signed.training


MINIMUM = [("alexnet", None, 63), ("alexnet", "conv1", 15), ("vgg16", None, 32), ("vgg16", "conv5_1", 16)]
MINIMUM += [("resnet18-cifar", None, 1), ("wrn-28-10", None, 1), ("small-cnn", None, 1)]


@pytest.mark.parametrize(("name", "layer", "least"), MINIMUM)
def test_the_smallest_images_are_known_and_smaller_ones_are_refused(name, layer, least):
    encoder = create_encoder(name, 10, width=0.05).eval()
    run = encoder if layer is None else lambda x: encoder.features(x, layer)
    assert encoder.min_size(layer) == least
    assert run(torch.rand(1, 3, least, least)).numel() > 0  # with numbers, not shapes alone
    if least > 1:
        for x in (torch.rand(1, 3, least - 1, least - 1), torch.rand(1, 3, least - 1, 224)):
            with pytest.raises(
                InputError, match=f"can't take images of shape .*: it needs {least}×{least} px at least"
            ):
                run(x)


def test_other_faults_than_the_images_stay_what_they_are():
    encoder = create_encoder("small-cnn", 10)
    with pytest.raises(RuntimeError, match=r"(?i)type"):
        encoder(torch.rand(1, 3, 16, 16, dtype=torch.float64).to(torch.complex64))
    with pytest.raises(InputError, match=r"3 channel\(s\), not 1: set data.channels to 3"):
        encoder(torch.rand(1, 1, 16, 16))
