"""The benchmark of crops: that all pipelines classify the same views of the same photographs, and that hits are counted
under the right one."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from arae.data.encode import EncodeOptions, encode
from benchmarks import crops

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures as the benchmark unpacks them: by even and odd numbers."""
    root = tmp_path_factory.mktemp("crops") / "images"
    random = np.random.default_rng(0)
    for number in range(COUNT):
        place = root / str(number % 2) / f"{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(random.integers(0, 256, (256, 300 + 20 * number, 3), np.uint8))
        noise.filter(ImageFilter.GaussianBlur(3)).save(place)
    return root


@needs_ffcv
@pytest.mark.parametrize("view", crops.VIEWS)
def test_set_and_folder_show_the_same_windows_of_the_same_photographs(
    folder: Path, view: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(crops, "BATCH", 3)
    encode(str(folder), tmp_path / "x.beton", EncodeOptions(split="all", mode="raw", size=crops.SIDE))
    pairs = list(zip(crops.from_set(tmp_path / "x.beton", view), crops.from_folder(folder, view), strict=True))
    assert len(pairs) == COUNT // 3 * (crops.CROPS if view == "random" else 1)
    seen = []
    for (ours, numbers), (theirs, same) in pairs:
        assert numbers.tolist() == same.tolist()
        assert (ours - theirs).pow(2).mean((1, 2, 3)).max() < 1e-4  # another window comes to 1e-3
        seen += numbers.tolist()
    assert np.bincount(seen).tolist() == [len(seen) // COUNT] * COUNT


def test_hits_are_counted_by_photograph() -> None:
    """Photograph n is of class 2 n."""
    answers = iter([[0, 9, 4], [2, 2, 6], [0, 2, 5], [6, 6, 7]])
    batches = [(torch.zeros(3, 3, 2, 2), np.array(numbers)) for numbers in ([0, 1, 2], [1, 1, 3], [0, 2, 1], [3, 3, 0])]
    assert crops.counted(lambda _: torch.tensor(next(answers)), batches) == [2, 2, 1, 3]


def test_differences_are_paired() -> None:
    hits = {"random": {"folder": [8, 0, 4, 6], "raw": [8, 2, 4, 5]}}
    record = crops.Record.model_construct(about="", hits=hits, crops={"random": 8})
    assert record.accuracy("random", "raw") == pytest.approx(19 / 32)
    gaps = np.array([0, 2, 0, -1]) / 8
    half = 1.96 * gaps.std(ddof=1) / 2
    expected = 100 * np.array([gaps.mean() - half, gaps.mean(), gaps.mean() + half])
    assert crops.interval(record, "random", "raw") == pytest.approx(expected.tolist())
