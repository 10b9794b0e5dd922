"""WideResNet-28-10 for small images (Zagoruyko and Komodakis 2016), as the code of TRADES and GAIRAT has it.

Submodules bear the names of that code, so that RobustBench's files load as they are.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from arae.models.classifiers import scaled, small_image_statistics
from arae.models.taps import Encoder

BLOCKS_A_STAGE = 4  # 28 = 6 · 4 + 4
STEM = 16  # channels of the first convolution, at every width


class Block(nn.Module):
    """Two 3×3 convolutions, each after its batch norm and ReLU, added to what came in.

    Where the shapes differ, the shortcut is a 1×1 convolution of the activated input, as the first convolution's is.
    """

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inp), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inp, out, 3, stride=stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(inp, out, 1, stride=stride, bias=False) if inp != out else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, inp, h, w] -> [N, out, h/stride, w/stride]."""
        active = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(self.relu2(self.bn2(self.conv1(active))))


class Stage(nn.Module):
    """Four blocks, the first of which may halve the map."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(Block(inp, out, stride), *(Block(out, out, 1) for _ in range(BLOCKS_A_STAGE - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inp, h, w] -> [N, out, h/stride, w/stride]."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of the given widths. The last map is averaged whole: at 32 px that is the original 8×8 pooling."""

    def __init__(self, num_classes: int, in_channels: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM, 3, padding=1, bias=False)
        self.block1 = Stage(STEM, widths[0], 1)
        self.block2 = Stage(widths[0], widths[1], 2)
        self.block3 = Stage(widths[1], widths[2], 2)
        self.bn1, self.relu = nn.BatchNorm2d(widths[2]), nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[2], num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, math.sqrt(2 / (math.prod(layer.kernel_size) * layer.out_channels)))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of normalised images x [N, C, H, W]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.relu(self.bn1(x)).mean((2, 3)))


def wrn_28_10(num_classes: int, in_channels: int, width: float) -> Encoder:
    """WideResNet-28-10, 36,479,194 parameters for 10 classes; block3, which the paper inverts, is 640×8×8 at 32 px.

    A tap is the output of a whole stage: its last sum, before the batch norm and ReLU that follow it. `width` scales
    the stages alone: .2 is WideResNet-28-2.
    """
    stages = [f"block{i}" for i in range(1, 4)]
    mean, std = small_image_statistics(in_channels)
    return Encoder(
        "wrn-28-10",
        WideResNet(num_classes, in_channels, (scaled(160, width), scaled(320, width), scaled(640, width))),
        layers={stage: stage for stage in stages},
        layer="block3",
        num_classes=num_classes,
        mean=mean,
        std=std,
        published=[(r"^sub_block1\.", None)],  # TRADES' code makes it and never runs it; its files hold it
    )
