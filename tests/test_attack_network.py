"""The copy of a network that attacks see: the same function and the same gradient in the images, for every network."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_npz
from torch import Tensor, nn
from training import tiny_recipe

from arae.attacks import Threat, pgd
from arae.attacks.network import AttackNetwork, _graph, foldable
from arae.attacks.stem import Stem, strided
from arae.models import create_encoder
from arae.models.encoder import Encoder
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro

KERNELS = [(5, 5), (11, 11), (3, 4), (2, 2), (1, 1)]
PADDINGS = [(0, 0), (2, 2), (1, 3), (5, 0)]
SIZES = [(28, 28), (31, 17)]


def convolutions() -> Iterator[tuple[nn.Conv2d, tuple[int, int]]]:
    for kernel, stride, padding, size in itertools.product(KERNELS, (2, 3, 4), PADDINGS, SIZES):
        if all(side + 2 * pad >= k for side, pad, k in zip(size, padding, kernel, strict=True)):
            for channels in (1, 3):
                yield nn.Conv2d(channels, 6, kernel, stride, padding), size


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_stem_and_its_gradient_are_the_convolutions_own(layout: torch.memory_format) -> None:
    count = 0
    for conv, size in convolutions():
        torch.manual_seed(count)
        stem = Stem(conv)
        stem.refresh()
        x = torch.rand(2, conv.in_channels, *size).to(memory_format=layout).requires_grad_()
        theirs, ours = conv(x), stem(x)
        gradient = torch.randn_like(theirs)
        wanted, found = (torch.autograd.grad(out, x, gradient)[0] for out in (theirs, ours))
        said = f"{conv}, images {size}"
        torch.testing.assert_close(ours, theirs, msg=said)
        assert found.shape == wanted.shape, said
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()), msg=said)
        count += 1
    assert count > 200


@pytest.mark.parametrize(
    ("conv", "taken"),
    [
        (nn.Conv2d(3, 8, 5, 2, 2), True),
        (nn.Conv2d(3, 8, 5), False),
        (nn.Conv2d(3, 8, 5, (2, 3)), False),
        (nn.Conv2d(4, 8, 5, 2, groups=2), False),
        (nn.Conv2d(3, 8, 3, 2, dilation=2), False),
        (nn.Conv2d(3, 8, 5, 2, 2, padding_mode="reflect"), False),
        (nn.Conv2d(3, 8, 5, 2, padding="valid"), False),
    ],
)
def test_which_first_convolutions_are_rewritten(conv: nn.Conv2d, taken: bool) -> None:
    assert strided(conv) is taken


def lived_in(name: str, size: int, width: float = 1.0) -> Encoder:
    """A network whose batch norms have seen images, in evaluation mode."""
    torch.manual_seed(0)
    model = create_encoder(name, 10, 1 if name == "small-cnn" else 3, width=width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(torch.rand(4, model.mean.shape[1], size, size))
    return model.eval()


def copied(model: Encoder, dtype: torch.dtype) -> AttackNetwork:
    """The copy of it as it is."""
    quick = AttackNetwork(model)
    quick.refresh(dtype)
    return quick


def judged(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of the cross-entropy in the images."""
    x = x.clone().requires_grad_()
    logits = model(x).to(x.dtype)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(len(x)), reduction="sum"), x)
    return logits.detach(), gradient


# Name, size, width; batch norms folded of all there are, and whether the first convolution is rewritten.
NETWORKS = [
    ("small-cnn", 28, 1.0, 0, 0, True),
    ("resnet18-cifar", 32, 0.25, 20, 20, False),
    ("wrn-28-10", 32, 0.1, 12, 25, False),
    ("alexnet", 64, 0.25, 0, 0, True),
    ("alexnet-wavelet", 64, 0.25, 0, 0, True),
    ("vgg16", 32, 0.25, 0, 0, False),
    ("torchvision/resnet18", 64, 1.0, 20, 20, True),
    ("torchvision/mobilenet_v3_small", 64, 1.0, 34, 34, True),
    ("torchvision/densenet121", 64, 1.0, 59, 121, True),
]


@pytest.mark.parametrize(("name", "size", "width", "folds", "norms", "stem"), NETWORKS)
def test_logits_and_gradients_are_the_networks_own(
    name: str, size: int, width: float, folds: int, norms: int, stem: bool
) -> None:
    model = lived_in(name, size, width).double()
    quick = copied(model, torch.float64)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == norms
    assert sum(isinstance(m, nn.BatchNorm2d) for m in quick.modules()) == norms - folds
    assert any(isinstance(m, Stem) for m in quick.modules()) is stem
    x = torch.rand(2, model.mean.shape[1], size, size, dtype=torch.float64)
    for theirs, ours in zip(judged(model, x), judged(quick, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["small-cnn", "resnet18-cifar", "torchvision/resnet18"])
def test_in_low_precision_it_is_as_near_as_autocast(name: str) -> None:
    size = 28 if name == "small-cnn" else 32
    model = lived_in(name, size)
    x = torch.rand(8, model.mean.shape[1], size, size)
    quick = copied(model, torch.bfloat16)
    wanted = judged(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = judged(model, x)
        ours = judged(quick, x)  # and autocast around it changes nothing
    for exact, theirs, found in zip(wanted, cast, ours, strict=True):
        assert (found - exact).norm() <= 1.5 * (theirs - exact).norm()
    assert torch.equal(ours[1], judged(quick, x)[1])


@pytest.mark.parametrize("name", ["small-cnn", "resnet18-cifar"])
def test_it_follows_the_weights_when_it_is_told_to(name: str) -> None:
    size = 28 if name == "small-cnn" else 32
    model = lived_in(name, size, 0.25)
    quick, x = copied(model, torch.float32), torch.rand(2, model.mean.shape[1], size, size)
    before = quick(x)
    with torch.no_grad():
        for tensor in (*model.net.parameters(), *model.net.buffers()):
            if tensor.is_floating_point():
                tensor *= 1.1
    assert torch.equal(quick(x), before)
    quick.refresh(torch.float32)
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-5)
    gradient = judged(model, x)[1]  # rounding differs from processor to processor, and is of the size of the largest
    torch.testing.assert_close(judged(quick, x)[1], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_it_leaves_the_network_alone() -> None:
    model = lived_in("resnet18-cifar", 32, 0.25).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quick = copied(model, torch.bfloat16)
    pgd(quick, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), Threat("l2", 1), steps=2)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in quick.parameters())


class Odd(nn.Module):
    """Pairs of convolution and batch norm that must not be folded, and one that may be."""

    def __init__(self, *, looks: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)  # the convolution is seen twice
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)  # runs twice
        self.conv3, self.norm3 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)
        self.conv4, self.norm4 = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3, affine=False)
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.sum() > 0:
            x = x / 2
        y = self.conv1(x)
        y = self.norm1(y) + y
        y = self.norm2(self.conv2(self.norm2(self.conv2(y))))
        y = self.norm3(self.conv3(y))
        return self.norm4(self.conv4(y)).mean((2, 3))


@pytest.mark.parametrize("looks", [False, True])
def test_only_what_may_be_folded_is(looks: bool) -> None:
    net = Odd(looks=looks)
    assert foldable(net, _graph(net)) == ([] if looks else [("conv4", "norm4")])
    model = Encoder(
        "odd", net, layers={"conv1": "conv1"}, layer="conv1", num_classes=3, mean=(0.5,) * 3, std=(1.0,) * 3
    )
    with torch.no_grad():
        model(torch.rand(8, 3, 9, 9))
    model.double().eval()
    quick, x = copied(model, torch.float64), torch.rand(3, 3, 9, 9, dtype=torch.float64)
    for theirs, ours in zip(judged(model, x), judged(quick, x), strict=True):
        torch.testing.assert_close(ours, theirs)


class Shared(nn.Module):
    """Convolutions that do more than their kind, or whose tensors others use too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 5, 2, padding=2)
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.how = how
        if how == "hook":
            for each in (self.first, self.conv):
                each.register_forward_hook(lambda _module, _inputs, output: 2 * output)
        if how == "tied":
            self.again = nn.Conv2d(4, 4, 3, padding=1)
            self.again.weight = self.conv.weight
        if how == "two names":
            self.other = self.norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.first(x)))
        if self.how == "tied":
            y = self.again(y)
        if self.how == "function":
            y = y + F.conv2d(y, self.conv.weight, padding=1) + F.conv2d(x, self.first.weight, stride=2, padding=2)
        return y.mean((2, 3))


@pytest.mark.parametrize("how", ["", "hook", "tied", "two names", "function"])
def test_what_others_use_too_stays_as_it_is(how: str) -> None:
    torch.manual_seed(0)
    net = Shared(how)
    assert bool(foldable(net, _graph(net))) is (how == "")
    taps = {"conv": "conv"}
    model = Encoder("odd", net, layers=taps, layer="conv", num_classes=4, mean=(0.5,) * 3, std=(1.0,) * 3)
    with torch.no_grad():
        model(torch.rand(8, 3, 9, 9))
    model.double().eval()
    quick, x = copied(model, torch.float64), torch.rand(3, 3, 9, 9, dtype=torch.float64)
    assert any(isinstance(m, Stem) for m in quick.modules()) is (how not in ("hook", "function"))
    for theirs, ours in zip(judged(model, x), judged(quick, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["at", "trades", "mart", "gairat"])
@pytest.mark.parametrize("name", ["small-cnn", "resnet18-cifar"])
def test_training_goes_the_same_way_with_and_without_it(tmp_path: Path, kind: str, name: str) -> None:
    """In float64, where rounding leaves no room for anything else."""
    images = make_tiny_npz(tmp_path)

    def after(*, quick: bool) -> tuple[list[Tensor], EncoderTrainer]:
        recipe = tiny_recipe(images, precision="fp64", encoder__quick_attack=quick, encoder__label_smoothing=0.0)
        recipe = recipe.replace({"encoder.objective.kind": kind, "encoder.objective.burn_in": 0.3})
        torch.manual_seed(0)
        trainer = EncoderTrainer(recipe, create_encoder(name, 3, 3, width=0.25), Engine(torch.device("cpu"), "fp64"), 7)
        torch.manual_seed(1)
        batch = [Micro(torch.rand(8, 3, 16, 16, dtype=torch.float64), torch.arange(8) % 3, i, 2) for i in range(2)]
        return [trainer.step(step, batch)["loss"] for step in range(4)], trainer

    (losses, with_it), (plain, without) = after(quick=True), after(quick=False)
    assert with_it.quick is not None
    assert without.quick is None
    torch.testing.assert_close(losses, plain, rtol=1e-9, atol=1e-12)
    theirs = without.exported()
    for key, value in with_it.exported().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-7, atol=1e-9, msg=key)


def test_standard_training_makes_no_copy(tmp_path: Path) -> None:
    recipe = tiny_recipe(make_tiny_npz(tmp_path), encoder__attack={"eps": 0.0})
    trainer = EncoderTrainer(recipe, create_encoder("small-cnn", 3, 3), Engine(torch.device("cpu"), "fp32"), 7)
    trainer.step(0, [Micro(torch.rand(8, 3, 16, 16), torch.arange(8) % 3, 0)])
    assert trainer.quick is None


@pytest.mark.parametrize(
    "name", ["swin_t", "squeezenet1_1", "shufflenet_v2_x0_5", "efficientnet_b0", "convnext_tiny", "regnet_x_400mf"]
)
def test_families_of_torchvision_that_do_something_of_their_own(name: str) -> None:
    """The same logits as the network's, and no warning on the way."""
    model = lived_in(f"torchvision/{name}", 64).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick = copied(model, torch.float64)
        x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(quick(x), model(x), rtol=1e-8, atol=1e-8)
