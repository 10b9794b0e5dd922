"""Reconstruction in tiles, for images whose features and decoder's activations do not fit in memory.

A tile's reconstruction equals the whole image's wherever no pixel outside the tile has a say: further from the tile's
border than the two networks together reach. And it does so only if the tile begins at a multiple of the networks'
stride; then encoder and decoder, being convolutions, do the same on the tile as on the whole.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arae.errors import InputError
from arae.models.autoencoder import Autoencoder

_FAR = 512  # px by which the encoder's stride is told: a multiple of every power of two that networks use


@dataclass(frozen=True)
class Tiling:
    """How one model's images are cut, in px."""

    side: int
    """Of a tile: a size that comes back from the model as it went in."""
    step: int
    """From one tile to the next: a multiple of the stride."""
    margin: int
    """Width along an inner border of a tile that is thrown away."""
    ramp: int
    """Width beside the margin over which neighbouring tiles are blended, where they overlap."""
    exact: bool
    """Whether nothing outside a tile reaches across its margin: tiled is whole."""


def plan_tiles(model: Autoencoder, largest: int) -> Tiling:
    """The tiling with tiles of at most `largest` px a side.

    Where the networks reach further than such tiles allow (half their side, about), tiles overlap by half and are
    blended, and are not `exact`. InputError: tiles smaller than the model's stride allows, or a tap whose features do
    not follow the image.
    """
    stride = stride_of(model)
    sides = range(largest, max(largest - stride, 4 * stride - 1), -1)
    side = next((s for s in sides if model.fitting_size(s, s) == (s, s)), None)
    if side is None:
        raise InputError(
            f"evaluate.tile = {largest}: this model's tiles need at least {5 * stride} px (5 steps of its features)"
        )
    margin = reach(model, side, stride)
    if margin is not None:
        step = (side - 2 * margin) // stride * stride
        if step > 0:
            return Tiling(side, step, margin, stride, exact=True)
    return Tiling(side, side // 2 // stride * stride, side // 8, side // 4, exact=False)


def reconstruct_tiled(model: Autoencoder, x: Tensor, tiling: Tiling) -> tuple[Tensor, tuple[list[int], list[int]]]:
    """The reconstruction of images [N, C, H, W] of any size, and the rows and columns at which a new tile takes over.

    Images that would not come back at their size are padded and cropped as `Autoencoder.reconstruct` does it. Tiles go
    through the model one by one.
    """
    height, width = x.shape[2:]
    tall, wide = model.fitting_size(height, width)
    padded = F.pad(x, (0, wide - width, 0, tall - height), mode="replicate")
    total, weight = torch.zeros_like(padded), torch.zeros_like(padded[:1, :1])
    rows, columns = (_starts(length, tiling) for length in padded.shape[2:])
    for top in rows:
        for left in columns:
            part = padded[:, :, top : top + tiling.side, left : left + tiling.side]
            h, w = part.shape[2:]
            window = torch.outer(_window(top, h, padded.shape[2], tiling), _window(left, w, padded.shape[3], tiling))
            window = window.to(x.device)
            total[:, :, top : top + h, left : left + w] += model.reconstruct(part) * window
            weight[:, :, top : top + h, left : left + w] += window
    again = (total / weight)[:, :, :height, :width]
    return again, (_seams(rows, height, tiling), _seams(columns, width, tiling))


def seam_ratio(error: Tensor, seams: tuple[list[int], list[int]]) -> Tensor:
    """Mean step of an error [N, C, H, W] across the seams over its mean step between any neighbours, [N].

    The error, reconstruction less image, steps little where the image does much. 1 means that the seams do not show;
    1 also where there is no seam, or no step anywhere.
    """
    down, across = error.diff(dim=2).abs(), error.diff(dim=3).abs()
    rows, columns = (torch.tensor(each, dtype=torch.int64, device=error.device) - 1 for each in seams)
    parts = torch.cat([down[:, :, rows].flatten(1), across[:, :, :, columns].flatten(1)], dim=1)
    if parts.shape[1] == 0:
        return torch.ones(len(error), device=error.device)
    everywhere = torch.cat([down.flatten(1), across.flatten(1)], dim=1).mean(1)
    tiny = torch.finfo(error.dtype).tiny
    return torch.where(everywhere > 0, parts.mean(1) / everywhere.clamp_min(tiny), 1.0)


def stride_of(model: Autoencoder) -> int:
    """Pixels of the image a step of the features: images moved by it have their features moved by one.

    InputError for a tap behind a layer of fixed output size, whose features do not grow with the image.
    """
    channels, *sides = model.image_shape
    side = max(*sides, _FAR)
    grown = [model.encoder.feature_shape((channels, s, s), model.layer)[1] for s in (side, side + _FAR)]
    steps = grown[1] - grown[0]
    if steps < 1 or _FAR % steps:
        raise InputError(
            f"encoder {model.encoder.name}: the features of {model.layer} do not grow with the image in whole steps "
            f"({grown[0]} at {side} px, {grown[1]} at {side + _FAR}), so images can't be cut into tiles: leave "
            "evaluate.tile out"
        )
    return _FAR // steps


def reach(model: Autoencoder, side: int, stride: int) -> int | None:
    """How far from a pixel, in px, its reconstruction's pixels have anything to do with it; None: `side` / 2 or more.

    Told on a copy of the model that passes on nothing but whether pixels differ: what one cell of the stride lights up.
    """
    probe = _lit(model)
    start = side // 2 // stride * stride
    x = torch.zeros(2, model.image_shape[0], side, side, device=model.device)
    x[1, :, start : start + stride, start : start + stride] = 1
    dark, light = probe.reconstruct(x)
    touched = (dark != light).any(0)
    far = 0
    for lines in (touched.any(0), touched.any(1)):
        where = lines.nonzero().flatten().tolist()
        if not where or where[0] == 0 or where[-1] == side - 1:
            return None
        far = max(far, start - where[0], where[-1] - (start + stride - 1))
    return far


def _lit(model: Autoencoder) -> Autoencoder:
    """A copy for a dark image and another: after each layer, 1 where the other differs and 0 elsewhere and in the dark.

    With positive weights alone nothing cancels out.
    """
    probe = copy.deepcopy(model)

    def lit(module: nn.Module, given: tuple[Tensor, ...], made: object) -> Tensor | None:
        if not isinstance(made, Tensor):  # the wavelets' bands, which their next layer sees to
            return None
        # A norm mixes no pixels, but would turn equal channels into nothing.
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
        seen = given[0] if norm else made
        return (seen != seen[:1]).to(made.dtype)

    for network in (probe.encoder, probe.decoder):
        assert network is not None
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.is_floating_point():
                tensor.data.fill_(0 if name.endswith(("bias", "mean")) else 1)
        for name, module in network.named_modules():
            if not list(module.children()) and "parametrizations" not in name:
                module.register_forward_hook(lit)
    return probe


def _starts(length: int, tiling: Tiling) -> list[int]:
    """Where tiles begin along a side; the last ends with it: sizes that come back are multiples of the stride apart."""
    if length <= tiling.side:
        return [0]
    return [*range(0, length - tiling.side, tiling.step), length - tiling.side]


def _window(start: int, length: int, whole: int, tiling: Tiling) -> Tensor:
    """Weights [length] of a tile's lines: 0 in the margins, rising to 1 over the ramps; 1 at the image's borders."""
    index = torch.arange(length, dtype=torch.float32)
    before = torch.full_like(index, torch.inf) if start == 0 else index
    after = torch.full_like(index, torch.inf) if start + length == whole else length - 1 - index
    return ((torch.minimum(before, after) + 1 - tiling.margin) / tiling.ramp).clamp(0, 1)


def _seams(starts: list[int], length: int, tiling: Tiling) -> list[int]:
    """The lines at which tiles begin or end to count."""
    begins = [start + tiling.margin for start in starts[1:]]
    ends = [start + tiling.side - tiling.margin for start in starts[:-1]]
    return sorted({line for line in begins + ends if 0 < line < length})
