"""What a network sees of photographs in arae's sets, and in the folder that they were made of.

Top-1 accuracy of a trained SqueezeNet 1.1 on 500 photographs of ImageNet, one of each of 500 classes, JPEG files whose
shorter side is 256 pixels at most (less in 50). They are training photographs: the accuracy itself says nothing, the
differences do. `folder`: torchvision's ImageFolder. `jpg` and `raw`: what `arae encode … size=256` makes of the same
folder, as training and evaluation load it. Twice: the middle of each photograph, the largest square at 224 pixels, as
in validation; and random crops of 224 pixels, as in training, eight of each. arae draws those as torchvision's
RandomResizedCrop does; here all three pipelines get the same windows, that chance does not tell them apart.

n = 500 photographs, pairwise; 95 % intervals of the difference are over the photographs. That larger originals lose
nothing by becoming 256 pixels high is not shown by this: there are none with labels here.
`python -m benchmarks.crops` makes `results/crops/imagenet.json` (some minutes on one core) and prints the table. The
photographs and the weights are taken from the folder that `ARAE_TEST_DATA` names.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arae.config import Data
from arae.data import windows
from arae.data.augment import to_float
from arae.data.encode import EncodeOptions, encode
from arae.data.load import open_source, stream
from arae.errors import InputError
from arae.files import write_text
from arae.models.taps import IMAGENET_MEAN, IMAGENET_STD
from arae.seeds import mix
from benchmarks.harness import RESULTS, Made, here
from benchmarks.loader import MODES, SIDE, SIZE, unpacked

OUT = RESULTS / "crops" / "imagenet.json"
ARCHIVE, WEIGHTS, NET = "imagenet_even.tar", "weights.tar", "weights/squeezenet1_1_caffe_fp16.pt"
CROPS, BATCH, SEED = 8, 50, 0
VIEWS = ("middle", "random")
CPU = torch.device("cpu")
Hits = dict[str, dict[str, list[int]]]


class Record(Made):
    """What `results/crops/imagenet.json` holds."""

    about: str
    hits: Hits
    """By view and pipeline, of each photograph how many of its crops were classified correctly."""
    crops: dict[str, int]
    """Crops of a photograph, by view."""

    def accuracy(self, view: str, pipeline: str) -> float:
        """Share of the crops."""
        return float(np.mean(self.hits[view][pipeline])) / self.crops[view]

    def difference(self, view: str, mode: str) -> tuple[float, float]:
        """Ours minus the folder's, and half of the 95 % interval."""
        ours, theirs = (np.array(self.hits[view][name]) / self.crops[view] for name in (mode, "folder"))
        return float((ours - theirs).mean()), 1.96 * float((ours - theirs).std(ddof=1)) / len(ours) ** 0.5


def interval(record: Record, view: str, mode: str) -> list[float]:
    """Points by which ours is above the folder: the lower end of the 95 % interval, the difference, the upper end."""
    difference, half = record.difference(view, mode)
    return [100 * (difference - half), 100 * difference, 100 * (difference + half)]


def measured() -> Record:
    """Classify all; InputError where the photographs, the weights or FFCV are missing."""
    given = os.environ.get("ARAE_TEST_DATA")
    if not given or not all((Path(given) / name).is_file() for name in (ARCHIVE, WEIGHTS)):
        raise InputError(f"ARAE_TEST_DATA names no folder with {ARCHIVE} and {WEIGHTS}")
    net = classifier(Path(given) / WEIGHTS)
    hits: Hits = {view: {} for view in VIEWS}
    with TemporaryDirectory() as made:
        place = Path(made)
        folder = unpacked(Path(given) / ARCHIVE, place / "images")
        for mode in MODES:
            path = place / f"{mode}.beton"
            encode(str(folder), path, EncodeOptions(split="all", mode=mode, size=SIDE))
            for view in VIEWS:
                hits[view][mode] = counted(net, from_set(path, view))
        for view in VIEWS:
            hits[view]["folder"] = counted(net, from_folder(folder, view))
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    return Record(about=about, hits=hits, crops={"middle": 1, "random": CROPS}, **here(CPU))


def classifier(archive: Path) -> Callable[[Tensor], Tensor]:
    """Images float32 [m, 3, H, W] in [0, 1] → classes int64 [m]."""
    from torchvision.models import squeezenet1_1

    with tarfile.open(archive) as tar:
        content = tar.extractfile(NET)
        assert content is not None
        weights = torch.load(io.BytesIO(content.read()), weights_only=True)
    net: nn.Module = squeezenet1_1(weights=None)
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    net.eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    @torch.inference_mode()
    def classify(images: Tensor) -> Tensor:
        return net((images - mean) / std).argmax(1)

    return classify


def counted(classify: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, np.ndarray]]) -> list[int]:
    """Of each photograph how often it was right. The batches bring the photographs' numbers along."""
    right: dict[int, int] = {}
    for images, numbers in batches:
        found = classify(images).numpy()
        for number, one in zip(numbers.tolist(), found.tolist(), strict=True):
            # One of every second class, in the classes' order.
            right[number] = right.get(number, 0) + (one == 2 * number)
    assert sorted(right) == list(range(len(right)))
    return [right[number] for number in sorted(right)]


def from_folder(folder: Path, view: str) -> Iterable[tuple[Tensor, np.ndarray]]:
    """As ImageNet's training scripts load a folder, but for who draws the random windows."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import functional as change

    images = ImageFolder(str(folder))
    numbers = np.array([int(Path(path).stem) for path, _ in images.samples])
    for row in order(len(images), view):
        made = []
        for identity in row.tolist():
            image: Any = images[identity % len(images)][0]
            if view == "random":
                top, left, height, width = window(identity, len(images), image.size)
                image = change.resized_crop(image, top, left, height, width, [SIZE, SIZE])
            else:
                image = change.center_crop(change.resize(image, [SIZE]), [SIZE, SIZE])
            made.append(change.to_tensor(image))
        yield torch.stack(made), numbers[row % len(images)]


def window(identity: int, n: int, size: tuple[int, int]) -> list[int]:
    """What arae's loader cuts out of an image (width, height) for an id: top, left, height, width."""
    parts = (np.array([part]) for part in (*divmod(identity, n), size[1], size[0]))
    return windows.random(mix(SEED, "crop"), *parts)[0].tolist()


def from_set(path: Path, view: str) -> Iterable[tuple[Tensor, np.ndarray]]:
    """As arae loads its set."""
    data = Data(train=str(path), test=str(path), size=SIZE, channels=3, loader="ffcv", augment=("crop",))
    source = open_source(data, "train" if view == "random" else "test", CPU, seed=SEED, workers=1)
    n = source.n
    # A folder's files come by class: those of even numbers, then the others.
    numbers = np.array([*range(0, n, 2), *range(1, n, 2)])
    ids = order(n, view)
    for row, images in zip(ids, source.batches(ids), strict=True):
        yield to_float(images), numbers[row % n]


def order(n: int, view: str) -> np.ndarray:
    """Ids int64 [batches, images]."""
    return stream(n, BATCH, 0, 0, CROPS * n // BATCH) if view == "random" else np.arange(n).reshape(-1, BATCH)


def table(record: Record) -> list[str]:
    """A row for each view and pipeline, in Markdown."""
    rows = ["| Crops | Loaded from | Top-1 | minus the folder's |", "|---|---|---|---|"]
    for view in VIEWS:
        for name in ("folder", *MODES):
            gap = "-"
            if name != "folder":
                difference, half = record.difference(view, name)
                gap = f"{100 * difference:+.1f} ± {100 * half:.1f} points"
            rows.append(f"| {view} | {name} | {100 * record.accuracy(view, name):.1f} % | {gap} |")
    return rows


def main() -> None:
    """Measure all."""
    record = measured()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    write_text(OUT, record.model_dump_json(indent=1) + "\n")
    print("\n".join(table(record)))


if __name__ == "__main__":
    main()
