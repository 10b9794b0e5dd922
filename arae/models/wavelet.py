"""AlexNet with wavelet pooling and skips, for denoising (Tables A8 and A9 of the paper).

Max pooling is replaced by Haar analysis: its low band goes on to the next layer, its three high bands skip to the
decoder, which synthesises the layer's map of them. What the encoder gives its decoder is therefore no one tensor, but
a `WaveletCode`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arae.errors import InputError
from arae.models.blocks import Decoder, Shapes, conv, finish, show
from arae.models.classifiers import alexnet
from arae.models.registry import Shape, checked_shape
from arae.models.taps import IMAGENET_MEAN, IMAGENET_STD, Encoder
from arae.precision import full

CHANNELS = (256, 192, 64)  # of the maps that are pooled, from the code outwards


class WaveletCode(NamedTuple):
    """What the wavelet encoder gives its decoder; the high bands lie side by side as channels: LH, HL, HH."""

    code: Tensor
    """[N, 256, h, w], the low band after conv5; 6×6 at 224 px."""
    high3: Tensor
    """[N, 3·256, h, w], of the same level."""
    high2: Tensor
    """[N, 3·192, 2h + 1, 2w + 1], of the pooling after conv2."""
    high1: Tensor
    """[N, 3·64, 4h + 3, 4w + 3], of the pooling after conv1."""

    def full(self) -> WaveletCode:
        """The same in the precision of losses."""
        return WaveletCode(*(full(part) for part in self))


def haar_analysis(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low band [N, C, H/2, W/2] and high bands [N, 3C, H/2, W/2] (LH, HL, HH) of x [N, C, H, W].

    Per channel, 2×2 filters of stride 2: outer products of L = (1, 1)/√2 and H = (-1, 1)/√2, the first down the rows,
    the second along them; so the low band of a constant map doubles it. Odd sizes lose their last row or column.
    """
    if min(x.shape[-2:]) < 2:
        raise ValueError(f"maps of {x.shape[-2]}×{x.shape[-1]} are too small for Haar analysis")
    x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    high = torch.cat([b - a + d - c, c - a + d - b, a - b - c + d], dim=1)
    return (a + b + c + d) / 2, high / 2


def haar_synthesis(low: Tensor, high: Tensor) -> Tensor:
    """The map [N, C, 2h, 2w] whose bands are low [N, C, h, w] and high [N, 3C, h, w]: the inverse of the analysis."""
    lh, hl, hh = high.chunk(3, dim=1)
    a, b, c, d = low - lh - hl + hh, low + lh - hl - hh, low - lh + hl - hh, low + lh + hl + hh
    return F.pixel_shuffle(torch.stack([a, b, c, d], dim=2).flatten(1, 2), 2) / 2


class HaarPool(nn.Module):
    """The low band of Haar analysis: sums of 2×2 pixels, halved."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H/2, W/2], odd sizes rounded down."""
        return haar_analysis(x)[0]


class WaveletEncoder(Encoder):
    """AlexNet whose three max poolings are Haar low bands (Table A8); its parameters have AlexNet's names.

    The paper takes over AlexNet's weights as they are, so these features differ from those the weights were trained to
    make, and the dense layers, which are kept for the names' sake, classify badly until they are trained anew.
    """

    def coded(self, x: Tensor, layer: str | None = None) -> Tensor | WaveletCode:
        """What the decoder takes, for images x [N, 3, H, W] in [0, 1]: at conv5 the code with the details it left.

        Raises InputError as `features`.
        """
        if (layer or self.layer) != "conv5":
            return self.features(x, layer)
        self.refuse_unfit(x.shape[1:], "conv5")
        x, highs = (x - self.mean) / self.std, []
        for module in self.net.get_submodule("features").children():
            if isinstance(module, HaarPool):
                x, high = haar_analysis(x)
                highs.append(high)
            else:
                x = module(x)
        return WaveletCode(x, *reversed(highs))


def alexnet_wavelet_encoder(num_classes: int, in_channels: int, width: float) -> WaveletEncoder:
    """AlexNet with wavelet pooling; taps conv1, conv2 and conv5 are the low bands after the pooling."""
    plain = alexnet(num_classes, in_channels, width)
    for layer in plain.layers.values():
        plain.net.set_submodule(layer, HaarPool())
    return WaveletEncoder(
        "alexnet-wavelet",
        plain.net,
        layers=plain.layers,
        layer="conv5",
        num_classes=num_classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        published=plain.published,
    )


class HaarUnpool(nn.Module):
    """Haar synthesis as a layer of the decoder."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """See `haar_synthesis`."""
        return haar_synthesis(low, high)


class WaveletDecoder(Decoder):
    """Table A9: convolutions between Haar syntheses, each followed by a reflection pad that regains a lost line."""

    def __init__(self, name: str, layers: nn.Sequential, feature_shape: Shape, image_shape: Shape) -> None:
        nn.Module.__init__(self)  # not Decoder's: nothing is cropped, and a row of layers alone does not tell the size
        self.name, self.feature_shape, self.image_shape, self.layers = name, feature_shape, image_shape, layers

    def recompute(self, parts: int) -> None:
        """InputError: its layers are no row, for the details come in between."""
        raise InputError(f"decoder.recompute = {parts}: {self.name} is not layers in a row; leave it out")

    def forward(self, z: Tensor | WaveletCode) -> Tensor:
        """Images [N, 3, 32(h+1), 32(w+1)] in [0, 1] from a code of h×w; a code alone has high bands of zero."""
        t, *highs = z if isinstance(z, WaveletCode) else without_details(z)
        for layer in self.layers:
            t = layer(t, highs.pop(0)) if isinstance(layer, HaarUnpool) else layer(t)
        return (t + 1) / 2

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the images that codes of height×width become."""
        return 32 * (height + 1), 32 * (width + 1)


def without_details(code: Tensor) -> WaveletCode:
    """A code [N, 256, h, w] whose maps had no details: high bands of zero."""
    h, w = code.shape[2:]
    sizes = [(h, w), (2 * h + 1, 2 * w + 1), (4 * h + 3, 4 * w + 3)]
    highs = [code.new_zeros(len(code), 3 * c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    return WaveletCode(code, *highs)


def alexnet_wavelet_decoder(name: str, feature_shape: Shapes, image_shape: Shapes) -> WaveletDecoder:
    """The decoder of AlexNet with wavelet pooling, 2,574,778 parameters; `name` says at which sides it pads.

    `alexnet-wavelet` pads at the left and the bottom, as the authors' code does, though analysis lost the right column
    and the bottom row; `alexnet-wavelet-right` pads at the right and the bottom. Spectral norm on every convolution, as
    in the authors' script (the count is the same without). Images have sides of 32(h + 1) for codes of h×w: any
    multiple of 32 from 64 on. Raises InputError for other shapes.
    """
    features = checked_shape(feature_shape or (256, 6, 6), "feature_shape")
    image = checked_shape(image_shape or (3, 224, 224), "image_shape")
    if features[0] != CHANNELS[0] or image != (3, 32 * (features[1] + 1), 32 * (features[2] + 1)):
        raise InputError(
            f"decoder {name} turns codes of 256×h×w into images of 3×32(h+1)×32(w+1), not {show(features)} into "
            f"{show(image)}: use the encoder alexnet-wavelet at width 1, and images whose sides are multiples of 32 "
            "from 64 px on"
        )
    left = {"alexnet-wavelet": 1, "alexnet-wavelet-right": 0}[name]
    pad, pad2 = (nn.ReflectionPad2d((n * left, n * (1 - left), 0, n)) for n in (1, 2))
    rows = [
        *conv(256, 256),
        *[HaarUnpool(), *conv(256, 256), pad, *conv(256, 256), *conv(256, 192)],
        *[HaarUnpool(), pad, *conv(192, 128), *conv(128, 64)],
        *[HaarUnpool(), pad2, *conv(64, 64)],
        *[nn.Upsample(scale_factor=2), *conv(64, 32), *conv(32, 32)],
        *[nn.Upsample(scale_factor=2), *conv(32, 3)],
    ]
    layers = nn.Sequential(*rows)
    finish(layers, 3, 3, spectral=True)
    return WaveletDecoder(name, layers, features, image)
