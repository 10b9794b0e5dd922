"""Image files: listing a folder, and turning any ugly image into 8-bit RGB of the wanted size."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from arae.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TRAIN_FOLDERS = ("train", "training")
SPLIT_FOLDERS = (*TRAIN_FOLDERS, "test", "testing", "val", "valid", "validation")
MAX_SIDE = 65_535  # .beton files hold sides as 16-bit numbers
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Folder(NamedTuple):
    """The image files of one split of a folder, sorted by path."""

    root: Path
    paths: tuple[str, ...]
    """Relative to `root`, with forward slashes."""
    labels: np.ndarray
    """int64 [N]."""
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    """Files that are not used, and why."""


class UnusableImageError(Exception):
    """This image can't be used; the text says why."""


def list_folder(root: Path, split: Literal["train", "test", "all"], held_out: Sequence[str]) -> Folder:
    """The images under `root`/<class>/…, or of folders `train` (`training`) and one of `held_out`, where they are.

    Without splits of its own, the files whose path hashes to a tenth are `test`: a choice that stays as files are
    added. A folder of images without class folders is one class. InputError where the split has no image.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a folder of images, or with one sub-folder of them a class")
    parts = _split_folders(root, held_out)
    files = _walk(root)
    named = [path for path in files if path.lower().endswith(SUFFIXES)]
    skipped = [(path, "not an image by its name") for path in files if not path.lower().endswith(SUFFIXES)]
    depth = 1 if parts else 0
    classes = sorted({path.split("/")[depth] for path in named if path.count("/") > depth and _part_of(path, parts)})
    chosen, labels = [], []
    for path in named:
        if split not in ("all", _part_of(path, parts)):
            continue
        pieces = path.split("/")[depth:]
        if classes and len(pieces) == 1:
            skipped.append((path, "in no class folder"))
            continue
        chosen.append(path)
        labels.append(classes.index(pieces[0]) if classes else 0)
    if not chosen:
        raise InputError(f"{root}: no image for split {split!r} among {len(files)} files ({_examples(skipped)})")
    return Folder(root, tuple(chosen), np.array(labels, np.int64), tuple(classes or ["images"]), tuple(skipped))


def open_rgb(path: Path) -> tuple[Image.Image, set[str]]:
    """The image as upright 8-bit RGB, and what was converted.

    That is any of grey, palette, alpha, cmyk, 16-bit, exif-rotated, animated. Transparency is put on white; of an
    animation the first frame is taken; 16-bit levels are scaled, not clipped.
    Raises UnusableImageError with the reason for anything that doesn't decode to its last byte.
    """
    try:
        if not path.stat().st_size:
            raise UnusableImageError("empty file")
        with Image.open(path) as image:
            if max(image.size) > MAX_SIDE or image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise UnusableImageError(f"too large: {image.width} × {image.height} pixels")
            # Of 16-bit colour Pillow keeps the high byte, which is right; `tile` is known only before loading.
            notes = {"16-bit"} if ";16" in str(image.tile) else set()
            if getattr(image, "n_frames", 1) > 1:
                notes.add("animated")
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
            image.load()
            rgb = _to_rgb(image, notes)
    except UnusableImageError:
        raise
    except Exception as error:  # noqa: BLE001 -- decoders fed with a broken file may raise anything; the file is listed
        raise UnusableImageError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    if turn is not None:
        rgb = rgb.transpose(turn)
        notes.add("exif-rotated")
    return rgb, notes


def fit(image: Image.Image, size: int | None, *, crop: bool) -> Image.Image:
    """Bound the shorter side by `size` pixels (only downwards), or with `crop` cut and scale to a square of `size`.

    Bicubic with antialiasing; the aspect is kept.
    """
    if size is None or image.size == (size, size):
        return image
    if crop:
        return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    width, height = image.size
    short = min(width, height)
    if short <= size:
        return image
    return image.resize((round(width * size / short), round(height * size / short)), Image.Resampling.BICUBIC)


def fit_array(image: np.ndarray, size: int | None, *, crop: bool) -> np.ndarray:
    """`fit` for uint8 [H, W] or [H, W, 3]."""
    if size is None or image.shape[:2] == (size, size):
        return image
    return np.asarray(fit(Image.fromarray(image), size, crop=crop))


def _to_rgb(image: Image.Image, notes: set[str]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep(image, notes)
    if image.mode in ("P", "PA"):
        notes.add("palette")
    if image.mode in ("1", "L", "LA", "La"):
        notes.add("grey")
    if image.mode == "CMYK":
        notes.add("cmyk")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        notes.add("alpha")
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image, notes: set[str]) -> Image.Image:
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 65_535:
        raise UnusableImageError(
            f"values of mode {image.mode} from {levels.min()} to {levels.max()} have no known white"
        )
    notes |= {"grey", "16-bit"}
    return Image.fromarray(((levels.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")


def _split_folders(root: Path, held_out: Sequence[str]) -> dict[str, str]:
    """Folder name → split, where `root` is divided by folders; empty where it is not."""
    names = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    test = next((name for name in held_out if name in names), None)
    train = next((name for name in TRAIN_FOLDERS if name in names), None)
    if train is None or test is None or not names <= set(SPLIT_FOLDERS):
        return {}
    return {train: "train", test: "test"}


def _part_of(path: str, parts: dict[str, str]) -> str | None:
    if parts:
        return parts.get(path.split("/")[0])
    return "test" if int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 10 == 0 else "train"


def _walk(root: Path) -> list[str]:
    """Every file under `root`, links followed once, as sorted relative paths."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, names, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names.sort()
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in files]
    return sorted(found)


def _examples(skipped: list[tuple[str, str]]) -> str:
    shown = "; ".join(f"{path}: {why}" for path, why in skipped[:3])
    return shown or f"images end in {', '.join(SUFFIXES)} and lie in one folder a class"
