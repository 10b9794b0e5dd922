"""The paper's decoders ("generators") as layouts: Tables A4, A6 and A7, the authors' variants, and their kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from arae.errors import InputError
from arae.models.blocks import Decoder, Shapes, add, conv, finish, show, tconv
from arae.models.registry import Shape, checked_shape

Kind = Literal["conv", "grow", "double", "nearest"]
IMAGE = 0  # in place of a width: the image's channels


@dataclass(frozen=True)
class Layout:
    """Blocks in a row, then a 3×3 convolution with a bias and tanh; all convolutions are spectrally normalised.

    A step is a block and its width at `features` channels; for other numbers of channels the widths go in proportion.
    `conv`: 3×3. `grow`: 4×4 transposed, stride 1, one pixel more. `double`: 4×4 transposed, stride 2. All three with
    batch norm and ReLU, without bias. `nearest`: every pixel four times.
    """

    features: Shape
    image: Shape
    steps: tuple[tuple[Kind, int], ...]

    def shapes(self, name: str, feature_shape: Shapes, image_shape: Shapes) -> tuple[Shape, Shape]:
        """Both shapes, the layout's own in place of None.

        Raises InputError where the layers fall short of the image, or exceed it by a whole feature or more.
        """
        features = checked_shape(feature_shape or self.features, "feature_shape")
        image = checked_shape(image_shape or self.image, "image_shape")
        grown = sum(kind == "grow" for kind, _ in self.steps)
        factor = 2 ** sum(kind in ("double", "nearest") for kind, _ in self.steps)
        height, width = ((side + grown) * factor for side in features[1:])
        if not (0 <= height - image[1] < factor and 0 <= width - image[2] < factor):
            raise InputError(
                f"{name} makes {height}×{width} px of features {show(features)}, not {show(image)}: use images whose "
                f"sides are multiples of {factor} with the encoder it is made for, or the decoder mirror"
            )
        return features, image

    def build(self, name: str, feature_shape: Shapes, image_shape: Shapes) -> Decoder:
        """The decoder, with random weights; errors as in `shapes`."""
        features, image = self.shapes(name, feature_shape, image_shape)
        layers, channels = nn.Sequential(), features[0]
        for kind, step in self.steps:
            width = image[0] if step == IMAGE else max(1, round(step * features[0] / self.features[0]))
            if kind == "nearest":
                add(layers, [nn.Upsample(scale_factor=2, mode="nearest")])
                continue
            add(layers, conv(channels, width) if kind == "conv" else tconv(channels, width, 1 if kind == "grow" else 2))
            channels = width
        finish(layers, channels, image[0], spectral=True)
        return Decoder(name, layers, features, image)


_ALEXNET, _PHOTO, _CIFAR = (256, 6, 6), (3, 224, 224), (3, 32, 32)

LAYOUTS = {
    # The authors' code, 4,753,370 parameters (Table 7's 4.7 M): the transposed convolutions drop channels.
    "alexnet-conv5": Layout(_ALEXNET, _PHOTO, (
        ("conv", 256), ("grow", 256), ("conv", 256), ("double", 256), ("conv", 256), ("double", 128),
        ("conv", 128), ("double", 64), ("conv", 64), ("double", 32), ("conv", 32), ("double", IMAGE),
    )),
    # Table A4 as it is printed, 5,651,258 parameters: the 3×3 convolutions drop channels.
    "alexnet-conv5-printed": Layout(_ALEXNET, _PHOTO, (
        ("conv", 256), ("grow", 256), ("conv", 256), ("double", 256), ("conv", 256), ("double", 256), ("conv", 128),
        ("double", 128), ("conv", 64), ("double", 64), ("conv", 32), ("double", 32), ("conv", IMAGE),
    )),
    # Table A4 with nearest neighbours in place of the transposed convolutions of stride 2, 3,208,570 parameters.
    "alexnet-conv5-interp": Layout(_ALEXNET, _PHOTO, (
        ("conv", 256), ("grow", 256), ("conv", 256), ("nearest", 0), ("conv", 256), ("nearest", 0), ("conv", 128),
        ("nearest", 0), ("conv", 64), ("nearest", 0), ("conv", 32), ("nearest", 0), ("conv", IMAGE),
    )),
    # Table A7, 1,320,442 parameters.
    "alexnet-conv2": Layout((192, 13, 13), _PHOTO, (
        ("conv", 192), ("grow", 192), ("conv", 96), ("nearest", 0), ("conv", 96), ("conv", 64), ("nearest", 0),
        ("conv", 64), ("nearest", 0), ("conv", 64), ("nearest", 0), ("conv", 32), ("conv", IMAGE),
    )),
    # Table A6, 209,578 parameters.
    "alexnet-conv1": Layout((64, 27, 27), _PHOTO, (
        ("conv", 64), ("grow", 64), ("conv", 64), ("nearest", 0), ("conv", 64), ("conv", 32),
        ("nearest", 0), ("conv", 32), ("nearest", 0), ("conv", 16), ("conv", IMAGE),
    )),
    # The paper has no table for these three. Assumed: the authors' conv5 layout (a 3×3 convolution, then a doubling,
    # the last one to the image's channels), no growth, for the sizes fit without; and after each doubling the width
    # that the encoder has at that size.
    "vgg16-conv5_1": Layout((512, 14, 14), _PHOTO, (
        ("conv", 512), ("double", 512), ("conv", 512), ("double", 256), ("conv", 256), ("double", 128),
        ("conv", 128), ("double", IMAGE),
    )),
    "resnet18-cifar-layer4": Layout((512, 4, 4), _CIFAR, (
        ("conv", 512), ("double", 256), ("conv", 256), ("double", 128), ("conv", 128), ("double", IMAGE),
    )),
    "wrn-28-10-block3": Layout((640, 8, 8), _CIFAR, (
        ("conv", 640), ("double", 320), ("conv", 320), ("double", IMAGE),
    )),
}  # fmt: skip
"""By the names of `create_decoder`."""
