"""Feature-conditioned discriminators: does this image belong to these features, or was it made from them?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, cat, nn

from arae.errors import InputError
from arae.models.blocks import Shapes, show
from arae.models.generators import LAYOUTS
from arae.models.registry import Entry, Shape, checked_shape, pick
from arae.models.spectral import normalise_spectrum

LARGEST = 6  # features a side that the feature branch flattens: those of AlexNet's conv5
SMALL = 64  # images under this many pixels a side get the small stem
SMALLEST = 15  # pixels a side that the small stem and the four convolutions after it leave something of


class Discriminator(nn.Module):
    """An image branch and a feature branch, joined by a classifier; returns **logits** (the sigmoid is in the loss)."""

    def __init__(self, name: str, image: nn.Sequential, feature: nn.Sequential, joint: nn.Sequential) -> None:
        super().__init__()
        self.name = name
        self.image, self.feature, self.joint = image, feature, joint
        for layer in [*image, *feature, *joint]:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                normalise_spectrum(layer)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits [N] that images x [N, C, H, W] in [0, 1] are real, given features z [M, c, h, w] of the real ones.

        N is M or a multiple of it (real and reconstructed images one after the other, for the same z): the feature
        branch, which holds most of the parameters, then runs once. Images may have any size; raises ValueError where M
        does not divide N, and for features of another shape than the discriminator was made for.
        """
        times, rest = divmod(len(x), len(z))
        if rest:
            raise ValueError(f"{len(x)} images can't share the features of {len(z)}: give a multiple of {len(z)}")
        return self.joint(cat([self.image(x), self.feature(z).repeat(times, 1)], dim=1)).squeeze(1)


class FlattenFeatures(nn.Module):
    """Features of one shape (c, h, w) as vectors; axes longer than `largest` are first averaged down to that length."""

    def __init__(self, shape: Shape, largest: int | None) -> None:
        super().__init__()
        self.shape = shape
        height, width = (side if largest is None else min(side, largest) for side in shape[1:])
        self.size = height, width
        self.out_features = shape[0] * height * width

    def forward(self, z: Tensor) -> Tensor:
        """[N, c, h, w] -> [N, out_features]."""
        if tuple(z.shape[1:]) != self.shape:
            raise ValueError(
                f"this discriminator takes features {show(self.shape)}, not {show(z.shape[1:])}: make it for that shape"
            )
        return (z if z.shape[2:] == self.size else F.adaptive_avg_pool2d(z, self.size)).flatten(1)


def paper(name: str, feature_shape: Shapes, image_shape: Shapes) -> Discriminator:
    """The discriminator of Table A5 as the authors' code has it: 11,372,353 parameters for AlexNet conv5 and 224 px.

    ReLU throughout (the text's leaky factor reaches nothing in the code); dropout 0.5 before each joint linear layer.
    The shapes are those of the decoder of that name.

    The paper has it for AlexNet conv5 at 224 px only. For other taps the feature branch takes as many values as they
    have, averaged down to 6×6 where there are more a side, or its first layer would hold 100 M parameters; for images
    under 64 px the first convolution (7×7, stride 4) is one of 3×3, stride 1. Raises InputError under 15 px.
    """
    layout = LAYOUTS.get(name)
    if layout is not None:
        features, image = layout.shapes(f"the decoder of discriminator {name}", feature_shape, image_shape)
    else:
        features = checked_shape(feature_shape or (256, 6, 6), "feature_shape")
        image = checked_shape(image_shape or (3, 224, 224), "image_shape")
    if min(image[1:]) < SMALLEST:
        raise InputError(
            f"discriminator {name} needs images of {SMALLEST} px a side at least, not {show(image)}: use mirror"
        )
    stem = (7, 4, 1) if min(image[1:]) >= SMALL else (3, 1, 1)
    specs = [(image[0], 32, *stem), (32, 64, 5, 1, 0), (64, 128, 3, 2, 0), (128, 256, 3, 1, 0), (256, 256, 3, 2, 0)]
    convs = [nn.Conv2d(inp, out, kernel, stride, padding) for inp, out, kernel, stride, padding in specs]
    flat = FlattenFeatures(features, LARGEST)
    return Discriminator(
        name,
        image=_image_branch(convs),
        feature=nn.Sequential(flat, nn.Linear(flat.out_features, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU()),
        joint=nn.Sequential(nn.Dropout(0.5), nn.Linear(768, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 1)),
    )


def mirror(feature_shape: Shapes, image_shape: Shapes) -> Discriminator:
    """A small discriminator of the same family for any feature shape (c, h, w) and image shape (C, H, W).

    3×3 convolutions of stride 2 (widths 32, 64, 128, then 256) until the image is at most 4 px wide, averaged over
    space; one linear layer on the flattened features; two on both. No dropout: at this size spectral norm is enough.
    """
    features, image = checked_shape(feature_shape, "feature_shape"), checked_shape(image_shape, "image_shape")
    halvings = max(1, math.ceil(math.log2(max(image[1:]) / 4)))
    widths = [image[0]] + [min(32 * 2**i, 256) for i in range(halvings)]
    convs = [nn.Conv2d(inp, out, 3, stride=2, padding=1) for inp, out in itertools.pairwise(widths)]
    flat = FlattenFeatures(features, None)
    return Discriminator(
        "mirror",
        image=_image_branch(convs),
        feature=nn.Sequential(flat, nn.Linear(flat.out_features, 256), nn.ReLU()),
        joint=nn.Sequential(nn.Linear(widths[-1] + 256, 256), nn.ReLU(), nn.Linear(256, 1)),
    )


def _image_branch(convs: list[nn.Conv2d]) -> nn.Sequential:
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


_OTHERS = ("alexnet-wavelet", "alexnet-wavelet-right", "deepsim")
_SUMMARIES = {name: f"Table A5 for the decoder {name}" for name in [*LAYOUTS, *_OTHERS]} | {
    "alexnet-conv5": "AlexNet conv5 and 224 px, the authors' layout (Table A5), 11.4 M parameters"
}

DISCRIMINATORS: dict[str, Entry[Callable[[Shapes, Shapes], Discriminator]]] = {
    **{name: Entry(partial(paper, name), summary) for name, summary in _SUMMARIES.items()},
    "mirror": Entry(mirror, "derived from the feature and image shapes"),
}


def create_discriminator(name: str, feature_shape: Shapes = None, image_shape: Shapes = None) -> Discriminator:
    """The discriminator that goes with the decoder of the same name; shapes and errors as in `create_decoder`."""
    return pick(DISCRIMINATORS, name, "discriminator")(feature_shape, image_shape)
