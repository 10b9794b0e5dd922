"""Networks with a name of their own: AlexNet, VGG-16, ResNet-18 for small images, and a small one for a CPU.

torchvision is imported where it is used: it brings torch's compiler along, and every command would wait for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arae.errors import InputError
from arae.models.taps import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD, Encoder

Network = TypeVar("Network", bound=nn.Module)

VGG16_STAGES = (2, 2, 3, 3, 3)  # convolutions before each pooling


def alexnet(num_classes: int, in_channels: int, width: float) -> Encoder:
    """torchvision's AlexNet (Krizhevsky 2014, "one weird trick"); taps after ReLU **and** pooling, as in the paper."""
    from torchvision.models import AlexNet

    refuse_grey("alexnet", in_channels)
    net = _at_width(lambda: AlexNet(num_classes=num_classes), width)
    return Encoder(
        "alexnet",
        net,
        layers={"conv1": "features.2", "conv2": "features.5", "conv5": "features.12"},
        layer="conv5",
        num_classes=num_classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        published=[(r"^last_layer\.", "classifier.6.")],  # the robustness library's name
    )


def vgg16(num_classes: int, in_channels: int, width: float) -> Encoder:
    """torchvision's VGG-16 without batch norm (Simonyan and Zisserman 2015, configuration D).

    Taps conv1_1 to conv5_3, each after its ReLU; the paper inverts conv5_1, 512×14×14 at 224 px.
    """
    from torchvision.models import VGG
    from torchvision.models.vgg import cfgs, make_layers

    refuse_grey("vgg16", in_channels)
    net = _at_width(lambda: VGG(make_layers(cfgs["D"]), num_classes=num_classes), width)
    if width != 1:  # made anew, so without torchvision's initialisation
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
    convs = [f"conv{stage}_{i}" for stage, n in enumerate(VGG16_STAGES, start=1) for i in range(1, n + 1)]
    relus = [f"features.{i}" for i, layer in enumerate(net.features.children()) if isinstance(layer, nn.ReLU)]
    return Encoder(
        "vgg16",
        net,
        layers=dict(zip(convs, relus, strict=True)),
        layer="conv5_1",
        num_classes=num_classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def resnet18_cifar(num_classes: int, in_channels: int, width: float) -> Encoder:
    """ResNet-18 in its CIFAR form: a 3×3 first convolution, no max pooling; layer4 is 512×4×4 at 32 px."""
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    widths = [scaled(w, width) for w in (64, 128, 256, 512)]
    net.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
    if width != 1:  # torchvision fixes the widths of a ResNet, but lets its stages be made anew
        net.inplanes, net.bn1 = widths[0], nn.BatchNorm2d(widths[0])
        for i, w in enumerate(widths, start=1):
            setattr(net, f"layer{i}", net._make_layer(BasicBlock, w, 2, stride=1 if i == 1 else 2))
        net.fc = nn.Linear(widths[-1], num_classes)
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()  # type: ignore[assignment] -- torchvision types it as MaxPool2d
    stages = [f"layer{i}" for i in range(1, 5)]
    mean, std = small_image_statistics(in_channels)
    return Encoder(
        "resnet18-cifar",
        net,
        layers={stage: stage for stage in stages},
        layer="layer4",
        num_classes=num_classes,
        mean=mean,
        std=std,
        # the names of CIFAR ResNets (RobustBench's among them): theirs is the same network at 32 px
        published=[(r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")],
    )


class PoolTo4(nn.Module):
    """Average pooling to 4×4; what is 4×4 already (images of 25 to 32 px) goes through at no cost."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C, 4, 4]."""
        return x if x.shape[2:] == (4, 4) else F.adaptive_avg_pool2d(x, 4)


def small_cnn(num_classes: int, in_channels: int, width: float = 1.0) -> Encoder:
    """Four convolutions for small images on a CPU: 128×4×4 features at 28 and 32 px, 4 M multiply-adds at 28×28×1.

    Without batch norm: then the attack (evaluation mode) and the training step see the same function.
    """
    net = nn.Sequential()
    outputs = [scaled(w, width) for w in (32, 64, 64, 128)]
    inputs = [in_channels, *outputs[:-1]]
    specs = zip(inputs, outputs, (5, 3, 3, 3), (2, 2, 1, 2), strict=True)
    for i, (inp, out, kernel, stride) in enumerate(specs, start=1):
        conv = nn.Conv2d(inp, out, kernel, stride=stride, padding=kernel // 2)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type] -- it has a bias
        net.add_module(f"conv{i}", conv)
        net.add_module(f"relu{i}", nn.ReLU())
    net.add_module("pool", PoolTo4())
    net.add_module("flatten", nn.Flatten(1))
    net.add_module("fc", nn.Linear(outputs[-1] * 16, num_classes))
    return Encoder(
        "small-cnn",
        net,
        layers={f"conv{i}": f"relu{i}" for i in range(1, 5)},
        layer="conv4",
        num_classes=num_classes,
        mean=(0.5,) * in_channels,
        std=(0.25,) * in_channels,
    )


def scaled(channels: int, width: float) -> int:
    """A number of channels at a width: at least 1."""
    return max(1, round(channels * width))


def small_image_statistics(in_channels: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that normalise small images: CIFAR-10's for RGB, middling ones for others."""
    return (CIFAR_MEAN, CIFAR_STD) if in_channels == 3 else ((0.5,) * in_channels, (0.25,) * in_channels)


def refuse_grey(name: str, in_channels: int) -> None:
    """Raise InputError where a network of RGB images is asked to take others."""
    if in_channels != 3:
        raise InputError(f"encoder {name} takes RGB images, not {in_channels} channel(s): set data.channels to 3")


def _at_width(make: Callable[[], Network], width: float) -> Network:
    """A network whose layers run one after another, with every channel number scaled but those of images and classes.

    At width 1 it is what `make` gives; else its layers are made anew, in PyTorch's initialisation.
    """
    if width == 1:
        return make()
    with torch.device("meta"):
        net = make()
    layers = [(path, m) for path, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    before, now = 3, 3
    for path, layer in layers:
        new: nn.Module
        if isinstance(layer, nn.Conv2d):
            out = scaled(layer.out_channels, width)
            new = nn.Conv2d(now, out, layer.kernel_size, layer.stride, layer.padding)  # type: ignore[arg-type]
            before, now = layer.out_channels, out
        else:
            out = layer.out_features if path == layers[-1][0] else scaled(layer.out_features, width)
            new = nn.Linear(layer.in_features // before * now, out)  # more than `before` where maps are flattened
            before, now = layer.out_features, out
        net.set_submodule(path, new)
    return net
