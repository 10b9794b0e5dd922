"""Loading photographs: what a training image of 224 × 224 costs the CPU, from JPEG and from raw pixels.

Measured: streaming uint8 images, 3 × 224 × 224, each a random crop (as ImageNet's training does), in shuffled order,
with one decoding thread, from `.beton` files that `arae encode … size=256` made of 500 photographs of ImageNet (not
timed). They are taken from the folder that `ARAE_TEST_DATA` names. One timing is two epochs, 1,000 images; n = 7
rounds, 1 of warm-up, in which FFCV's decoder is compiled. CPU seconds count FFCV's threads. The files lie in the page
cache: what a disk must deliver is in the bytes of an image.
"""

from __future__ import annotations

import os
import tarfile
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from arae.config import Data
from arae.data.encode import EncodeOptions, encode
from arae.data.load import open_source, stream
from arae.errors import InputError
from benchmarks.harness import Comparison, Result, measure
from benchmarks.loading import drain

NAME = "loading-photographs"
SIZE, SIDE, BATCH, EPOCHS = 224, 256, 50, 2
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
        ids = stream(n, BATCH, 0, 0, EPOCHS * n // BATCH)
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
