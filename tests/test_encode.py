import ast
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import ugly
from PIL import Image
from test_cli import on_a_small_disk

from arae.config import Data
from arae.data import beton, images, sources
from arae.data.encode import EncodeOptions, encode
from arae.data.load import open_source
from arae.errors import InputError

CPU = torch.device("cpu")
ffcv = pytest.importorskip("ffcv", reason="FFCV is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of six PNGs of different sizes."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(6):
            image = Image.fromarray(ugly.picture(label * 6 + i, 30 + i, 60 - 4 * i))
            image.save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def stored(path: Path, size: int | None = None) -> torch.Tensor:
    return next(
        iter(open_source(Data(train=str(path), size=size), "train", CPU).batches(np.arange(beton.check(path).n)[None]))
    )


@pytest.mark.parametrize(("name", "notes"), ugly.GOOD.items())
def test_good_images_become_upright_rgb(tmp_path, name, notes):
    ugly.make(tmp_path)
    image, found = images.open_rgb(tmp_path / name)
    upright = (ugly.HEIGHT, ugly.WIDTH) if name == "rotated.jpg" else (ugly.WIDTH, ugly.HEIGHT)
    assert (found - ({"palette"} if name == "animated.gif" else set()), image.mode, image.size) == (
        notes,
        "RGB",
        upright,
    )


@pytest.mark.parametrize("name", [name for name in ugly.BAD if name != "notes.txt"])
def test_broken_images_say_why(tmp_path, name):
    ugly.make(tmp_path)
    with pytest.raises(images.UnusableImageError, match=r"\w"):
        images.open_rgb(tmp_path / name)


def test_values_of_the_conversions(tmp_path):
    ugly.make(tmp_path)
    picture = ugly.picture()

    def pixels(name):
        return np.asarray(images.open_rgb(tmp_path / name)[0])

    for name in ("rgb.png", "rgb.bmp", "rgb.tif", "rgb16.png"):
        assert np.array_equal(pixels(name), picture), name
    for name in ("grey16.png", "grey16.tif"):  # 16-bit levels scale by 1/257; clipping would give white
        assert np.array_equal(pixels(name), np.repeat(picture[..., :1], 3, axis=2)), name
    clear = picture[..., 1] <= 127
    assert (pixels("alpha.png")[clear] == 255).all()
    assert np.array_equal(pixels("alpha.png")[~clear], picture[~clear])
    turned = np.rot90(picture, -1).astype(int)
    assert abs(pixels("rotated.jpg") - turned).mean() < 4
    assert abs(pixels("cmyk.jpg").astype(int) - picture).mean() < 4


def test_ugly_folder_is_encoded_and_everything_is_accounted_for(tmp_path):
    ugly.make(tmp_path / "set" / "a")
    manifest = encode(str(tmp_path / "set"), tmp_path / "x.beton", EncodeOptions(split="all", size=16, crop=True))
    assert manifest.n == len(ugly.GOOD)
    assert {Path(path).name for path, _ in manifest.skipped} == set(ugly.BAD)
    assert manifest.n + len(manifest.skipped) == len(list((tmp_path / "set" / "a").iterdir()))
    wanted = {note: sum(note in notes for notes in ugly.GOOD.values()) for note in ("grey", "alpha", "16-bit", "cmyk")}
    assert {note: manifest.converted[note] for note in wanted} == wanted
    assert stored(tmp_path / "x.beton").shape == (len(ugly.GOOD), 3, 16, 16)
    for first in (r"1 files can't be used, first a/notes\.txt", r"a/\w+\.\w+ can't be used: \w+"):
        with pytest.raises(InputError, match=f"{first}.*bad=skip"):
            encode(str(tmp_path / "set"), tmp_path / "y.beton", EncodeOptions(split="all", bad="fail"))
        (tmp_path / "set" / "a" / "notes.txt").unlink(missing_ok=True)
    assert not (tmp_path / "y.beton").exists()


def test_a_link_to_nothing_is_told(folder, tmp_path):
    (folder / "cat" / "2b.png").symlink_to("nowhere.png")
    manifest = encode(str(folder), tmp_path / "x.beton", EncodeOptions(split="all"))
    assert (manifest.n, manifest.skipped) == (12, (("cat/2b.png", "no such file"),))
    assert beton.check(tmp_path / "x.beton").labels.tolist() == [0] * 6 + [1] * 6


def test_order_labels_and_bytes_are_the_folders(folder, tmp_path):
    manifest = encode(str(folder), tmp_path / "x.beton", EncodeOptions(split="all", size=24, crop=True, workers=2))
    expected = [np.asarray(images.fit(Image.open(path), 24, crop=True)) for path in sorted(folder.rglob("*.png"))]
    assert np.array_equal(stored(tmp_path / "x.beton").permute(0, 2, 3, 1).numpy(), np.stack(expected))
    assert beton.check(tmp_path / "x.beton").labels.tolist() == [0] * 6 + [1] * 6
    assert (manifest.classes, manifest.counts) == (("cat", "dog"), {"cat": 6, "dog": 6})


@pytest.mark.parametrize(
    ("size", "shorter"),
    [(20, [20] * 6), (33, [30, 31, 32, 33, 33, 33]), (None, [30, 31, 32, 33, 34, 35])],
)
def test_size_bounds_the_shorter_side_downwards(folder, tmp_path, size, shorter):
    encode(str(folder), tmp_path / "x.beton", EncodeOptions(split="all", size=size))
    file = beton.check(tmp_path / "x.beton")
    assert np.minimum(file.heights, file.widths).tolist() == shorter * 2
    aspects = np.array([(60 - 4 * i) / (30 + i) for i in range(6)] * 2)
    assert abs(file.widths / file.heights - aspects).max() < 0.05


@pytest.mark.parametrize(("mode", "jpeg"), [("raw", 0), ("jpg", 12), ("proportion", range(2, 11))])
def test_modes(folder, tmp_path, mode, jpeg):
    encode(str(folder), tmp_path / "x.beton", EncodeOptions(split="all", mode=mode, size=24, crop=True))
    count = int((beton.check(tmp_path / "x.beton").modes == beton.JPEG).sum())
    assert count in jpeg if isinstance(jpeg, range) else count == jpeg
    raw = np.stack([np.asarray(images.fit(Image.open(p), 24, crop=True)) for p in sorted(folder.rglob("*.png"))])
    difference = abs(stored(tmp_path / "x.beton").permute(0, 2, 3, 1).numpy().astype(int) - raw)
    assert difference.mean() <= (0 if mode == "raw" else 4)


def test_large_images_fit_their_page(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (1100, 1000, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"set/a/{i}.png")
    for mode in ("raw", "jpg"):
        encode(str(tmp_path / "set"), tmp_path / "x.beton", EncodeOptions(split="all", mode=mode, quality=100))
        assert stored(tmp_path / "x.beton", size=64).shape == (3, 3, 64, 64)


def test_limit_is_even_over_the_classes():
    labels = np.array([0] * 50 + [1] * 50 + [2] * 100)
    kept = sources.evenly(labels[np.random.default_rng(0).permutation(200)], 40)
    assert len(kept) == 40
    assert np.bincount(labels[sources.evenly(labels, 40)]).tolist() == [10, 10, 20]
    assert np.array_equal(sources.evenly(labels, None), np.arange(200))


def test_a_second_call_returns_at_once_and_a_change_writes_again(folder, tmp_path):
    dest, options = tmp_path / "x.beton", EncodeOptions(split="all", size=24)
    calls = []
    first = encode(str(folder), dest, options)
    again = encode(str(folder), dest, options, lambda what, done, total: calls.append(what))
    assert (again, set(calls)) == (first, {"ready"})
    assert encode(str(folder), dest, options.model_copy(update={"quality": 80})).sha256
    (folder / "cat" / "0.png").unlink()
    assert encode(str(folder), dest, options).n == 11
    with dest.open("r+b") as file:  # damage of the same length is noticed
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert beton.sha256_of(dest) != first.sha256
    encode(str(folder), dest, options)
    assert beton.check(dest).n == 11


def test_npz_and_idx_sources(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (20, 12, 12), np.uint8)
    labels = np.arange(20) % 3
    np.savez(tmp_path / "x.npz", images=pictures, labels=labels)
    for name, array in (("i", pictures), ("l", labels.astype(np.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (tmp_path / name).write_bytes(header + array.tobytes())
    for source in (str(tmp_path / "x.npz"), f"{tmp_path / 'i'},{tmp_path / 'l'}"):
        manifest = encode(source, tmp_path / "x.beton", EncodeOptions(split="all"))
        assert (manifest.n, manifest.channels) == (20, 1)
        assert np.array_equal(stored(tmp_path / "x.beton")[:, 0].numpy(), pictures)
        sizes = [encode(source, tmp_path / f"{s}.beton", EncodeOptions(split=s)).n for s in ("train", "test")]
        assert sum(sizes) == 20
        assert min(sizes) > 0


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("fashion-mnits", {}, "did you mean 'fashion-mnist'"),
        ("/nowhere/at/all", {}, "not there"),
        ("EMPTY", {"split": "all"}, "no image for split 'all'"),
        ("EMPTY", {"crop": True}, "size=64"),
        ("BROKEN", {"split": "all"}, "no usable image.*empty file"),
    ],
)
def test_bad_sources_are_refused_in_one_line(tmp_path, source, options, message):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN" / "a").mkdir(parents=True)
    (tmp_path / "BROKEN" / "a" / "x.png").touch()
    place = str(tmp_path / source) if source.isupper() else source
    with pytest.raises(InputError, match=message) as error:
        encode(place, tmp_path / "x.beton", EncodeOptions(**options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.beton").exists()


def test_a_full_disk_is_foreseen(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(InputError, match=r"0\.001 MB are free: make room"):
        encode(str(folder), tmp_path / "x.beton", EncodeOptions(split="all"))


FULL = """
import os, shutil, sys
shutil.disk_usage = lambda path: type("Usage", (), {"free": 10**12})  # the room goes after it was looked at
from arae.cli import main
try:
    main()
finally:
    print(sorted(os.listdir(os.path.dirname(sys.argv[3]))), sorted(os.listdir(sys.argv[3] + ".parts")))
"""


@pytest.mark.integration
def test_a_disk_that_fills_up(tmp_path):
    """1 MiB has room for two of six shards."""
    for i in range(6):
        (tmp_path / "set" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(ugly.picture(i, 400, 300)).save(tmp_path / f"set/a/{i}.png")
    arguments = ["encode", tmp_path / "set", tmp_path / "small" / "x.beton", "split=all", "shard=1", "workers=1"]
    ended = on_a_small_disk("1m", tmp_path / "small", [sys.executable, "-c", FULL, *arguments])
    assert ended.returncode == 2, ended.stderr
    assert "x.beton: can't be written (No space left on device); make room" in ended.stderr
    assert "Traceback" not in ended.stderr
    there, parts = map(ast.literal_eval, re.findall(r"\[.*?\]", ended.stdout))
    assert there == [".x.beton.lock", "x.beton.parts"]
    assert len([name for name in parts if name.endswith(".json")]) == 2 + 1  # and the plan
    assert not [name for name in parts if name.startswith(".")]


def test_an_image_that_goes_away_while_writing(folder, tmp_path):
    def remove(what, done, total):
        if (what, done) == ("encoding", 0):
            (folder / "cat" / "3.png").unlink()

    with pytest.raises(InputError, match=r"an image changed or went away while it was read \(.*3\.png"):
        encode(str(folder), tmp_path / "x.beton", EncodeOptions(split="all"), remove)
    assert not (tmp_path / "x.beton").exists()


def test_photographs(tmp_path, test_data):
    with tarfile.open(test_data / "highres.tar") as archive:
        archive.extractall(tmp_path / "set", filter="data")
    manifest = encode(str(tmp_path / "set"), tmp_path / "x.beton", EncodeOptions(split="all", mode="jpg", size=128))
    assert (manifest.n, min(manifest.height[0], manifest.width[0])) == (10, 128)
    assert stored(tmp_path / "x.beton", size=96).float().std() > 30


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("training", "testing"), ("training", "val")])
def test_split_folders_by_their_usual_names(tmp_path: Path, train: str, test: str) -> None:
    from arae.data.images import list_folder

    for part, count in ((train, 3), (test, 2)):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / part / "a" / f"{i}.png")
    held_out = ("test", "testing", "val")
    assert [len(list_folder(tmp_path, split, held_out).labels) for split in ("train", "test", "all")] == [3, 2, 5]
    assert list_folder(tmp_path, "train", held_out).classes == ("a",)
