"""Images that come as arrays: idx, `.npz`, CIFAR's binary batches, SVHN's `.mat`. No foreign file is unpickled."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from arae.errors import InputError
from arae.seeds import mix, mix_array

_IMAGE_KEYS = ("images", "x", "X", "data")
_LABEL_KEYS = ("labels", "y", "Y", "targets")


class Arrays(NamedTuple):
    """Images with labels, in memory."""

    images: np.ndarray
    """uint8 [N, H, W] (grey) or [N, H, W, 3] (RGB)."""
    labels: np.ndarray
    """int64 [N]."""
    classes: tuple[str, ...]
    """Names in the order of the labels."""

    @property
    def channels(self) -> Literal[1, 3]:
        """1 grey, 3 RGB."""
        return 1 if self.images.ndim == 3 else 3


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes (LeCun's format, gzipped or not): uint8 of the shape that the header gives."""
    raw = _bytes(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != 8 or not raw[3]:
        raise InputError(f"{path}: not an idx file of unsigned bytes; give the idx (or idx.gz) file as published")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) != start + math.prod(shape):
        raise InputError(
            f"{path}: truncated: the header promises {math.prod(shape)} bytes of data, {len(raw) - start} are there; "
            f"obtain the file again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_idx_pair(images: Path, labels: Path) -> Arrays:
    """The images and labels of two idx files; classes are named by their numbers."""
    return checked(read_idx(images), read_idx(labels), None, f"{images},{labels}")


def read_npz(path: Path, split: Literal["train", "test", "all"] = "all") -> Arrays:
    """Images and labels of an `.npz`: `images`/`labels` or `x`/`y`, with `_train`/`_test` where it holds both.

    An array `classes` names the classes. Without parts of its own, `train` and `test` are a fixed 90 / 10 division by
    hash of the position.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: can't be read as .npz ({_brief(error)})") from None
    names = [str(name) for name in held["classes"]] if "classes" in held else None
    parts = {part: _keys(held, part) for part in ("train", "test")}
    if all(parts.values()):
        wanted = [parts[part] for part in (("train", "test") if split == "all" else (split,))]
        pairs = [(held[x], held[y]) for x, y in filter(None, wanted)]
        images, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
        return checked(images, labels, names, str(path))
    whole = _keys(held, "")
    if whole is None:
        raise InputError(
            f"{path}: has {', '.join(held) or 'nothing'}; arrays named images and labels (or x and y) are needed"
        )
    read = checked(held[whole[0]], held[whole[1]], names, str(path))
    return read if split == "all" else divided(read, split)


def read_cifar_binary(path: Path) -> Arrays:
    """A batch of CIFAR-10's binary version: rows of one label byte and 3,072 bytes of RGB planes."""
    raw = np.frombuffer(_bytes(path), np.uint8)
    if not raw.size or raw.size % 3073:
        raise InputError(f"{path}: {raw.size} bytes is not a whole number of CIFAR-10 images; obtain the file again")
    rows = raw.reshape(-1, 3073)
    return checked(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], None, str(path))


def read_svhn(path: Path) -> Arrays:
    """A file of SVHN's cropped digits (MATLAB 5); needs scipy. The label 10 stands for the digit 0."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(f"{path}: reading .mat needs scipy (pip install scipy); or name an .npz of the set") from None
    try:
        held = loadmat(path)
        images, labels = held["X"], held["y"]
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise InputError(f"{path}: can't be read as SVHN's cropped digits ({_brief(error)})") from None
    return checked(images.transpose(3, 0, 1, 2), labels.reshape(-1) % 10, None, str(path))


def divided(read: Arrays, split: Literal["train", "test"]) -> Arrays:
    """The `train` (90 %) or `test` (10 %) part of arrays without splits of their own: a fixed choice by position."""
    held_out = mix_array(mix("hold-out"), np.arange(len(read.labels))) % 10 == 0
    chosen = held_out if split == "test" else ~held_out
    return Arrays(read.images[chosen], read.labels[chosen], read.classes)


def checked(images: np.ndarray, labels: np.ndarray, classes: list[str] | None, where: str) -> Arrays:
    """Arrays in the one layout; InputError for other types, shapes, counts, or labels out of range."""
    if images.dtype != np.uint8:
        raise InputError(f"{where}: images are {images.dtype}; they must be uint8, 0 to 255")
    if images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if (images.ndim != 3 and not (images.ndim == 4 and images.shape[-1] == 3)) or 0 in images.shape:
        raise InputError(f"{where}: images have shape {images.shape}; [N, H, W] or [N, H, W, 3] with N > 0 is needed")
    if labels.shape != (len(images),) or labels.dtype.kind not in "ui":
        raise InputError(
            f"{where}: {len(images)} images need as many whole-number labels, not {labels.dtype} {labels.shape}"
        )
    labels = labels.astype(np.int64)
    count = len(classes) if classes is not None else int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= count:
        raise InputError(f"{where}: labels run from {labels.min()} to {labels.max()}, out of range for {count} classes")
    return Arrays(np.ascontiguousarray(images), labels, tuple(classes or map(str, range(count))))


def _keys(held: dict[str, np.ndarray], part: str) -> tuple[str, str] | None:
    found = []
    for names in (_IMAGE_KEYS, _LABEL_KEYS):
        spellings = [s for n in names for s in ((f"{n}_{part}", f"{part}_{n}") if part else (n,))]
        found.append(next((s for s in spellings if s in held), None))
    return (found[0], found[1]) if found[0] and found[1] else None


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: can't be read ({_brief(error)}); obtain the file again") from None


def _brief(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(str(text).split())[:200] or type(error).__name__
