"""What every decoder is made of: the blocks, the last layers with their initialisation, and the crop to image size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from arae.errors import InputError
from arae.models.recompute import cuts, in_parts
from arae.models.registry import Shape
from arae.models.spectral import normalise_spectrum

Shapes = Sequence[int] | None  # None: as the name of the network fixes it


class Decoder(nn.Module):
    """Layers that end in tanh, cropped at the centre to the image's size and mapped to [0, 1] by (t + 1) / 2.

    Fully convolutional: features of any size are decoded. The crop found for `feature_shape` and `image_shape` (so many
    rows and columns at the top and left, so many in all) is kept at every other size, so that a pixel stays where it
    was when the image grows to the right and the bottom. Raises InputError where the layers fall short of the image.
    """

    def __init__(self, name: str, layers: nn.Sequential, feature_shape: Shape, image_shape: Shape) -> None:
        super().__init__()
        self.name, self.feature_shape, self.image_shape = name, feature_shape, image_shape
        self.layers = layers
        self.ends: tuple[int, ...] = ()
        height, width = natural_size(layers, feature_shape[1], feature_shape[2])
        self.crop = height - image_shape[1], width - image_shape[2]
        if min(self.crop) < 0:
            raise InputError(
                f"decoder {name} makes {height}×{width} px of features {show(feature_shape)}, less than the images' "
                f"{show(image_shape)}: use the decoder mirror, or images of that size"
            )

    def recompute(self, parts: int) -> None:
        """In training, keep what goes into each of so many parts alone: the rest is computed anew (`recompute`)."""
        channels, sizes = self.feature_shape[0], list[int]()
        for i, layer in enumerate(self.layers, start=1):
            channels = int(getattr(layer, "out_channels", channels))
            height, width = natural_size(self.layers[:i], *self.feature_shape[1:])
            sizes.append(channels * height * width)
        self.ends = cuts(self.layers, sizes, parts)

    def forward(self, z: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] from features z [N, c, h, w]; (H, W) is `output_size(h, w)`."""
        again = len(self.ends) > 1 and self.training and torch.is_grad_enabled()
        t = in_parts(self.layers, z, self.ends) if again else self.layers(z)
        height, width = t.shape[2] - self.crop[0], t.shape[3] - self.crop[1]
        top, left = self.crop[0] // 2, self.crop[1] // 2
        return (t[:, :, top : top + height, left : left + width] + 1) / 2

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the images that features of height×width become.

        Raises InputError where nothing would be left of them.
        """
        full = natural_size(self.layers, height, width)
        size = full[0] - self.crop[0], full[1] - self.crop[1]
        if min(size) < 1:
            raise InputError(
                f"decoder {self.name} makes no image of features of {height}×{width}: it crops {full[0]}×{full[1]} px "
                f"by {self.crop[0]}×{self.crop[1]}; give larger images"
            )
        return size


def natural_size(layers: Iterable[nn.Module], height: int, width: int) -> tuple[int, int]:
    """(H, W) that convolutions, transposed convolutions and upsamplings in a row make of height×width."""
    size = [height, width]
    for layer in layers:
        for axis, side in enumerate(size):
            if isinstance(layer, nn.ConvTranspose2d):
                pad, kernel = int(layer.padding[axis]), layer.kernel_size[axis]
                size[axis] = (side - 1) * layer.stride[axis] - 2 * pad + kernel
            elif isinstance(layer, nn.Conv2d):
                pad, kernel = int(layer.padding[axis]), layer.kernel_size[axis]
                size[axis] = (side + 2 * pad - kernel) // layer.stride[axis] + 1
            elif isinstance(layer, nn.Upsample):
                size[axis] = round(side * float(layer.scale_factor))  # type: ignore[arg-type] -- always one number here
    return size[0], size[1]


def conv(inp: int, out: int) -> list[nn.Module]:
    """3×3 convolution, batch norm, ReLU: the size stays."""
    return [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def tconv(inp: int, out: int, stride: int = 2, kernel: tuple[int, int] = (4, 4)) -> list[nn.Module]:
    """Transposed convolution, batch norm, ReLU; 4×4 doubles the size at stride 2 and adds a pixel at stride 1."""
    layer = nn.ConvTranspose2d(inp, out, kernel, stride=stride, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def add(layers: nn.Sequential, more: Iterable[nn.Module]) -> None:
    """Append the modules."""
    for layer in more:
        layers.append(layer)


def finish(layers: nn.Sequential, inp: int, out: int, *, spectral: bool) -> None:
    """Add the last convolution and tanh, initialise as the authors' code does, then wrap in spectral norm.

    N(0, 0.02) for convolutions, N(1, 0.02) for the scale of batch norms; transposed convolutions keep PyTorch's default
    (the authors' code passes them by).
    """
    add(layers, [nn.Conv2d(inp, out, 3, padding=1), nn.Tanh()])
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        if spectral and isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            normalise_spectrum(layer)


def show(shape: Sequence[int]) -> str:
    """A shape as people write it: 3×224×224."""
    return "×".join(map(str, shape))
