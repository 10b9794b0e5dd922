"""DeePSiM's generator (Dosovitskiy and Brox 2016), the larger decoder that Table 7 of the ARAE paper compares with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from arae.models.blocks import Decoder, Shapes, natural_size
from arae.models.mirror import doublings_and_growth, refuse_waste
from arae.models.registry import checked_shape

SLOPE = 0.3  # of the leaky ReLU
STAGES = ((256, 512), (256, 256), (128, 128), (64,), (32,))  # widths after each doubling but the last, at 256 channels


def deepsim(feature_shape: Shapes, image_shape: Shapes) -> Decoder:
    """DeePSiM's generator for CaffeNet's conv5 after pooling (256×6×6), 12,700,672 parameters: Table 7's 12.7 M.

    Known, from public ports of its released network for that layer: three 3×3 convolutions with biases to 512 channels,
    the third without padding (6 to 4); six doublings by 4×4 transposed convolutions to 256, 256, 128, 64, 32 and 3
    channels, the first three each followed by a 3×3 transposed one to 512, 256 and 128, all without biases; leaky ReLU
    of slope 0.3 between them; no batch norm, no spectral norm. It makes 256×256 and is cropped at the centre (theirs to
    227×227, for images of that size; here to the images').

    Assumed: tanh at the end, as in the other decoders here (theirs is linear, in 8-bit levels around a mean image), and
    He initialisation for that slope.

    For other shapes the widths go in proportion to the channels, there are as many doublings as `mirror` has, and the
    third convolution keeps the size or adds the pixels that are missing. Only those are aligned with their encoder at
    every size: the original doubles once more than AlexNet halves, so it works at the size it was made for alone.
    """
    features = checked_shape(feature_shape or (256, 6, 6), "feature_shape")
    image = checked_shape(image_shape or (3, 224, 224), "image_shape")
    doublings, grow = doublings_and_growth(features, image)
    wide = 2 * features[0]
    if features[1:] == (6, 6) and all(192 < side <= 256 for side in image[1:]):
        doublings, third = 6, nn.Conv2d(wide, wide, 3)
    elif any(grow):
        third = nn.ConvTranspose2d(wide, wide, (3 + grow[0], 3 + grow[1]), padding=1)
    else:
        third = nn.Conv2d(wide, wide, 3, padding=1)
    convs = [nn.Conv2d(features[0], wide, 3, padding=1), nn.Conv2d(wide, wide, 3, padding=1), third]
    layers = nn.Sequential(*_leaky([*convs, *_stages(features[0], image[0], doublings)]), nn.Tanh())
    refuse_waste("deepsim", natural_size(layers, features[1], features[2]), features, image)
    _initialise(layers)
    return Decoder("deepsim", layers, features, image)


def _stages(channels: int, out: int, doublings: int) -> list[nn.Module]:
    """The doublings, the last one to the image's channels; a plain 3×3 convolution where there is none."""
    layers: list[nn.Module] = []
    inp = 2 * channels
    for i in range(doublings - 1):
        for kernel, width in zip((4, 3), STAGES[min(i, len(STAGES) - 1)], strict=False):
            narrow = max(1, round(width * channels / 256))
            stride = 2 if kernel == 4 else 1
            layers.append(nn.ConvTranspose2d(inp, narrow, kernel, stride=stride, padding=1, bias=False))
            inp = narrow
    if doublings == 0:
        return [nn.Conv2d(inp, out, 3, padding=1, bias=False)]
    return [*layers, nn.ConvTranspose2d(inp, out, 4, stride=2, padding=1, bias=False)]


def _leaky(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers with a leaky ReLU between them."""
    row = [module for layer in layers for module in (layer, nn.LeakyReLU(SLOPE, inplace=True))]
    return row[:-1]


def _initialise(layers: nn.Sequential) -> None:
    """N(0, gain² / n), n the weights that an output pixel sums over (He et al. 2015); biases 0.

    In a transposed convolution of stride s that is one weight in s² of a kernel.
    """
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            seen = layer.in_channels * math.prod(layer.kernel_size)
            if isinstance(layer, nn.ConvTranspose2d):
                seen /= math.prod(layer.stride)
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / (1 + SLOPE**2) / seen))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
