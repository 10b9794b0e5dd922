"""Feature-conditioned discriminators: does this image belong to these features, or was it made from them?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, cat, nn
from torch.nn.utils.parametrizations import spectral_norm

from arae.errors import InputError
from arae.models.registry import Entry, checked_shape, pick

Shapes = Sequence[int] | None  # None: as the name of the network fixes it


class Discriminator(nn.Module):
    """An image branch and a feature branch, joined by a classifier; returns **logits** (the sigmoid is in the loss)."""

    def __init__(self, name: str, image: nn.Sequential, feature: nn.Sequential, joint: nn.Sequential) -> None:
        super().__init__()
        self.name = name
        self.image, self.feature, self.joint = image, feature, joint
        for layer in [*image, *feature, *joint]:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                spectral_norm(layer)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits [N] that images x [N, C, H, W] in [0, 1] are real, given features z [M, c, h, w] of the real ones.

        N is M or a multiple of it (real and reconstructed images one after the other, for the same z): the feature
        branch, which holds most of the parameters, then runs once. Raises ValueError where M does not divide N.
        """
        times, rest = divmod(len(x), len(z))
        if rest:
            raise ValueError(f"{len(x)} images can't share the features of {len(z)}: give a multiple of {len(z)}")
        return self.joint(cat([self.image(x), self.feature(z).repeat(times, 1)], dim=1)).squeeze(1)


def alexnet_conv5(feature_shape: Shapes, image_shape: Shapes) -> Discriminator:
    """The discriminator of AlexNet conv5 as in the authors' code, 11,372,353 parameters, on 224 px.

    ReLU throughout (the text's leaky factor reaches nothing in the code); dropout 0.5 before each joint linear layer.
    """
    features, image = feature_shape or (256, 6, 6), image_shape or (3, 224, 224)
    if tuple(features) != (256, 6, 6) or image[0] != 3:
        raise InputError(
            f"discriminator alexnet-conv5 takes RGB images and features of 256×6×6, not {tuple(image)} and "
            f"{tuple(features)}: use 224 px and AlexNet's conv5, or mirror"
        )
    specs = [(3, 32, 7, 4, 1), (32, 64, 5, 1, 0), (64, 128, 3, 2, 0), (128, 256, 3, 1, 0), (256, 256, 3, 2, 0)]
    convs = [nn.Conv2d(inp, out, kernel, stride, padding) for inp, out, kernel, stride, padding in specs]
    return Discriminator(
        "alexnet-conv5",
        image=_image_branch(convs),
        feature=nn.Sequential(nn.Flatten(1), nn.Linear(9216, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU()),
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
    return Discriminator(
        "mirror",
        image=_image_branch(convs),
        feature=nn.Sequential(nn.Flatten(1), nn.Linear(math.prod(features), 256), nn.ReLU()),
        joint=nn.Sequential(nn.Linear(widths[-1] + 256, 256), nn.ReLU(), nn.Linear(256, 1)),
    )


def _image_branch(convs: list[nn.Conv2d]) -> nn.Sequential:
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


DISCRIMINATORS: dict[str, Entry[Callable[[Shapes, Shapes], Discriminator]]] = {
    "alexnet-conv5": Entry(alexnet_conv5, "AlexNet conv5 and 224 px, the authors' layout, 11.4 M parameters"),
    "alexnet-conv5-printed": Entry(alexnet_conv5, "the same, for the decoder of that name"),
    "mirror": Entry(mirror, "derived from the feature and image shapes"),
}


def create_discriminator(name: str, feature_shape: Shapes = None, image_shape: Shapes = None) -> Discriminator:
    """The discriminator that goes with the decoder of the same name; shapes and errors as in `create_decoder`."""
    return pick(DISCRIMINATORS, name, "discriminator")(feature_shape, image_shape)
