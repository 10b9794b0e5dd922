"""The automatic mirror: a decoder derived from the shapes of a tap and of the images."""

from __future__ import annotations

import math

from torch import nn

from arae.errors import InputError
from arae.models.blocks import Decoder, Shapes, add, conv, finish, natural_size, show, tconv
from arae.models.registry import Shape, checked_shape


def mirror(feature_shape: Shapes, image_shape: Shapes, *, spectral: bool = False) -> Decoder:
    """A decoder of the same family for any feature shape (c, h, w) and image shape (C, H, W).

    A 3×3 convolution, then doublings (4×4 transposed convolution of stride 2 and a 3×3 convolution) whose width halves
    down to 16, then a 3×3 convolution with a bias, and tanh. Where the doublings alone fall short of the image, the
    features first grow by a few pixels in a transposed convolution of stride 1, as the authors' decoder does (6 to 7,
    for 224 = 7 · 32); where they go past it, the output is cropped at the centre (28 of 32). Nothing is resized.

    Spectral norm is off by default: all layers but the last are followed by a batch norm, which divides any scale of
    the weights out again, so it costs time and buys little here; the authors' layout has it, and keeps it.

    Raises InputError where half of the output or more would be cropped away: the features are larger than the image,
    or shaped unlike it.
    """
    features, image = checked_shape(feature_shape, "feature_shape"), checked_shape(image_shape, "image_shape")
    channels = features[0]
    doublings, grow = doublings_and_growth(features, image)
    layers = nn.Sequential(*conv(channels, channels))
    if any(grow):
        add(layers, tconv(channels, channels, stride=1, kernel=(3 + grow[0], 3 + grow[1])))
    for _ in range(doublings):
        narrow = max(channels // 2, 16)
        add(layers, [*tconv(channels, narrow), *conv(narrow, narrow)])
        channels = narrow
    refuse_waste("mirror", natural_size(layers, features[1], features[2]), features, image)
    finish(layers, channels, image[0], spectral=spectral)
    return Decoder("mirror", layers, features, image)


def doublings_and_growth(features: Shape, image: Shape) -> tuple[int, tuple[int, int]]:
    """How often features (c, h, w) double to reach the image (C, H, W), and by how many pixels they must grow first."""
    pairs = list(zip(image[1:], features[1:], strict=True))
    doublings = max(0, round(math.log2(max(big / small for big, small in pairs))))
    height, width = (max(0, math.ceil(big / 2**doublings) - small) for big, small in pairs)
    return doublings, (height, width)


def refuse_waste(name: str, full: tuple[int, int], features: Shape, image: Shape) -> None:
    """Raise InputError where the image is half of the decoder's full output, or less, along an axis with features.

    A single feature along an axis stands for whatever size its image has.
    """
    for made, wanted, side in zip(full, image[1:], features[1:], strict=True):
        if made >= 2 * wanted and side > 1:
            raise InputError(
                f"decoder {name} would make {show(full)} px of features {show(features)} and crop them to images "
                f"{show(image)}: the features are larger than the images, or shaped unlike them; take another layer"
            )
