"""What `arae encode` can read: a source is found, its images are listed, looked at once, and read one by one."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from arae.data import arrays, catalog
from arae.data.arrays import Arrays
from arae.data.images import Folder, UnusableImageError, fit, fit_array, list_folder, open_rgb
from arae.errors import InputError

Split = Literal["train", "test", "all"]
_Look = tuple[int, int, frozenset[str]] | str  # height, width and what is converted; or why it can't be used
_CHUNK = 64
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
        """One image, uint8 [H, W, 3] in the wanted size, and what was converted; UnusableImageError says why not."""
        if self.images is not None:
            image = fit_array(self.images[position], size, crop=crop)
            return (image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)), set()
        rgb, notes = open_rgb(self.root / self.paths[position])
        return np.asarray(fit(rgb, size, crop=crop)), notes


@dataclass(frozen=True)
class Survey:
    """What a look at every image of a source found."""

    usable: np.ndarray
    """Positions in the source, int64 [n], in order."""
    heights: np.ndarray
    """int64 [n], pixels, as they will be written."""
    widths: np.ndarray
    notes: tuple[frozenset[str], ...]
    """What is converted, of each usable image."""
    skipped: tuple[tuple[str, str], ...]


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


def survey(
    found: Found, size: int | None, *, crop: bool, threads: int, tell: Callable[[str, int, int], None]
) -> Survey:
    """Decode every file to its last byte and note what it will be; broken ones are listed, never dropped."""
    total = len(found.labels)
    if found.images is not None:
        height, width = found.read(0, size, crop=crop)[0].shape[:2]
        sides = np.full(total, height), np.full(total, width)
        return Survey(np.arange(total), *sides, (frozenset(),) * total, found.skipped)

    def look(position: int) -> _Look:
        try:
            image, notes = found.read(position, size, crop=crop)
        except UnusableImageError as error:
            return str(error)
        return image.shape[0], image.shape[1], frozenset(notes)

    results: list[_Look] = []
    with ThreadPoolExecutor(threads) as pool:
        for result in _in_order(pool, look, range(total), 4 * threads):
            results.append(result)
            if len(results) % _CHUNK == 0 or len(results) == total:
                tell("checking", len(results), total)
    good = [(i, r) for i, r in enumerate(results) if not isinstance(r, str)]
    bad = [(found.paths[i], r) for i, r in enumerate(results) if isinstance(r, str)]
    table = np.array([(i, r[0], r[1]) for i, r in good], np.int64).reshape(-1, 3)
    return Survey(table[:, 0], table[:, 1], table[:, 2], tuple(r[2] for _, r in good), (*found.skipped, *bad))


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
    return Found(folder.labels, folder.classes, 3, _listing(files), None, folder.root, folder.paths, folder.skipped)


def _listing(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            status = path.stat()
            digest.update(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path.absolute()}\0gone\n".encode())
    return digest.hexdigest()


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[int], _Look], items: Iterable[int], ahead: int
) -> Iterable[_Look]:
    """`map` that holds only `ahead` results, and stops at an interrupt."""
    waiting: list[Future[_Look]] = []
    source = iter(items)
    try:
        for item in itertools.islice(source, ahead):
            waiting.append(pool.submit(work, item))
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(work, item) for item in itertools.islice(source, 1)]
    finally:
        for future in waiting:
            future.cancel()
