"""Images to and from files, and grids of them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from arae.errors import InputError
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
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """An image file as float [C, H, W] in [0, 1]: upright, shorter side resized, centre cropped to `shape`.

    Raises InputError where it is missing or not an image.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error})") from None
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1).contiguous()


def reconstruct_files(model: Autoencoder, paths: Sequence[Path], out: Path) -> Iterator[tuple[Path, float]]:
    """Write `<out>/<name>.png`, original and reconstruction side by side, for each image; yields path and PSNR (dB).

    Raises InputError for the first file that is no image, before anything is written.
    """
    images = [read_image(path, model.image_shape) for path in paths]
    out.mkdir(parents=True, exist_ok=True)
    for number, (path, x) in enumerate(zip(paths, images, strict=True)):
        again = model.reconstruct(x[None])
        twin = any(other.stem == path.stem for other in paths[:number])
        target = out / f"{path.stem}{f'-{number}' if twin else ''}.png"
        save_png(grid([torch.cat([x[None], again])]), target)
        yield target, psnr(again, x[None]).item()
