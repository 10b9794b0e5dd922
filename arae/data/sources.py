"""What `arae encode` can read: a source is found, its images are listed, and read one by one."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from arae.data import arrays, catalog
from arae.data.arrays import Arrays
from arae.data.images import Folder, UnusableImageError, fit, fit_array, list_folder, open_rgb
from arae.errors import InputError

Split = Literal["train", "test", "all"]
# What says that the storage fails, or that the file has gone; anything else is the fault of the image itself.
_LOST = {
    getattr(errno, name)
    for name in (
        *("ENOENT", "ENOTDIR", "EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ENODEV", "ENXIO", "EHOSTDOWN"),
        *("EHOSTUNREACH", "EREMOTEIO", "ENOMEM", "EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
}
_IDX_HINT = "a catalogue name, an image folder, an .npz, or two idx files as images-file,labels-file"


@dataclass(frozen=True)
class Found:
    """The images of a source, before any of them is decoded."""

    labels: np.ndarray
    """int64 [N]."""
    classes: tuple[str, ...]
    channels: Literal[1, 3]
    listing: str
    """Hash of what the images are read from: paths and sizes."""
    images: np.ndarray | None = None
    """uint8 [N, H, W] or [N, H, W, 3], for sources of arrays."""
    root: Path = field(default=Path())
    paths: tuple[str, ...] = ()
    """Files under `root`, for folders."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Files that are no images, and why."""

    def read(self, position: int, size: int | None, *, crop: bool) -> tuple[np.ndarray, set[str]]:
        """One image, uint8 [H, W, 3] in the wanted size, and what was converted.

        UnusableImageError says why it can't be used; LostImageError that its storage does not give it.
        """
        if self.images is not None:
            image = fit_array(self.images[position], size, crop=crop)
            return (image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)), set()
        path = self.root / self.paths[position]
        try:
            rgb, notes = open_rgb(path)
        except UnusableImageError as error:
            # An image must not be left out because a mount hangs or memory is short where it was read.
            cause = error.__context__
            if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _LOST):
                raise LostImageError(f"{path}: {error}") from None
            raise
        return np.asarray(fit(rgb, size, crop=crop)), notes

    def part(self, start: int, stop: int) -> Found:
        """The images `start` to `stop - 1`, numbered from 0: all that a worker needs to be sent."""
        images = None if self.images is None else self.images[start:stop]
        root = self.root.absolute()
        return replace(
            self, labels=self.labels[start:stop], images=images, root=root, paths=self.paths[start:stop], skipped=()
        )


class LostImageError(Exception):
    """An image that was listed can't be read any more; the text says which, and why."""


def find(source: str, place: str | None, split: Split, limit: int | None) -> Found:
    """The images of `source`: a catalogue name (files at `place`), a folder, an `.npz`, or `images-idx,labels-idx`."""
    path = Path(source)
    if source in catalog.DATASETS:
        return _limited(_from_catalogue(catalog.DATASETS[source], place, split), limit)
    if path.is_dir():
        held_out = catalog.DATASETS["images"].held_out
        return _limited(_from_folder(list_folder(path, split, held_out)), limit)
    if path.suffix == ".npz" and path.is_file():
        return _limited(_from_arrays(arrays.read_npz(path, split), [path]), limit)
    pair = [Path(part) for part in source.split(",")]
    if len(pair) == 2:
        read = arrays.read_idx_pair(pair[0], pair[1])
        return _limited(_from_arrays(read if split == "all" else arrays.divided(read, split), pair), limit)
    if "/" in source or "." in source:
        raise InputError(f"{source}: not there; give {_IDX_HINT}")
    catalog.find(source)  # says the nearest name
    raise InputError(f"{source}: not there; give {_IDX_HINT}")


def evenly(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """At most `limit` positions, spread evenly over the classes and over each class; sorted, int64."""
    n = len(labels)
    if limit is None or limit >= n:
        return np.arange(n)
    by_class = np.argsort(labels, kind="stable")
    return np.sort(by_class[np.arange(limit) * n // limit])


def _limited(found: Found, limit: int | None) -> Found:
    kept = evenly(found.labels, limit)
    if len(kept) == len(found.labels):
        return found
    images = None if found.images is None else found.images[kept]
    paths = tuple(found.paths[i] for i in kept) if found.paths else ()
    return Found(
        found.labels[kept], found.classes, found.channels, found.listing, images, found.root, paths, found.skipped
    )


def _from_catalogue(dataset: catalog.Dataset, place: str | None, split: Split) -> Found:
    if dataset.kind == "folder":
        return _from_folder(list_folder(catalog.place_of(dataset, place), split, dataset.held_out))
    read = catalog.read_arrays(dataset.name, place, split)
    return _from_arrays(read, catalog.source_files(dataset, catalog.place_of(dataset, place), split))


def _from_arrays(read: Arrays, files: Sequence[Path]) -> Found:
    return Found(read.labels, read.classes, read.channels, _listing(files), images=read.images)


def _from_folder(folder: Folder) -> Found:
    files = [folder.root / path for path in (*folder.paths, *(path for path, _ in folder.skipped))]
    gone: set[Path] = set()
    listing = _listing(files, gone)
    there = [i for i, path in enumerate(files[: len(folder.paths)]) if path not in gone] if gone else None
    if there is not None:  # links to nothing
        lost = tuple((path, "no such file") for path, file in zip(folder.paths, files, strict=False) if file in gone)
        paths = tuple(folder.paths[i] for i in there)
        folder = folder._replace(paths=paths, labels=folder.labels[there], skipped=(*folder.skipped, *lost))
    return Found(folder.labels, folder.classes, 3, listing, None, folder.root, folder.paths, folder.skipped)


def _listing(files: Sequence[Path], gone: set[Path] | None = None) -> str:
    """Hash of names, sizes and times of change; the files that are not there are added to `gone`."""
    digest = hashlib.sha256()
    for path in files:
        try:
            status = path.stat()
            digest.update(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path.absolute()}\0gone\n".encode())
            if gone is not None:
                gone.add(path)
    return digest.hexdigest()
