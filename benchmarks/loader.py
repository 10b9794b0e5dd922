"""Loading: the resident source against the streaming one; photographs from JPEG and raw; and a folder of files.

- `loading` handing out batches of 256 uint8 images, 1 × 28 × 28, in the shuffled order of training. On Fashion-MNIST's
  60,000 training images, encoded raw by arae into a temporary folder first (not timed). One timing is 100 batches,
  25,600 images; n = 7 rounds, 1 of warm-up.
- `loading-photographs` streaming uint8 images, 3 × 224 × 224, each a random crop (as ImageNet's training does), in
  shuffled order, from `.beton` files that `arae encode … size=256` made of 500 photographs of ImageNet (not timed). One
  timing is two epochs, 1,000 images; n = 7 rounds, 1 of warm-up.
- `loading-folder` from a folder of JPEG files, 500 × 375 (the commonest size of ImageNet's; quality 95), to batches of
  float images, 3 × 224 × 224, cropped at random and flipped: torchvision's ImageFolder and DataLoader (no workers, so
  that all is one process's) on the folder, and arae on what `arae encode … size=256` makes of it. Beside them what is
  like for like: ImageFolder on a folder of the same photographs scaled to 256 pixels; what decoding and cropping take
  of ours, without flips and floats, which is what limits it; and the bytes of the raw file copied out of it, which is
  the least that reading can take. 14 photographs, each four times; one timing is eight epochs, 448 images; n = 9
  rounds, 1 of warm-up.

The photographs are taken from the folder that `ARAE_TEST_DATA` names. CPU seconds count the decoding threads, and
starting them once a timing, as at the start of a stage. The files lie in the page cache: what a disk must deliver is in
the bytes of an image.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageOps

from arae.config import Data
from arae.data.augment import augment
from arae.data.encode import EncodeOptions, encode
from arae.data.load import Source, open_source, stream
from arae.errors import InputError
from benchmarks.encoding import MEDIAN, SOURCE_QUALITY, photographs_in
from benchmarks.harness import Comparison, Result, measure

BATCH, BATCHES = 256, 100


def loading(device: torch.device) -> Result:
    """Images a second of both sources; InputError where Fashion-MNIST or FFCV is missing."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "images.beton"
        encode("fashion-mnist", path, EncodeOptions(split="train"))
        sources = {
            loader: open_source(Data(name="fashion-mnist", train=str(path), loader=loader), "train", device)
            for loader in ("resident", "ffcv")
        }
        ids = stream(sources["ffcv"].n, BATCH, 0, 0, BATCHES)
        return measure(
            "loading",
            f"{BATCHES} shuffled batches of {BATCH} uint8 images, 1 × 28 × 28, from Fashion-MNIST encoded raw: held in "
            "memory (resident), or streamed from the file (ffcv).",
            {name: partial(drain, source, ids) for name, source in sources.items()},
            [Comparison(what="streamed over resident", slow="ffcv", fast="resident")],
            images=BATCH * BATCHES,
            rounds=7,
            warmup=1,
            device=device,
        )


def drain(source: Source, ids: np.ndarray) -> None:
    """Take every batch and do nothing with it."""
    for _ in source.batches(ids):
        pass


NAME = "loading-photographs"
SIZE, SIDE, CROPS, EPOCHS = 224, 256, 50, 2
MODES = ("jpg", "raw")


def photographs(device: torch.device) -> Result:
    """CPU seconds of both modes, and bytes an image; InputError where the photographs or FFCV are missing."""
    given = os.environ.get("ARAE_TEST_DATA")
    if not given or not (Path(given) / "imagenet_even.tar").is_file():
        raise InputError("ARAE_TEST_DATA names no folder with imagenet_even.tar")
    with TemporaryDirectory() as made:
        folder = Path(made)
        images = unpacked(Path(given) / "imagenet_even.tar", folder / "images")
        sources, sizes = {}, {}
        for mode in MODES:
            path = folder / f"{mode}.beton"
            encode(str(images), path, EncodeOptions(split="all", mode=mode, size=SIDE))
            data = Data(train=str(path), size=SIZE, channels=3, loader="ffcv", augment=("crop",))
            sources[mode] = open_source(data, "train", torch.device("cpu"), workers=1)
            sizes[mode] = round(path.stat().st_size / sources[mode].n, 1)
        n = sources["jpg"].n
        ids = stream(n, CROPS, 0, 0, EPOCHS * n // CROPS)
        return measure(
            NAME,
            f"{EPOCHS * n:,} shuffled random crops of 3 × {SIZE} × {SIZE} uint8 from photographs of ImageNet, shorter "
            f"side {SIDE}, streamed from JPEG (quality 90) and from raw pixels, by one thread.",
            {mode: partial(drain, source, ids) for mode, source in sources.items()},
            [Comparison(what="jpg over raw", slow="jpg", fast="raw")],
            images=EPOCHS * n,
            rounds=7,
            warmup=1,
            device=torch.device("cpu"),
        ).model_copy(update={"sizes": sizes})


def unpacked(archive: Path, folder: Path) -> Path:
    """The archive's JPEG files, in two folders, for an encoder wants classes."""
    with tarfile.open(archive) as tar:
        files = [each for each in tar.getmembers() if each.name.endswith(".jpg")]
        for number, each in enumerate(files):
            content = tar.extractfile(each)
            assert content is not None
            place = folder / str(number % 2) / f"{number:03}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.read())
    return folder


FOLDER_IMAGES, FOLDER_BATCH, FOLDER_EPOCHS = 56, 28, 8
AUGMENT = ("crop", "flip")


def folder_of_files(device: torch.device) -> Result:
    """CPU seconds from a folder of photographs to training images; InputError where photographs or FFCV are missing."""
    given = os.environ.get("ARAE_TEST_DATA")
    if not given or not all((Path(given) / name).is_file() for name in ("highres.tar", "style.tar")):
        raise InputError("ARAE_TEST_DATA names no folder with highres.tar and style.tar")
    with TemporaryDirectory() as made:
        place = Path(made)
        large = [ImageOps.fit(image, MEDIAN, Image.Resampling.LANCZOS) for image in photographs_in(Path(given))]
        saved(large, place / "large", SOURCE_QUALITY)
        variants: dict[str, Callable[[], object]] = {"ImageFolder": partial(through_torchvision, place / "large")}
        sources = {}
        for mode in MODES:
            path = place / f"{mode}.beton"
            encode(str(place / "large"), path, EncodeOptions(split="all", mode=mode, size=SIDE))
            data = Data(train=str(path), size=SIZE, channels=3, loader="ffcv", augment=AUGMENT)
            sources[mode] = open_source(data, "train", torch.device("cpu"), workers=1)
            variants[f"arae {mode}"] = partial(through_arae, sources[mode])
            variants[f"arae {mode}, decoded and cropped alone"] = partial(drain, sources[mode], order(sources[mode]))
        size = (round(SIDE * MEDIAN[0] / MEDIAN[1]), SIDE)
        saved([image.resize(size, Image.Resampling.LANCZOS) for image in large], place / "small", 90)
        variants["ImageFolder of 256 px"] = partial(through_torchvision, place / "small")
        variants["raw read"] = partial(copied, place / "raw.beton")
        pairs = [("ImageFolder", "arae jpg"), ("ImageFolder", "arae raw"), ("ImageFolder of 256 px", "arae jpg")]
        pairs += [("ImageFolder of 256 px", "arae raw"), ("arae raw", "raw read")]
        return measure(
            "loading-folder",
            f"{FOLDER_EPOCHS * FOLDER_IMAGES} training images, float 3 × {SIZE} × {SIZE}, cropped at random and "
            f"flipped, from a folder of JPEG files of {MEDIAN[0]} × {MEDIAN[1]}, by one thread; arae's set keeps "
            f"{SIDE} pixels of the shorter side.",
            variants,
            [Comparison(what=f"{slow} over {fast}", slow=slow, fast=fast) for slow, fast in pairs],
            images=FOLDER_EPOCHS * FOLDER_IMAGES,
            rounds=9,
            warmup=1,
            device=torch.device("cpu"),
        )


def saved(images: list[Image.Image], folder: Path, quality: int) -> None:
    """JPEG files in two folders, for both encoders want classes."""
    for number in range(FOLDER_IMAGES):
        place = folder / str(number % 2) / f"{number:03}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        images[number % len(images)].save(place, quality=quality)


def through_torchvision(folder: Path) -> None:
    """The epochs by ImageFolder and DataLoader, as ImageNet's training scripts have them."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    change = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = ImageFolder(str(folder), transforms.Compose(change))
    loader = torch.utils.data.DataLoader(images, batch_size=FOLDER_BATCH, shuffle=True)
    for _ in range(FOLDER_EPOCHS):
        for batch, _labels in loader:
            assert batch.shape == (FOLDER_BATCH, 3, SIZE, SIZE)


def through_arae(source: Source) -> None:
    """The same number of epochs as training takes them."""
    ids = order(source)
    for row, images in zip(ids, source.batches(ids), strict=True):
        batch = augment(images, torch.from_numpy(row), AUGMENT, 0, 0)
        assert batch.shape == (FOLDER_BATCH, 3, SIZE, SIZE)


def order(source: Source) -> np.ndarray:
    """Ids of the epochs, int64 [batches, images]."""
    return stream(source.n, FOLDER_BATCH, 0, 0, FOLDER_EPOCHS * source.n // FOLDER_BATCH)


def copied(path: Path) -> None:
    """All bytes of the file, as often."""
    mapped = np.memmap(path, mode="r")
    out = np.empty(mapped.shape, np.uint8)
    for _ in range(FOLDER_EPOCHS):
        np.copyto(out, mapped)
