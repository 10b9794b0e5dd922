"""Images to and from files, and grids of them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arae.data.augment import to_float
from arae.data.images import UnusableImageError, fit, open_rgb
from arae.data.load import to_channels
from arae.errors import InputError
from arae.files import write_bytes
from arae.metrics import psnr
from arae.models.autoencoder import Autoencoder


def to_image(x: Tensor) -> Image.Image:
    """One image [1 or 3, H, W] float in [0, 1] as 8-bit PIL, rounded to the nearest level."""
    levels = (x.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def grid(rows: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Rows of images [k, C, H, W] as one image [C, …] on white, `gap` pixels apart."""
    k, channels, height, width = rows[0].shape
    sheet = torch.ones(channels, len(rows) * (height + gap) - gap, k * (width + gap) - gap)
    for r, row in enumerate(rows):
        for c, image in enumerate(row.detach().float().cpu()):
            top, left = r * (height + gap), c * (width + gap)
            sheet[:, top : top + height, left : left + width] = image
    return sheet


def save_png(x: Tensor, path: Path) -> None:
    """Write one image [1 or 3, H, W] as PNG, all or nothing."""
    buffer = io.BytesIO()
    to_image(x).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """An image file as float [C, H, W] in [0, 1], read as `arae encode` reads it: upright, cropped to a square `shape`.

    Raises InputError where it is missing or not an image.
    """
    channels, side, _ = shape
    if not path.is_file():
        raise InputError(f"{path}: no such image file")
    try:
        image = fit(open_rgb(path)[0], side, crop=True)
    except UnusableImageError as error:
        raise InputError(f"{path}: not a readable image ({error})") from None
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return to_float(to_channels(levels, channels))[0]


def reconstruct_files(model: Autoencoder, paths: Sequence[Path], out: Path) -> Iterator[tuple[Path, float]]:
    """Write `<out>/<name>-reconstruction.png`, original and reconstruction side by side, for each image.

    Yields each picture's path and the PSNR (dB). Raises InputError for the first file that is no image, before anything
    is written; no image file given is ever written over.
    """
    images = [read_image(path, model.image_shape) for path in paths]
    out.mkdir(parents=True, exist_ok=True)
    taken = {path.resolve() for path in paths}
    for path, x in zip(paths, images, strict=True):
        target = free_name(out, f"{path.stem}-reconstruction", taken)
        taken.add(target.resolve())
        again = model.reconstruct(x[None])
        quality = psnr(again, x[None]).item()  # a reconstruction that is no image is refused before it is written
        save_png(grid([torch.cat([x[None], again])]), target)
        yield target, quality


def free_name(folder: Path, stem: str, taken: set[Path]) -> Path:
    """`<folder>/<stem>.png`, numbered where that is taken."""
    names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    return next(p for p in (folder / f"{name}.png" for name in names) if p.resolve() not in taken)
