"""Augmentation on the device, in batches: a function of (seed, epoch, sample), whatever batch a sample comes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arae.by_image import image_by_image, large
from arae.seeds import mix, mix_tensor


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 levels to float32 in [0, 1], contiguous; the shape stays."""
    return _float(images.contiguous())


def augment(images: torch.Tensor, ids: torch.Tensor, kinds: Sequence[str], pad: int, seed: int) -> torch.Tensor:
    """Flip and shift a batch: uint8 [m, C, H, W] to float32 [m, C, H, W] in [0, 1], on the images' device.

    Channels-last images stay so, and shifted ones become so: to transpose them would take longer than all else.

    `ids` are int64 [m] (epoch * n + index). `flip` mirrors with p = 1/2; `shift` moves by up to `pad` pixels each way,
    edges repeated. `crop` belongs to the decoder and is passed over.
    """
    ids = ids.to(images.device)
    flip = mix_tensor(mix(seed, "flip"), ids) & 1 == 1 if "flip" in kinds else None
    reach = pad if "shift" in kinds else 0
    if not reach:
        return _float(images, flip)
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device).expand(len(ids), -1)
    columns = torch.arange(width, device=images.device).expand(len(ids), -1)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    if reach:
        rows = (rows + _offset(seed, "down", ids, reach)).clamp(0, height - 1)
        columns = (columns + _offset(seed, "right", ids, reach)).clamp(0, width - 1)
    batch = torch.arange(len(ids), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return _float(moved.permute(0, 3, 1, 2))


def _flipped(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Images [m, C, H, W], those of `flip` bool [m] mirrored.

    Whole images are copied from among all and all mirrored: less work than gathering pixels, and on a GPU no wait for
    the device to count.
    """
    last = images.is_contiguous(memory_format=torch.channels_last)
    rows = images.permute(0, 2, 3, 1) if last else images
    both = torch.cat([rows, rows.flip(2 if last else 3)])
    order = torch.arange(len(images), device=images.device) + len(images) * flip
    chosen = both.index_select(0, order)
    return chosen.permute(0, 3, 1, 2) if last else chosen


def _float(images: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """Images in [0, 1], those of `flip` bool [m] mirrored; the order of their bytes stays."""
    if flip is None:
        return image_by_image(_divided, images, dtype=torch.float32)
    return image_by_image(_turned if large(images) else _turned_together, images, flip, dtype=torch.float32)


def _divided(images: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(images).div_(255)


def _turned(images: torch.Tensor, flip: torch.Tensor, out: torch.Tensor) -> None:
    """For large images, whose copies cost more than to ask which of them are to be mirrored."""
    for image, turn, made in zip(images, flip.tolist(), out, strict=True):
        made.copy_(image.flip(-1) if turn else image)
    out.div_(255)


def _turned_together(images: torch.Tensor, flip: torch.Tensor, out: torch.Tensor) -> None:
    _divided(_flipped(images, flip), out)


def _offset(seed: int, name: str, ids: torch.Tensor, reach: int) -> torch.Tensor:
    """Uniform over -reach .. reach, int64 [m, 1]."""
    return (mix_tensor(mix(seed, name), ids) % (2 * reach + 1) - reach)[:, None]
