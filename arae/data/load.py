"""Loading: one contract, two sources. A source yields uint8 batches for ids; an id is epoch * n + index.

The ids carry the epoch, so augmentation addressed by (seed, epoch, sample) needs nothing else, and any step of any
epoch is entered by asking for its ids.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from arae.config import Augment, Data
from arae.data import arrays, beton, catalog, ffcv_io, staging
from arae.data.arrays import Arrays
from arae.data.images import fit_array
from arae.errors import InputError
from arae.seeds import mix, mix_array

RESIDENT_BYTES = 2 << 30  # `auto` holds what is at most this large


class Source(Protocol):
    """Images and labels of one split."""

    n: int
    """Samples."""
    shape: tuple[int, int, int]
    """Channels, height, width."""
    classes: tuple[str, ...]
    labels: torch.Tensor
    """int64 [n], on the CPU."""

    def batches(self, ids: np.ndarray) -> Iterator[torch.Tensor]:
        """For ids int64 [k, m] (epoch * n + index): k tensors, uint8 [m, C, H, W], on the source's device."""
        ...


class Resident:
    """All images as one uint8 tensor on the device; for sets that fit."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...]) -> None:
        self.images = images
        """uint8 [n, C, H, W]."""
        self.labels = labels
        self.classes = classes
        self.n = len(images)
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def batches(self, ids: np.ndarray) -> Iterator[torch.Tensor]:
        """See `Source.batches`."""
        for row in ids:
            yield self.images[torch.from_numpy(row % self.n).to(self.images.device)]


def stream(n: int, batch: int, seed: int, first_step: int, last_step: int) -> np.ndarray:
    """Ids int64 [steps, batch] of the global steps [first, last) of training on `n` samples.

    The stream is the concatenation over epochs of a permutation that is a function of (seed, epoch); step s takes its
    positions [s * batch, (s + 1) * batch): each sample comes once an epoch, and a batch may span epochs.
    """
    begin, end = first_step * batch, last_step * batch
    if end <= begin:
        return np.empty((0, batch), np.int64)
    epochs = range(begin // n, (end - 1) // n + 1)
    ids = np.concatenate([epoch * n + _permutation(n, seed, epoch) for epoch in epochs])
    offset = begin - epochs[0] * n
    return ids[offset : offset + end - begin].reshape(-1, batch)


def open_source(
    data: Data,
    split: Literal["train", "test"],
    device: torch.device,
    *,
    seed: int = 0,
    workers: int | None = None,
) -> Source:
    """The source of a split as the recipe's `data` says; InputError names the key of what is wrong with its file.

    `seed` addresses random crops; `workers` are decoding threads (default: this process's share of the cores).
    """
    path = _named(data, split)
    if path is None or path.suffix == ".npz":
        return _resident(_arrays(path, data, split), data, split, device)
    return _from_beton(path, data, split, device, seed=seed, workers=workers or default_workers())


def augmented(data: Data, augment: tuple[Augment, ...] | None) -> Data:
    """The data under a stage's own augmentation, where it has one."""
    return data if augment is None else data.model_copy(update={"augment": augment})


class Described(NamedTuple):
    """What `open_source` would open."""

    n: int
    shape: tuple[int, int, int]
    """C, H, W."""
    classes: tuple[str, ...]


def describe(data: Data, split: Literal["train", "test"]) -> Described:
    """Check a split as `open_source` does, all but the pixels of a `.beton`; InputError likewise."""
    path, key = _named(data, split), f"data.{split}"
    if path is None or path.suffix == ".npz":
        source = _resident(_arrays(path, data, split), data, split, torch.device("cpu"))
        return Described(source.n, source.shape, source.classes)
    file = beton.check(path, key)
    n = len(limited(file.n, data.limit if split == "train" else None))
    return Described(n, (_channels(file, data), *_output_size(file, data, key)), file.classes)


def _named(data: Data, split: Literal["train", "test"]) -> Path | None:
    named = data.train if split == "train" else data.test
    if named is None:
        return None
    path = staging.local(named, f"data.{split}")
    if not path.is_file():
        raise InputError(f"data.{split}: {path} is not there; `{_encode_command(data, split, path)}` writes it")
    return path


def _encode_command(data: Data, split: Literal["train", "test"], path: Path | str) -> str:
    known = data.name in catalog.DATASETS and data.name != "images"
    words = ["arae encode", data.name if known else data.source or "/path/to/images", str(path)]
    words += ["split=test"] if split == "test" else []
    words += [f"source={data.source}"] if known and data.source else []
    return " ".join(words)


def same_kind(train: Described, test: Described) -> None:
    """InputError where the held-out images do not belong to the training images: other classes, another shape."""
    if train.shape != test.shape:
        raise InputError(
            f"data.test: images {test.shape}, but data.train has {train.shape}: set data.size, data.channels"
        )
    if train.classes != test.classes:
        raise InputError(
            f"data.test: {len(test.classes)} classes {_brief(test.classes)}, but data.train has {len(train.classes)} "
            f"{_brief(train.classes)}: encode both from one source"
        )


def _brief(names: Sequence[str]) -> str:
    return f"({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def fingerprint(data: Data, split: Literal["train", "test"]) -> str:
    """SHA-256 that tells this split's images from any others, whatever the path they lie at."""
    path = _named(data, split)
    if path is None:
        read = _arrays(None, data, split)
        return hashlib.sha256(read.images.tobytes() + read.labels.tobytes()).hexdigest()
    manifest = beton.read_manifest(path) if path.suffix == ".beton" else None
    return manifest.sha256 if manifest else beton.sha256_of(path)


def _arrays(path: Path | None, data: Data, split: Literal["train", "test"]) -> Arrays:
    if split == "train" and "crop" in data.augment:
        raise InputError("data.augment: random crops are made while a .beton is decoded: encode one, or use shift")
    return arrays.read_npz(path, "all") if path else _catalogue_arrays(data, split, f"data.{split}")


def default_workers() -> int:
    """Decoding threads for this process: its share of the cores, one left for the loop."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // max(1, local) - 1)


def limited(n: int, limit: int | None) -> np.ndarray:
    """At most `limit` of `n` positions, evenly spaced, int64."""
    count = min(n, limit) if limit else n
    return np.arange(count, dtype=np.int64) * n // count


def to_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """uint8 [m, C, H, W] with C = 1 or 3 in the wanted number: grey is repeated; colour becomes luma (ITU-R BT.601)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    red, green, blue = images.to(torch.int32).unbind(1)
    # Weights in 1/65536 that sum to one, so grey written as RGB comes back as it was.
    return ((red * 19_595 + green * 38_470 + blue * 7_471 + 32_768) >> 16).to(torch.uint8)[:, None]


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting hashes, not numpy's shuffle: NumPy doesn't promise its streams from one version to the next.
    return np.argsort(mix_array(mix(seed, "order", epoch), np.arange(n)), kind="stable")


def _catalogue_arrays(data: Data, split: Literal["train", "test"], key: str) -> Arrays:
    dataset = catalog.find(data.name)
    if dataset.kind == "folder":
        written = _encode_command(data, "test" if key == "data.test" else "train", f"{split}.beton")
        raise InputError(f"{key} is not set: `{written}` writes a file for it")
    return catalog.read_arrays(data.name, data.source, split)


def _resident(read: Arrays, data: Data, split: str, device: torch.device) -> Resident:
    rows = limited(len(read.labels), data.limit if split == "train" else None)
    images = read.images[rows]
    if data.size and images.shape[1:3] != (data.size, data.size):
        images = np.stack([fit_array(image, data.size, crop=True) for image in images])
    tensor = torch.from_numpy(images)
    tensor = tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    tensor = to_channels(tensor, data.channels or read.channels).contiguous().to(device)
    return Resident(tensor, torch.from_numpy(read.labels[rows]), read.classes)


def _from_beton(
    path: Path, data: Data, split: Literal["train", "test"], device: torch.device, *, seed: int, workers: int
) -> Source:
    key = f"data.{split}"
    file = beton.check(path, key)
    channels = _channels(file, data)
    size = _output_size(file, data, key)
    train = split == "train"
    crop = train and "crop" in data.augment
    rows = limited(file.n, data.limit if train else None)
    small = len(rows) * channels * size[0] * size[1] <= RESIDENT_BYTES
    if data.loader == "resident" and crop:
        raise InputError("data.loader = resident can't make random crops: use data.loader=ffcv, or leave crop out")
    resident = data.loader == "resident" or (data.loader == "auto" and small and not crop)
    if resident and file.holds(size, rows):  # only to be copied: FFCV takes seconds to start, and a call an image
        return _held(_stored(file, rows), file, rows, (channels, *size), device)
    ffcv_io.need_ffcv(f"{key}: {path}")
    reader = ffcv_io.Decoding(file, size, crop_seed=seed if crop else None, workers=workers)
    if resident:
        return _held(ffcv_io.in_chunks(reader, rows), file, rows, (channels, *size), device)
    return ffcv_io.Ffcv(reader, rows, partial(to_channels, channels=channels), channels, device)


def _stored(file: beton.Beton, rows: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
    """As `ffcv_io.in_chunks`, of raw samples."""
    for number, images in enumerate(file.pixels(rows, ffcv_io.CHUNK)):
        yield number * ffcv_io.CHUNK, torch.from_numpy(images).permute(0, 3, 1, 2)


def _held(
    parts: Iterator[tuple[int, torch.Tensor]],
    file: beton.Beton,
    rows: np.ndarray,
    shape: tuple[int, int, int],
    device: torch.device,
) -> Resident:
    """All samples of `rows`, of this shape (C, H, W); they come in parts: the position of the first, and RGB images."""
    images = torch.empty((len(rows), *shape), dtype=torch.uint8)
    for start, part in parts:
        images[start : start + len(part)] = to_channels(part, shape[0])
    return Resident(images.to(device), torch.from_numpy(file.labels[rows]), file.classes)


def _output_size(file: beton.Beton, data: Data, key: str) -> tuple[int, int]:
    if data.size:
        return data.size, data.size
    if file.constant_shape:
        return file.constant_shape
    size = catalog.DATASETS[data.name].size if data.name in catalog.DATASETS else None
    if size is None:
        sides = f"{file.heights.min()} to {file.heights.max()} pixels high"
        raise InputError(f"{key}: the images of {file.path} are {sides}: set data.size, or encode with crop=true")
    return size, size


def _channels(file: beton.Beton, data: Data) -> int:
    known = catalog.DATASETS[data.name].channels if data.name in catalog.DATASETS else 3
    return data.channels or file.channels or known
