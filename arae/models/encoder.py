"""Encoders: classifiers whose first layer normalises, and whose inner layers can be tapped as features.

A network is run as a *chain* of its own submodules, so a tap costs only the layers before it, in every mode (no_grad,
autograd, channels_last, train or eval), and shares its parameters with the classifier.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import AlexNet, ResNet
from torchvision.models.resnet import BasicBlock

from arae.errors import InputError
from arae.models.registry import Entry, pick
from arae.models.weights import load_exactly, read_weights
from arae.modes import evaluating

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Encoder(nn.Module):
    """A classifier and its feature taps. Images are float in [0, 1], [N, C, H, W]; the first layer normalises them."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        net: nn.Module,
        *,
        chain: Sequence[str],
        layers: Mapping[str, str],
        layer: str,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """`chain`: paths of the submodules of `net` in the order they run. `layers`: tap -> path of its submodule."""
        super().__init__()
        self.name, self.layer, self.num_classes = name, layer, num_classes
        self.layers = dict(layers)
        self.chain = tuple(chain)
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images x [N, C, H, W] in [0, 1]."""
        return self._run(x, self.chain)

    def features(self, x: Tensor, layer: str | None = None) -> Tensor:
        """Output [N, c, h, w] of a tap (default: the network's own, `self.layer`) for images x [N, C, H, W] in [0, 1].

        The layers after the tap are not run. Raises InputError for a tap that the network does not have.
        """
        return self._run(x, self.chain[: self._end_of(layer or self.layer)])

    def feature_shape(self, image_shape: Sequence[int], layer: str | None = None) -> tuple[int, int, int]:
        """(c, h, w) of a tap for images of shape (C, H, W), by running one black image through the network."""
        with torch.no_grad(), evaluating(self):
            image = torch.zeros(1, *image_shape, device=self.mean.device, dtype=self.mean.dtype)
            try:
                _, c, h, w = self.features(image, layer).shape
            except (RuntimeError, ValueError) as error:
                shape, why = tuple(image_shape), str(error).splitlines()[0]
                raise InputError(f"encoder {self.name} can't take images of shape {shape}: {why}") from None
        return c, h, w

    def _run(self, x: Tensor, chain: Sequence[str]) -> Tensor:
        x = (x - self.mean) / self.std
        for path in chain:
            x = self.net.get_submodule(path)(x)
        return x

    def _end_of(self, layer: str) -> int:
        if layer not in self.layers:
            near = difflib.get_close_matches(layer, self.layers, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its layers are {', '.join(self.layers)}"
            raise InputError(f"encoder {self.name} has no layer {layer!r}: {hint}")
        return self.chain.index(self.layers[layer]) + 1


def alexnet(num_classes: int, in_channels: int, width: float) -> Encoder:
    """torchvision's AlexNet (Krizhevsky 2014, "one weird trick"); taps after ReLU **and** pooling, as in the paper."""
    if in_channels != 3:
        raise InputError(f"encoder alexnet takes RGB images, not {in_channels} channel(s): set data.channels to 3")
    if width != 1:
        raise InputError(f"encoder alexnet has one width: encoder.width = {width:g}")
    net = AlexNet(num_classes=num_classes)
    net.flatten = nn.Flatten(1)
    chain = [f"features.{i}" for i in range(13)] + ["avgpool", "flatten"] + [f"classifier.{i}" for i in range(7)]
    taps = {"conv1": "features.2", "conv2": "features.5", "conv5": "features.12"}
    return Encoder(
        "alexnet",
        net,
        chain=chain,
        layers=taps,
        layer="conv5",
        num_classes=num_classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def resnet18_cifar(num_classes: int, in_channels: int, width: float) -> Encoder:
    """ResNet-18 in its CIFAR form: a 3×3 first convolution, no max pooling; layer4 is 512×4×4 at 32 px."""
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
    net.flatten = nn.Flatten(1)
    stages = [f"layer{i}" for i in range(1, 5)]
    mean, std = (CIFAR_MEAN, CIFAR_STD) if in_channels == 3 else ((0.5,) * in_channels, (0.25,) * in_channels)
    return Encoder(
        "resnet18-cifar",
        net,
        chain=["conv1", "bn1", "relu", *stages, "avgpool", "flatten", "fc"],
        layers={stage: stage for stage in stages},
        layer="layer4",
        num_classes=num_classes,
        mean=mean,
        std=std,
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
        chain=[name for name, _ in net.named_children()],
        layers={f"conv{i}": f"relu{i}" for i in range(1, 5)},
        layer="conv4",
        num_classes=num_classes,
        mean=(0.5,) * in_channels,
        std=(0.25,) * in_channels,
    )


def scaled(channels: int, width: float) -> int:
    """A number of channels at a width: at least 1."""
    return max(1, round(channels * width))


ENCODERS: dict[str, Entry[Callable[[int, int, float], Encoder]]] = {
    "alexnet": Entry(alexnet, "AlexNet (torchvision), RGB from 63 px; conv1, conv2, conv5, each after pooling"),
    "resnet18-cifar": Entry(
        resnet18_cifar, "ResNet-18 for 32 px: 3×3 first convolution, no max pooling; layer1 to layer4"
    ),
    "small-cnn": Entry(small_cnn, "four convolutions for 28 to 64 px on a CPU; conv1 to conv4 (128×4×4)"),
}


def create_encoder(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    pretrained: str | Path | None = None,
    width: float = 1.0,
) -> Encoder:
    """An encoder for images of `in_channels` in [0, 1], with random weights or those of a file.

    `image_size` (pixels), where given, is tried at once. `pretrained`: a `.safetensors` or `.pt` file, with the names
    of `Encoder.state_dict()` or those of the network alone (torchvision's). Raises InputError: unknown name, weights
    that do not match exactly, images that do not fit.
    """
    if num_classes < 2 or in_channels < 1:
        raise InputError(f"encoder {name}: needs 2 classes and 1 channel at least, not {num_classes} and {in_channels}")
    model = pick(ENCODERS, name, "encoder")(num_classes, in_channels, width)
    if image_size is not None:
        model.feature_shape((in_channels, image_size, image_size))
    if pretrained is not None:
        weights = read_weights(pretrained)
        load_exactly(model if "mean" in weights and "std" in weights else model.net, weights, pretrained)
    return model
