import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import ugly
from PIL import Image, ImageFilter

from arae.config import Data
from arae.data import beton, ffcv_io, windows
from arae.data.encode import EncodeOptions, encode
from arae.data.load import open_source, stream, to_channels
from arae.errors import InputError
from arae.seeds import mix

CPU = torch.device("cpu")
needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A .beton of 20 pictures of different sizes, half of them JPEG."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(20):
        folder = root / "set" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ugly.picture(i, 40 + i, 70 - 2 * i)).save(folder / f"{i:02}.png")
    encode(str(root / "set"), root / "x.beton", EncodeOptions(split="all", mode="proportion"))
    return root / "x.beton"


@pytest.fixture
def grey(tmp_path) -> Path:
    """An .npz of 50 grey images, 16 pixels."""
    images = np.random.default_rng(0).integers(0, 256, (50, 16, 16), np.uint8)
    np.savez(tmp_path / "grey.npz", images=images, labels=np.arange(50) % 5)
    return tmp_path / "grey.npz"


def drawn(source, ids: np.ndarray) -> torch.Tensor:
    return torch.stack(list(source.batches(ids)))


def crops(path: Path, **options) -> ffcv_io.Decoding:
    return ffcv_io.Decoding(beton.check(path), (24, 24), crop_seed=3, **options)


@pytest.mark.parametrize(("n", "batch"), [(100, 32), (7, 20), (64, 64)])
def test_stream_is_each_sample_once_an_epoch_and_entered_anywhere(n, batch):
    steps = math.ceil(4 * n / batch)
    whole = stream(n, batch, 5, 0, steps)
    epochs = whole.reshape(-1)[: 4 * n].reshape(4, n)
    assert np.array_equal(np.sort(epochs, 1), np.arange(4 * n).reshape(4, n))
    orders = {tuple(row % n) for row in epochs}
    assert len(orders) == 4
    for first in range(steps):
        assert np.array_equal(stream(n, batch, 5, first, steps), whole[first:])
    assert stream(n, batch, 5, 3, 3).shape == (0, batch)
    assert not np.array_equal(stream(n, batch, 6, 0, steps), whole)


def test_stream_is_fixed():
    # A change here would make every unfinished run go on with other batches.
    expected = [[7, 9, 1, 0, 4], [8, 2, 3, 6, 5], [12, 16, 19, 14, 17], [11, 13, 15, 10, 18]]
    assert stream(10, 5, 0, 0, 4).tolist() == expected


def test_arrays_are_resident(grey):
    source = open_source(Data(train=str(grey)), "train", CPU)
    images = np.load(grey)["images"]
    ids = stream(50, 8, 0, 3, 9)
    assert (source.n, source.shape, source.classes) == (50, (1, 16, 16), tuple("01234"))
    assert np.array_equal(drawn(source, ids)[:, :, 0].numpy(), images[ids % 50])
    assert source.labels.tolist() == (np.arange(50) % 5).tolist()


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"size": 8}, (1, 8, 8)), ({"channels": 3}, (3, 16, 16)), ({"size": 24, "channels": 3}, (3, 24, 24))],
)
def test_arrays_take_the_recipes_size_and_channels(grey, options, shape):
    source = open_source(Data(train=str(grey), **options), "train", CPU)
    assert (source.shape, drawn(source, np.arange(4)[None]).shape[2:]) == (shape, torch.Size(shape))


@pytest.mark.parametrize(("limit", "kept"), [(5, [0, 10, 20, 30, 40]), (50, range(50)), (99, range(50))])
def test_limit_is_even_over_the_training_file_only(grey, limit, kept):
    data = Data(train=str(grey), test=str(grey), limit=limit)
    train, test = open_source(data, "train", CPU), open_source(data, "test", CPU)
    images = np.load(grey)["images"]
    assert np.array_equal(drawn(train, np.arange(train.n)[None])[0, :, 0].numpy(), images[list(kept)])
    assert test.n == 50


def test_colour_becomes_luma_and_grey_stays_exact():
    colour = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    expected = [np.asarray(Image.fromarray(x.permute(1, 2, 0).numpy()).convert("L")) for x in colour]
    assert np.array_equal(to_channels(colour, 1)[:, 0].numpy(), np.stack(expected))
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_channels(to_channels(grey, 3), 1), grey)


@pytest.mark.parametrize("written", ["npz", pytest.param("beton", marks=needs_ffcv)])
def test_pixels_as_they_are_need_no_ffcv(grey, tmp_path, written):
    path = grey if written == "npz" else tmp_path / "x.beton"
    if written == "beton":
        encode(str(grey), path, EncodeOptions(split="all"))
    script = (
        "import sys, torch; sys.modules['ffcv'] = None\n"
        "from arae.config import Data; from arae.data.load import open_source\n"
        f"print(open_source(Data(train={str(path)!r}), 'train', torch.device('cpu')).n)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.returncode) == ("50", 0), run.stderr


@needs_ffcv
@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_a_file_that_is_held_is_what_is_streamed(tmp_path, mode, monkeypatch):
    """Of one size, in several chunks: raw pixels are copied, JPEG is decoded."""
    monkeypatch.setattr("arae.data.ffcv_io.CHUNK", 8)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 10, 3), np.uint8)
    np.savez(tmp_path / "c.npz", images=pixels, labels=np.arange(30) % 2)
    encode(str(tmp_path / "c.npz"), tmp_path / "c.beton", EncodeOptions(split="all", mode=mode))
    held, streamed = (
        open_source(Data(train=str(tmp_path / "c.beton"), loader=loader), "train", CPU)
        for loader in ("resident", "ffcv")
    )
    ids = stream(30, 10, 0, 0, 3)
    assert torch.equal(drawn(held, ids), drawn(streamed, ids))
    if mode == "raw":
        assert np.array_equal(drawn(held, np.arange(30)[None])[0].permute(0, 2, 3, 1).numpy(), pixels)


@needs_ffcv
def test_a_file_that_becomes_shorter_is_refused(grey, tmp_path):
    path = tmp_path / "x.beton"
    encode(str(grey), path, EncodeOptions(split="all"))
    file = beton.check(path)
    os.truncate(path, int(file.pointers.max()) + 1)
    with pytest.raises(InputError, match=r"x\.beton has become shorter while it was read"):
        list(file.pixels(np.arange(file.n), 8))


@needs_ffcv
def test_beton_and_arrays_give_the_same_bytes_resident_and_streamed(grey, tmp_path):
    encode(str(grey), tmp_path / "x.beton", EncodeOptions(split="all"))
    ids = stream(20, 8, 0, 0, 10)
    batches = [
        drawn(open_source(Data(train=str(path), loader=loader, limit=20), "train", CPU), ids)
        for path, loader in ((grey, "auto"), (tmp_path / "x.beton", "resident"), (tmp_path / "x.beton", "ffcv"))
    ]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])


@needs_ffcv
@pytest.mark.parametrize(("loader", "kind"), [("auto", "Resident"), ("ffcv", "Ffcv")])
def test_varying_sizes_are_centre_cropped_to_the_recipes_size(photos, loader, kind):
    source = open_source(Data(train=str(photos), size=32, loader=loader), "train", CPU)
    assert (type(source).__name__, source.shape, source.n, source.classes) == (kind, (3, 32, 32), 20, ("a", "b"))
    assert source.labels.tolist() == [0] * 10 + [1] * 10
    first = drawn(source, np.array([[0]]))[0, 0].permute(1, 2, 0).numpy().astype(int)
    expected = ugly.picture(0, 40, 70)[:, 15:55]
    expected = np.asarray(Image.fromarray(expected).resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert np.median(abs(first - expected)) <= 3


@needs_ffcv
def test_random_crops_are_addressed(photos, monkeypatch):
    ids = stream(20, 6, 0, 0, 7)
    images = drawn(crops(photos), ids)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))  # threads, whatever this machine has
    for workers in (1, 2, 5):
        assert torch.equal(drawn(crops(photos, workers=workers), ids), images), workers
    assert torch.equal(drawn(crops(photos), ids[4:]), images[4:])
    assert torch.equal(drawn(crops(photos), ids[:, ::-1]), images.flip(1))
    flat, order = images.flatten(0, 1)[:40], ids.reshape(-1)[:40]
    by_epoch = [flat[e * 20 :][np.argsort(order[e * 20 : e * 20 + 20] % 20)] for e in range(2)]
    assert all(not torch.equal(a, b) for a, b in zip(*by_epoch, strict=True))


def test_random_crops_have_the_promised_scale_and_aspect():
    epochs, same = np.arange(3000), np.full(3000, 400)
    found = windows.random(mix(0, "crop"), epochs, np.full(3000, 17), same, same)
    top, left, height, width = found.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 400).all()
    assert (left + width <= 400).all()
    share, aspect = height * width / 160_000, width / height
    assert 0.075 < share.min() < 0.1
    assert 0.85 < share.max() <= 1
    assert 0.73 < aspect.min() < 0.78
    assert 1.28 < aspect.max() < 1.36
    assert abs(np.log(aspect).mean()) < 0.02
    assert len(set(map(tuple, found.tolist()))) > 2900


def test_random_crops_equal_a_plain_python_reference():
    address = mix(5, "crop")

    def uniform(epoch, sample, number):
        return (mix(address, epoch, sample, number) >> 10) * 2.0**-53

    def expected(epoch, sample, height, width):
        for k in range(0, 40, 4):
            area = height * width * (0.08 + 0.92 * uniform(epoch, sample, k))
            root = math.exp((2 * uniform(epoch, sample, k + 1) - 1) * math.log(4 / 3) / 2)
            w, h = round(math.sqrt(area) * root), round(math.sqrt(area) / root)
            if 0 < w <= width and 0 < h <= height:
                top = int(uniform(epoch, sample, k + 2) * (height - h + 1))
                return [top, int(uniform(epoch, sample, k + 3) * (width - w + 1)), h, w]
        h, w = min(height, width * 4 // 3), min(width, height * 4 // 3)
        return [(height - h) // 2, (width - w) // 2, h, w]

    sizes = [(300, 400), (97, 640), (500, 40), (32, 32), (1, 1)]
    asked = [(epoch, sample, *size) for sample, size in enumerate(sizes) for epoch in range(30)]
    assert windows.random(address, *np.array(asked).T).tolist() == [expected(*each) for each in asked]


@pytest.mark.parametrize(
    ("size", "out", "expected"),
    [
        ((40, 60), (40, 40), (0, 10, 40, 40)),
        ((60, 40), (40, 40), (10, 0, 40, 40)),
        ((30, 100), (20, 40), (0, 20, 30, 60)),
        ((100, 30), (20, 40), (42, 0, 15, 30)),
        ((1, 50), (8, 8), (0, 24, 1, 1)),
        ((1, 1), (16, 2), (0, 0, 1, 1)),
    ],
)
def test_the_window_in_the_middle(size, out, expected):
    heights, widths = (np.array([side]) for side in size)
    assert windows.centred(heights, widths, out).tolist() == [list(expected)]


RESIZED = [  # the file's image → the output, and how far Pillow's may be, in decibels
    ((50, 70), 96, 50),  # enlarged: FFCV's own comes to 42
    ((110, 110), 96, 45),  # a little smaller
    ((300, 400), 96, 38),  # a third: without averages over areas it would be 31
]


@needs_ffcv
@pytest.mark.parametrize(("shape", "size", "least"), RESIZED)
def test_windows_are_resized_as_pillow_does(tmp_path, shape, size, least):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    picture = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.2))
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        picture.save(tmp_path / "set" / label / "1.png")
    encode(str(tmp_path / "set"), tmp_path / "x.beton", EncodeOptions(split="all", mode="raw"))
    file = beton.check(tmp_path / "x.beton")
    (made,) = ffcv_io.Decoding(file, (size, size)).batches(np.array([[0]]))
    top, left, h, w = windows.centred(file.heights[:1], file.widths[:1], (size, size))[0].tolist()
    expected = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    error = made[0].permute(1, 2, 0).numpy().astype(float) - np.asarray(expected)
    assert 20 * math.log10(255 / math.sqrt((error**2).mean())) > least


@needs_ffcv
def test_a_damaged_jpeg_is_refused_and_not_shown(photos, tmp_path):
    """Which pixels it would have depends on the image before it."""
    for name in ("x.beton", "x.beton.json"):
        shutil.copy(photos.parent / name, tmp_path / name)
    file = beton.check(tmp_path / "x.beton")
    hurt = int(np.flatnonzero(file.modes == beton.JPEG)[1])
    with (tmp_path / "x.beton").open("r+b") as opened:
        opened.seek(int(file.pointers[hurt]))
        opened.write(bytes(8))
    with pytest.raises(InputError, match=rf"x\.beton: image {hurt} is a damaged JPEG; encode the set again"):
        list(ffcv_io.Decoding(file, (24, 24)).batches(np.arange(20).reshape(4, 5)))


@needs_ffcv
def test_the_recipe_asks_for_crops_and_the_seed_moves_them(photos):
    data = Data(train=str(photos), test=str(photos), size=24, augment=("crop",))
    ids = np.arange(20)[None]
    train = [drawn(open_source(data, "train", CPU, seed=seed), ids) for seed in (0, 0, 1)]
    assert torch.equal(train[0], train[1])
    assert not torch.equal(train[0], train[2])
    test = [drawn(open_source(data, "test", CPU, seed=seed), ids) for seed in (0, 1)]
    assert torch.equal(test[0], test[1])
    with pytest.raises(InputError, match=r"data.loader = resident can't make random crops"):
        open_source(data.model_copy(update={"loader": "resident"}), "train", CPU)


@needs_ffcv
@pytest.mark.parametrize("workers", [1, 3])
def test_abandoned_and_failing_iterators_end(photos, monkeypatch, workers):
    import threading

    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    before = (torch.get_num_threads(), threading.active_count())
    decoding = crops(photos, workers=workers)
    batches = decoding.batches(stream(20, 4, 0, 0, 200))
    next(batches)
    batches.close()
    assert (torch.get_num_threads(), threading.active_count()) == before
    with monkeypatch.context() as patch:
        patch.setattr("arae.data.windows.random", lambda *_: np.zeros((4, 0), np.int64))
        with pytest.raises(ValueError, match="not enough values"):  # in one of the threads that decode
            list(decoding.batches(stream(20, 4, 0, 0, 20)))
    assert (torch.get_num_threads(), threading.active_count()) == before
    from ffcv.loader.epoch_iterator import EpochIterator

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(EpochIterator, "run_pipeline", broken)
    with pytest.raises(RuntimeError, match="broken"):
        list(crops(photos).batches(stream(20, 2, 0, 0, 20)))


def _edit(offset: int, value: bytes):
    def edit(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(value)

    return edit


def _cut(size: int):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def _without_manifest(damage):
    def both(path: Path) -> None:
        beton.manifest_path(path).unlink()
        damage(path)

    return both


def _manifest(**changes):
    def edit(path: Path) -> None:
        manifest = beton.read_manifest(path)
        assert manifest
        beton.manifest_path(path).write_text(manifest.model_copy(update=changes).model_dump_json())

    return edit


def _label(value: int):
    return _without_manifest(_edit(24 + 2 * 1041 + 16, value.to_bytes(8, "little", signed=True)))


def _relabelled(path: Path) -> None:
    _edit(24 + 2 * 1041 + 16, (7).to_bytes(8, "little"))(path)
    _manifest(sha256=beton.sha256_of(path))(path)


@needs_ffcv
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is not there; `arae encode /path/to/images .*x.beton( split=test)?` writes it"),
        (_cut(100_000), "truncated or changed"),
        (_without_manifest(_cut(100_000)), "truncated or damaged"),
        (_without_manifest(_cut(1000)), "not a .beton file"),
        (_without_manifest(_cut(0)), "not a .beton file"),
        (_without_manifest(lambda path: path.write_bytes(b"\x93NUMPY" * 5000)), "not a .beton file"),
        (_without_manifest(_edit(8, b"\xff" * 8)), "truncated or damaged"),
        (_without_manifest(_edit(16, b"\xff" * 8)), "truncated or damaged"),
        (_without_manifest(_edit(16, b"\0" * 8)), "never finished"),
        (_without_manifest(_edit(24, b"\5")), "other fields"),
        (_without_manifest(_edit(24 + 2 * 1041 + 5, b"\xff" * 8)), "damaged"),
        (_edit(3 << 20, b"\x55"), "another SHA-256"),
        (_label(-1), "labels from -1"),
        (_relabelled, "labels from 0 to 7, out of range for 2 classes"),
        (_manifest(classes=("a",)), "out of range for 1 classes"),
        (_manifest(height=(10, 20)), r"count or resolution"),
        (lambda path: beton.manifest_path(path).write_text("{"), "not a manifest"),
    ],
)
@pytest.mark.parametrize("key", ["train", "test"])
def test_bad_files_are_refused_in_one_line(photos, tmp_path, damage, message, key):
    path = tmp_path / "x.beton"
    shutil.copy(photos, path)
    shutil.copy(beton.manifest_path(photos), beton.manifest_path(path))
    damage(path)
    with pytest.raises(InputError, match=message) as error:
        open_source(Data(train=str(path), test=str(path), size=32), key, CPU)
    assert "\n" not in str(error.value)
    assert "x.beton" in str(error.value)
    assert f"data.{key}" in str(error.value)


@needs_ffcv
def test_varying_sizes_without_a_size_are_refused(photos):
    with pytest.raises(InputError, match=r"data.train: .* 40 to 59 pixels high: set data.size"):
        open_source(Data(train=str(photos)), "train", CPU)


def test_a_split_that_is_not_named(tmp_path):
    with pytest.raises(InputError, match=r"data.test is not set: `arae encode /path/to/images test.beton split=test`"):
        open_source(Data(), "test", CPU)


def test_ffcv_leaves_torch_its_threads(tmp_path: Path) -> None:
    """In a fresh process, for the import alone would set them to one."""
    np.savez(tmp_path / "a.npz", images=np.zeros((8, 8, 8, 3), np.uint8), labels=np.arange(8) % 2)
    script = f"""
import torch
from pathlib import Path
torch.set_num_threads(2)
from arae.config import Data
from arae.data.encode import EncodeOptions, encode
from arae.data.load import open_source
encode({str(tmp_path / "a.npz")!r}, Path({str(tmp_path / "a.beton")!r}), EncodeOptions(split="all"))
assert torch.get_num_threads() == 2, "encoding"
source = open_source(Data(train={str(tmp_path / "a.beton")!r}, loader="ffcv"), "train", torch.device("cpu"))
assert torch.get_num_threads() == 2, "loading"
from ffcv.fields.rgb_image import IMAGE_MODES
assert type(IMAGE_MODES) is dict, "seconds of compiling, in every process"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
