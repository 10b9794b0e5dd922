"""Encoders by name: how each is built, and weights from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from arae.errors import InputError
from arae.models.classifiers import alexnet, resnet18_cifar, small_cnn, vgg16
from arae.models.registry import Entry, pick
from arae.models.taps import Encoder, own_names
from arae.models.torchvision_nets import FAMILY, classifiers, torchvision_encoder
from arae.models.wavelet import alexnet_wavelet_encoder
from arae.models.weights import load_exactly, read_weights
from arae.models.wideresnet import wrn_28_10

__all__ = ["ENCODERS", "Encoder", "create_encoder"]

ENCODERS: dict[str, Entry[Callable[[int, int, float], Encoder]]] = {
    "alexnet": Entry(alexnet, "AlexNet (torchvision), RGB from 63 px; conv1, conv2, conv5, each after pooling"),
    "alexnet-wavelet": Entry(alexnet_wavelet_encoder, "AlexNet with wavelet pooling and skips; conv1, conv2, conv5"),
    "vgg16": Entry(vgg16, "VGG-16 (torchvision), RGB from 32 px; conv1_1 to conv5_3, each after ReLU"),
    "resnet18-cifar": Entry(
        resnet18_cifar, "ResNet-18 for 32 px: 3×3 first convolution, no max pooling; layer1 to layer4"
    ),
    "wrn-28-10": Entry(wrn_28_10, "WideResNet-28-10 for 32 px; block1 to block3 (640×8×8), before the last ReLU"),
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

    `name`: of `ENCODERS`, or `torchvision/NAME`. `image_size` (pixels), where given, is tried at once. `pretrained`: a
    `.safetensors` or `.pt` file, with the names of `Encoder.state_dict()`, or those of the network alone as it or its
    authors name them (`own_names`). `width`: factor on the channels of arae's own networks. Raises InputError: unknown
    name, weights that do not match exactly, images that do not fit.
    """
    if num_classes < 2 or in_channels < 1:
        raise InputError(f"encoder {name}: needs 2 classes and 1 channel at least, not {num_classes} and {in_channels}")
    model = _build(name, num_classes, in_channels, width)
    if image_size is not None:
        model.refuse_unfit((in_channels, image_size, image_size))
    if pretrained is not None:
        weights = read_weights(pretrained)
        if "mean" in weights and "std" in weights:
            load_exactly(model, weights, pretrained)
        else:
            load_exactly(model.net, own_names(model, weights), pretrained)
    return model


def _build(name: str, num_classes: int, in_channels: int, width: float) -> Encoder:
    if name.startswith(FAMILY):
        return torchvision_encoder(name, num_classes, in_channels, width)
    if name not in ENCODERS and FAMILY + name in classifiers():
        raise InputError(f"no encoder {name!r}: did you mean {FAMILY + name!r}?")
    return pick(ENCODERS, name, "encoder")(num_classes, in_channels, width)
