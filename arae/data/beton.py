"""`.beton` files without FFCV: their layout, the manifest beside them, and the checks that come before any reading.

FFCV's reader trusts the file: on a truncated or foreign one it allocates without bound or crashes. So the header, the
sample table and the allocation table are checked here first (layout: FFCV 1.0, format version 2).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from arae.config import Part
from arae.errors import InputError

FORMAT_VERSION = 2
SHA256_BYTES = 2 << 30  # files up to this size are hashed whenever they are opened
RAW, JPEG = 1, 0
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("n", "<u8"), ("table", "<u8")], align=True)
FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
TYPES = (2, 1)  # an RGB image, then an integer
_AGAIN = "write it again with `arae encode`"


class Manifest(Part):
    """What `DEST.json` beside a `.beton` says."""

    source: str
    split: Literal["train", "test", "all"]
    options: dict[str, Any]
    """Every option of the encoding."""
    fingerprint: str
    """SHA-256 of source listing and options: equal means that encoding again would give the same images."""
    versions: dict[str, str]
    sha256: str
    bytes: int
    n: int
    channels: Literal[1, 3]
    """1 where grey was written as RGB."""
    height: tuple[int, int]
    """Smallest and largest, pixels, as written."""
    width: tuple[int, int]
    classes: tuple[str, ...]
    counts: dict[str, int]
    """Images of each class."""
    converted: dict[str, int]
    """Images that were grey, palette, alpha, cmyk, 16-bit, exif-rotated or animated."""
    skipped: tuple[tuple[str, str], ...]
    """Files that were left out, and why."""
    time: str
    """When it was written, ISO, UTC."""


@dataclass(frozen=True)
class Beton:
    """A `.beton` that passed the checks."""

    path: Path
    n: int
    heights: np.ndarray
    """int64 [n], pixels."""
    widths: np.ndarray
    labels: np.ndarray
    """int64 [n]."""
    modes: np.ndarray
    """uint8 [n]: 0 JPEG, 1 raw."""
    pointers: np.ndarray
    """int64 [n]: where in the file an image's bytes begin."""
    fields: tuple[str, str]
    """Names of the image and the label field."""
    classes: tuple[str, ...]
    channels: Literal[1, 3] | None
    """From the manifest; None without one."""

    @property
    def constant_shape(self) -> tuple[int, int] | None:
        """(height, width) where all images have the same."""
        if self.heights.min() == self.heights.max() and self.widths.min() == self.widths.max():
            return int(self.heights[0]), int(self.widths[0])
        return None

    def holds(self, size: tuple[int, int], rows: np.ndarray) -> bool:
        """Whether the samples `rows` lie in the file as pixels of this (height, width), so that `pixels` has them."""
        return self.constant_shape == size and bool((self.modes[rows] == RAW).all())

    def pixels(self, rows: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
        """The raw samples `rows`, int64 [m], of one size: `chunk` at a time, uint8 [≤ chunk, H, W, 3].

        The file is opened once, so that one that takes its place meanwhile is not mixed in. InputError where it has
        become shorter.
        """
        assert self.constant_shape is not None
        with self.path.open("rb") as file:
            for start in range(0, len(rows), chunk):
                pointers = self.pointers[rows[start : start + chunk]].tolist()
                images = np.empty((len(pointers), *self.constant_shape, 3), np.uint8)
                for image, pointer in zip(images, pointers, strict=True):
                    if os.preadv(file.fileno(), [image.data], pointer) != image.nbytes:
                        raise InputError(f"{self.path} has become shorter while it was read; {_AGAIN}")
                yield images


def manifest_path(path: Path) -> Path:
    """`train.beton` → `train.beton.json`."""
    return path.with_name(path.name + ".json")


def read_manifest(path: Path, what: str = "") -> Manifest | None:
    """The manifest beside a `.beton`; None where there is none; InputError where it is not a manifest."""
    beside = manifest_path(path)
    if not beside.exists():
        return None
    try:
        return Manifest.model_validate(json.loads(beside.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        where = f"{what}: {beside}" if what else str(beside)
        raise InputError(f"{where}: not a manifest ({' '.join(str(error).split())[:160]}); {_AGAIN}") from None


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, what: str = "") -> Beton:
    """Check a `.beton` and its manifest, all but the pixels; InputError starts with `what` (`data.train`) and the path.

    Refused: not a `.beton`, truncated, another size, hash (files up to 2 GiB), count or shape than the manifest's, a
    label that is no class.
    """
    where = f"{what}: {path}" if what else str(path)
    manifest = read_manifest(path, what)
    size = path.stat().st_size
    if manifest and manifest.bytes != size:
        raise InputError(
            f"{where} has {size} bytes, its manifest says {manifest.bytes}: truncated or changed; {_AGAIN}"
        )
    table, fields, samples = _tables(path, size, where)
    _check_data(path, table, samples, where)
    if manifest and size <= SHA256_BYTES and sha256_of(path) != manifest.sha256:
        raise InputError(f"{where} is not the file that its manifest describes (another SHA-256); {_AGAIN}")
    labels = samples["label"].astype(np.int64)
    classes = manifest.classes if manifest else tuple(map(str, range(max(0, int(labels.max())) + 1)))
    if labels.min() < 0 or labels.max() >= len(classes):
        low, high = int(labels.min()), int(labels.max())
        raise InputError(f"{where} has labels from {low} to {high}, out of range for {len(classes)} classes; {_AGAIN}")
    heights, widths = (samples["image"][side].astype(np.int64) for side in ("height", "width"))
    if manifest and (len(samples), *_span(heights), *_span(widths)) != (
        manifest.n,
        *manifest.height,
        *manifest.width,
    ):
        raise InputError(f"{where} has other images than its manifest says (count or resolution); {_AGAIN}")
    modes, pointers = samples["image"]["mode"].copy(), samples["image"]["pointer"].astype(np.int64)
    channels = manifest.channels if manifest else None
    return Beton(path, len(samples), heights, widths, labels, modes, pointers, fields, classes, channels)


def _tables(path: Path, size: int, where: str) -> tuple[int, tuple[str, str], np.ndarray]:
    start = HEADER.itemsize + len(TYPES) * FIELD.itemsize
    if size < start:
        raise InputError(f"{where} is not a .beton file ({size} bytes); {_AGAIN}")
    header = np.fromfile(path, HEADER, count=1)[0]
    page = int(header["page"])
    if header["version"] != FORMAT_VERSION or page < 1 << 21 or page & (page - 1):
        raise InputError(f"{where} is not a .beton file of FFCV's format {FORMAT_VERSION}; {_AGAIN}")
    if header["fields"] != len(TYPES):
        raise InputError(f"{where} has {header['fields']} fields; an image and a label are needed; {_AGAIN}")
    fields = np.fromfile(path, FIELD, count=len(TYPES), offset=HEADER.itemsize)
    if tuple(fields["type"]) != TYPES:
        raise InputError(f"{where} has other fields than an RGB image and an integer label; {_AGAIN}")
    n, table = int(header["n"]), int(header["table"])
    if table == 0:
        raise InputError(f"{where} was never finished; {_AGAIN}")
    if n < 1 or start + n * SAMPLE.itemsize > table or table + n * ALLOCATION.itemsize != size:
        raise InputError(f"{where} is truncated or damaged: {size} bytes can't hold its {n} images; {_AGAIN}")
    names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"]]
    return table, (names[0], names[1]), np.fromfile(path, SAMPLE, count=n, offset=start)


def _check_data(path: Path, table: int, samples: np.ndarray, where: str) -> None:
    """Every image's bytes lie inside the data region, and are as many as its shape needs."""
    images = samples["image"]
    allocations = np.fromfile(path, ALLOCATION, offset=table)
    data_start = HEADER.itemsize + len(TYPES) * FIELD.itemsize + samples.nbytes
    by_sample = allocations[np.argsort(allocations["sample"], kind="stable")]
    area = images["height"].astype(np.uint64) * images["width"]
    raw = images["mode"] == RAW
    good = (
        np.array_equal(by_sample["sample"], np.arange(len(samples), dtype=np.uint64))
        and np.array_equal(by_sample["pointer"], images["pointer"])
        and bool((by_sample["pointer"] >= data_start).all())
        and bool((by_sample["size"] <= table).all() and (by_sample["pointer"] <= table - by_sample["size"]).all())
        and bool((images["mode"] <= RAW).all() and area.all() and by_sample["size"].all())
        and np.array_equal(by_sample["size"][raw], area[raw] * 3)
    )
    if not good:
        raise InputError(f"{where} is damaged: its tables contradict each other; {_AGAIN}")


def _span(values: np.ndarray) -> tuple[int, int]:
    return int(values.min()), int(values.max())
