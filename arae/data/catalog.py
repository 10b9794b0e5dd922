"""The catalogue: what each data set is, where its files lie, and how to obtain them. Nothing is downloaded here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from arae.data import arrays
from arae.data.arrays import Arrays
from arae.errors import InputError

Split = Literal["train", "test", "all"]

_DIGITS = tuple("0123456789")
_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True)
class Dataset:
    """One set of the catalogue."""

    name: str
    title: str
    kind: Literal["arrays", "folder"]
    """`arrays`: small enough to read whole; `folder`: image files in class folders."""
    channels: Literal[1, 3]
    """1 grey, 3 RGB."""
    size: int | None
    """Height and width in pixels that networks see; None where the images decide."""
    classes: tuple[str, ...] | None
    """Names in the order of the labels; None where the folders name them."""
    splits: Mapping[str, int | None]
    """Images of each split, as published."""
    terms: str
    """Licence or terms of use."""
    obtain: str
    """How to get the files."""
    place: Path | None
    """Where they are looked for by default."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """File names of each split."""
    held_out: tuple[str, ...] = ("test", "testing", "val", "valid", "validation")
    """For folders: names that the folder of held-out images may have, best first."""


DATASETS: dict[str, Dataset] = {
    entry.name: entry
    for entry in (
        Dataset(
            name="fashion-mnist",
            title="Fashion-MNIST: Zalando's articles of clothing",
            kind="arrays",
            channels=1,
            size=28,
            classes=(
                "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
                "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
            ),
            splits={"train": 60_000, "test": 10_000},
            terms="MIT",
            obtain="on Debian and Ubuntu: apt-get install dataset-fashion-mnist; or the four files of "
            "https://github.com/zalandoresearch/fashion-mnist",
            place=Path("/usr/share/datasets/fashion-mnist"),
            files=_MNIST_FILES,
        ),
        Dataset(
            name="mnist",
            title="MNIST: handwritten digits",
            kind="arrays",
            channels=1,
            size=28,
            classes=_DIGITS,
            splits={"train": 60_000, "test": 10_000},
            terms="CC BY-SA 3.0",
            obtain="put the four idx.gz files of http://yann.lecun.com/exdb/mnist there",
            place=Path("data/mnist"),
            files=_MNIST_FILES,
        ),
        Dataset(
            name="cifar10",
            title="CIFAR-10: tiny photographs in ten classes",
            kind="arrays",
            channels=3,
            size=32,
            classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            splits={"train": 50_000, "test": 10_000},
            terms="research use; cite Krizhevsky 2009",
            obtain="unpack the binary version (cifar-10-binary.tar.gz) of https://www.cs.toronto.edu/~kriz/cifar.html "
            "there (the Python version is pickled, which arae never opens), or name an .npz",
            place=Path("data/cifar10"),
            files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        ),
        Dataset(
            name="svhn",
            title="SVHN: street-view house numbers, cropped digits",
            kind="arrays",
            channels=3,
            size=32,
            classes=_DIGITS,
            splits={"train": 73_257, "test": 26_032},
            terms="non-commercial use; cite Netzer et al. 2011",
            obtain="put train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers there, "
            "or name an .npz",
            place=Path("data/svhn"),
            files={"train": ("train_32x32.mat",), "test": ("test_32x32.mat",)},
        ),
        Dataset(
            name="imagenet",
            title="ImageNet (ILSVRC 2012): photographs in 1,000 classes",
            kind="folder",
            channels=3,
            size=224,
            classes=None,
            splits={"train": 1_281_167, "test": 50_000},
            terms="non-commercial research; agreement with image-net.org",
            obtain="register at https://image-net.org and unpack the ILSVRC 2012 images as "
            "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG there",
            place=Path("data/imagenet"),
            held_out=("val", "valid", "validation", "test"),
        ),
        Dataset(
            name="images",
            title="an image folder of one's own, one folder a class",
            kind="folder",
            channels=3,
            size=None,
            classes=None,
            splits={"train": None, "test": None},
            terms="its owner's",
            obtain="name the folder: data.source=/path/to/images",
            place=None,
        ),
    )
}  # fmt: skip


def find(name: str) -> Dataset:
    """The set of that name; InputError with the nearest name otherwise."""
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(DATASETS)}"
    raise InputError(f"no data set {name!r} in the catalogue; {hint}")


def place_of(dataset: Dataset, source: str | None) -> Path:
    """Where the set's files lie: `source` if given, else the default; InputError where there is nothing."""
    place = Path(source) if source else dataset.place
    if place is None:
        raise InputError(f"data set {dataset.name!r} needs a place: {dataset.obtain}")
    if not place.exists():
        raise InputError(f"{dataset.name}: {place} is not there; {dataset.obtain}, or give data.source its place")
    return place


def source_files(dataset: Dataset, place: Path, split: Split) -> list[Path]:
    """The files a split of an arrays set is read from; InputError names the one that is missing."""
    if place.is_file():
        return [place]
    wanted = [name for part in _parts(split) for name in dataset.files[part]]
    return [_file(dataset, place, name) for name in wanted]


def read_arrays(name: str, source: str | None, split: Split) -> Arrays:
    """Images uint8 [N, H, W] or [N, H, W, 3], labels int64 [N] and class names of an arrays set of the catalogue.

    `source` is the folder with the set's files, or an `.npz`; None is the catalogue's place. InputError says which file
    is missing, where, and how to obtain it.
    """
    dataset = find(name)
    if dataset.kind != "arrays":
        raise InputError(f"data set {name!r} is an image folder: `arae encode {name} PATH` writes a .beton file of it")
    place = place_of(dataset, source)
    if place.is_file():
        if place.suffix != ".npz":
            raise InputError(f"{place}: give the folder with the files of {name}, or an .npz file")
        read = arrays.read_npz(place, split)
    else:
        read = _joined([_read_split(dataset, place, part) for part in _parts(split)])
    classes = dataset.classes or ()
    if len(read.labels) and int(read.labels.max()) >= len(classes):
        raise InputError(f"{place}: label {int(read.labels.max())} is out of range; {name} has {len(classes)} classes")
    return read._replace(classes=classes)


def _parts(split: Split) -> tuple[Literal["train", "test"], ...]:
    return ("train", "test") if split == "all" else (split,)


def _read_split(dataset: Dataset, place: Path, part: Literal["train", "test"]) -> Arrays:
    files = source_files(dataset, place, part)
    if dataset.name == "cifar10":
        return _joined([arrays.read_cifar_binary(path) for path in files])
    if dataset.name == "svhn":
        return arrays.read_svhn(files[0])
    return arrays.read_idx_pair(files[0], files[1])


def _file(dataset: Dataset, place: Path, name: str) -> Path:
    spellings = [name, name + ".gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"]
    for folder in (place, place / "cifar-10-batches-bin", place / "raw"):
        for spelling in spellings:
            if (folder / spelling).is_file():
                return folder / spelling
    raise InputError(f"{dataset.name}: {name} is not in {place}; {dataset.obtain}")


def _joined(parts: list[Arrays]) -> Arrays:
    if len({part.images.shape[1:] for part in parts}) > 1:
        raise InputError(f"the splits have images of different shapes: {[part.images.shape[1:] for part in parts]}")
    images = np.concatenate([part.images for part in parts])
    return Arrays(images, np.concatenate([part.labels for part in parts]), parts[0].classes)
