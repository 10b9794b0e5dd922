"""Decoders (the paper's generators): features in, images in [0, 1] out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from arae.errors import InputError
from arae.models.registry import Entry, Shape, checked_shape, pick

Shapes = Sequence[int] | None  # None: as the name of the network fixes it


class Decoder(nn.Module):
    """Layers that end in tanh, cropped at the centre to the image's size and mapped to [0, 1] by (t + 1) / 2."""

    def __init__(self, name: str, layers: nn.Sequential, feature_shape: Shape, image_shape: Shape) -> None:
        super().__init__()
        self.name, self.feature_shape, self.image_shape = name, feature_shape, image_shape
        self.layers = layers

    def forward(self, z: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] from features z [N, c, h, w]."""
        t = self.layers(z)
        height, width = self.image_shape[1:]
        top, left = (t.shape[2] - height) // 2, (t.shape[3] - width) // 2
        return (t[:, :, top : top + height, left : left + width] + 1) / 2


def alexnet_conv5(feature_shape: Shapes, image_shape: Shapes) -> Decoder:
    """AlexNet conv5 as in the authors' code, 4,753,370 parameters: the transposed convolutions drop channels."""
    layers = nn.Sequential(*_conv(256, 256))
    _add(layers, _tconv(256, 256, stride=1))
    for inp, out in [(256, 256), (256, 128), (128, 64), (64, 32), (32, 3)]:
        _add(layers, [*_conv(inp, inp), *_tconv(inp, out)])
    return _alexnet("alexnet-conv5", layers, feature_shape, image_shape)


def alexnet_conv5_printed(feature_shape: Shapes, image_shape: Shapes) -> Decoder:
    """AlexNet conv5 as the paper's Table A4 prints it, 5,651,258 parameters: the 3×3 convolutions drop channels."""
    layers = nn.Sequential(*_conv(256, 256))
    for i, (inp, out) in enumerate([(256, 256), (256, 256), (256, 128), (128, 64), (64, 32), (32, 3)]):
        _add(layers, [*_tconv(inp, inp, stride=1 if i == 0 else 2), *_conv(inp, out)])
    return _alexnet("alexnet-conv5-printed", layers, feature_shape, image_shape)


def mirror(feature_shape: Shapes, image_shape: Shapes, *, spectral: bool = False) -> Decoder:
    """A decoder of the same family for any feature shape (c, h, w) and image shape (C, H, W).

    A 3×3 convolution, then doublings (4×4 transposed convolution of stride 2 and a 3×3 convolution) whose width halves
    down to 16, then a 3×3 convolution with a bias, and tanh. Where the doublings alone fall short of the image, the
    features first grow by a few pixels in a transposed convolution of stride 1, as the authors' decoder does (6 to 7,
    for 224 = 7 · 32); where they go past it, the output is cropped at the centre (28 of 32). Nothing is resized.

    Spectral norm is off by default: all layers but the last are followed by a batch norm, which divides any scale of
    the weights out again, so it costs time and buys little here; the authors' layout has it, and keeps it.
    """
    features, image = checked_shape(feature_shape, "feature_shape"), checked_shape(image_shape, "image_shape")
    channels, sides = features[0], features[1:]
    doublings = max(0, round(math.log2(max(big / small for big, small in zip(image[1:], sides, strict=True)))))
    grow = [max(0, math.ceil(big / 2**doublings) - small) for big, small in zip(image[1:], sides, strict=True)]
    layers = nn.Sequential(*_conv(channels, channels))
    if any(grow):
        _add(layers, _tconv(channels, channels, stride=1, kernel=(3 + grow[0], 3 + grow[1])))
    for _ in range(doublings):
        narrow = max(channels // 2, 16)
        _add(layers, [*_tconv(channels, narrow), *_conv(narrow, narrow)])
        channels = narrow
    _finish(layers, channels, image[0], spectral=spectral)
    return Decoder("mirror", layers, features, image)


def _alexnet(name: str, layers: nn.Sequential, feature_shape: Shapes, image_shape: Shapes) -> Decoder:
    features = checked_shape(feature_shape or (256, 6, 6), "feature_shape")
    image = checked_shape(image_shape or (3, 224, 224), "image_shape")
    grown = (3, 32 * (features[1] + 1), 32 * (features[2] + 1))
    if features[0] != 256 or image != grown:
        raise InputError(
            f"decoder {name} turns features of 256×h×w into images of 3×32(h+1)×32(w+1), not {features} into {image}: "
            f"use images whose sides are multiples of 224 with AlexNet's conv5, or the decoder mirror"
        )
    _finish(layers, 3, 3, spectral=True)
    return Decoder(name, layers, features, image)


def _conv(inp: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def _tconv(inp: int, out: int, stride: int = 2, kernel: tuple[int, int] = (4, 4)) -> list[nn.Module]:
    tconv = nn.ConvTranspose2d(inp, out, kernel, stride=stride, padding=1, bias=False)
    return [tconv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def _add(layers: nn.Sequential, more: Sequence[nn.Module]) -> None:
    for layer in more:
        layers.append(layer)


def _finish(layers: nn.Sequential, inp: int, out: int, *, spectral: bool) -> None:
    """Add the last convolution and tanh, initialise as the authors' code does, then wrap in spectral norm.

    N(0, 0.02) for convolutions, N(1, 0.02) for the scale of batch norms; transposed convolutions keep PyTorch's default
    (the authors' code passes them by).
    """
    _add(layers, [nn.Conv2d(inp, out, 3, padding=1), nn.Tanh()])
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        if spectral and isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            spectral_norm(layer)


DECODERS: dict[str, Entry[Callable[[Shapes, Shapes], Decoder]]] = {
    "alexnet-conv5": Entry(alexnet_conv5, "AlexNet conv5 to 224 px, the authors' layout, 4.75 M parameters"),
    "alexnet-conv5-printed": Entry(alexnet_conv5_printed, "the same as the paper prints it, 5.65 M parameters"),
    "mirror": Entry(mirror, "derived from the feature and image shapes"),
}


def create_decoder(name: str, feature_shape: Shapes = None, image_shape: Shapes = None) -> Decoder:
    """A decoder from features (c, h, w) to images (C, H, W); shapes may be left out where the name fixes them.

    Raises InputError: unknown name, shapes that the decoder cannot join.
    """
    return pick(DECODERS, name, "decoder")(feature_shape, image_shape)
