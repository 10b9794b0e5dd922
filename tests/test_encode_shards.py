"""Encoding shard by shard: the bytes, what a kill costs, what is damaged, and what a plan says beforehand."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ugly
from PIL import Image

from arae.data import beton, ffcv_write, images, shards
from arae.data.encode import EncodeOptions, InProcess, encode
from arae.data.estimate import estimate
from arae.data.shards import How, Job, Plan, open_parts
from arae.data.sources import find
from arae.errors import InputError

pytest.importorskip("ffcv", reason="FFCV is not installed")

N = 10
SMALL = [(30, 50), (30, 40), (70, 40), (51, 51), (33, 70)]
LARGE = [(600, 900), (30, 40), (700, 1000), (512, 512), (90, 700)]  # 3 bytes a pixel: pages of 2 and 4 MiB get full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five images of different sizes."""
    return make(tmp_path_factory.mktemp("small") / "set", SMALL)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of very different sizes."""
    return make(tmp_path_factory.mktemp("large") / "set", LARGE)


def make(root: Path, sides: list[tuple[int, int]]) -> Path:
    for i in range(N):
        (root / "ab"[i // 5]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(ugly.picture(i, *sides[i % 5])).save(root / "ab"[i // 5] / f"{i}.png", compress_level=1)
    return root


class Recording(InProcess):
    """Encodes here, and notes which shards it was given."""

    def __init__(self) -> None:
        super().__init__(2)
        self.spans: list[tuple[int, int]] = []

    def __call__(self, jobs: Sequence[Job], done: Callable[[int], None]) -> None:
        self.spans += [job.span for job in jobs]
        super().__call__(jobs, done)


def written_by_ffcv(path: Path, folder: Path, mode: str, size: int | None, quality: int) -> bytes:
    """The file that FFCV's own writer makes of the folder, in one process."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Samples:
        files = sorted(folder.rglob("*.png"))

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
            return np.asarray(images.fit(Image.open(self.files[i]), size, crop=False)), i // 5

    sides = [Samples()[i][0].nbytes for i in range(N)]
    fields = {"image": RGBImageField(mode, jpeg_quality=quality), "label": IntField()}
    page = max(1 << 21, 1 << (max(sides) + 65_536).bit_length())
    DatasetWriter(str(path), fields, page_size=page, num_workers=1).from_indexed_dataset(Samples())
    return path.read_bytes()


@pytest.mark.parametrize(("mode", "size", "quality"), [("raw", None, 90), ("jpg", 300, 75)])
def test_the_file_is_that_of_ffcv_s_own_writer_byte_for_byte(
    tmp_path: Path, large: Path, mode: str, size: int | None, quality: int
) -> None:
    theirs = written_by_ffcv(tmp_path / "theirs.beton", large, mode, size, quality)
    options = EncodeOptions.model_validate(
        {"split": "all", "mode": mode, "size": size, "quality": quality, "shard": 3, "workers": 2}
    )
    encode(str(large), tmp_path / "ours.beton", options)
    assert (tmp_path / "ours.beton").read_bytes() == theirs


@pytest.mark.parametrize(
    ("changes", "bad"),
    [
        ({"mode": "raw", "size": 24, "crop": True}, ()),
        ({"mode": "jpg", "size": 40}, (0, 1, 2)),  # unusable images fill, begin and end shards
        ({"mode": "proportion", "proportion": 0.4, "size": 32, "seed": 3}, (3, 9)),
        ({"mode": "raw", "limit": 7, "size": 20}, (5,)),
    ],
)
def test_shards_do_not_show_in_the_file(tmp_path: Path, folder: Path, changes: dict, bad: tuple[int, ...]) -> None:
    for source in folder.rglob("*.png"):
        copy = tmp_path / "set" / source.parent.name / source.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"no image" if int(source.stem) in bad else source.read_bytes())
    made = []
    for shard, threads in ((None, 2), (1, 1), (3, 3)):
        dest = tmp_path / f"{shard}.beton"
        options = EncodeOptions.model_validate({"split": "all", "shard": shard, "workers": threads} | changes)
        manifest = encode(str(tmp_path / "set"), dest, options)
        assert {name for name, _ in manifest.skipped} <= {f"{'ab'[i // 5]}/{i}.png" for i in bad}
        assert manifest.n + len(manifest.skipped) == changes.get("limit", N)
        made.append((dest.read_bytes(), manifest.fingerprint, manifest.counts, manifest.skipped, manifest.sha256))
    assert made[0] == made[1] == made[2]
    assert beton.sha256_of(tmp_path / "None.beton") == made[0][-1]
    assert not list(tmp_path.glob("*.parts"))


KILLED = """
import sys
from pathlib import Path
from arae.data.encode import EncodeOptions, encode
def tell(what, done, total):
    print(what, done, flush=True)
    if done == 5:
        sys.stdin.read()  # for ever
encode(sys.argv[1], Path(sys.argv[2]), EncodeOptions(split="all", size=64, shard=2, workers=1), tell)
"""


@pytest.fixture
def killed(tmp_path: Path, folder: Path) -> Path:
    """Where an encoding was killed in the middle of its third shard of five."""
    dest = tmp_path / "x.beton"
    command = [sys.executable, "-c", KILLED, str(folder), str(dest)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        while run.stdout.readline() != "encoding 5\n":
            assert run.poll() is None
        run.send_signal(signal.SIGKILL)
    assert not dest.exists()
    return dest


def test_a_kill_costs_the_shard_in_work_and_no_other(tmp_path: Path, folder: Path, killed: Path) -> None:
    parts = tmp_path / "x.beton.parts"
    names = [f"{at:09}-{at + 2:09}.{kind}" for at in (0, 2) for kind in ("images", "json")]
    assert sorted(p.name for p in parts.iterdir() if p.name[0] != ".") == [*names, "plan.json"]
    assert list(parts.glob(".*")), "nothing was in work"
    again, said, counts = Recording(), [], []
    options = EncodeOptions(split="all", size=64)  # goes on with the shards as they were
    encode(str(folder), killed, options, lambda *told: counts.append(told), runner=again, note=said.append)
    assert again.spans == [(4, 6), (6, 8), (8, 10)]
    assert counts[0] == ("encoding", 4, N)
    assert "4 of the images are encoded already" in said
    encode(str(folder), tmp_path / "y.beton", options)
    assert killed.read_bytes() == (tmp_path / "y.beton").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == [
        f"{name}{kind}" for name in ("x.beton", "y.beton") for kind in ("", ".json")
    ]


def interrupt(what: str, done: int, total: int) -> None:
    if what == "joining":
        raise KeyboardInterrupt


def damage(parts: Path, what: str) -> None:
    shard = parts / "000000002-000000004.images"
    content = bytearray(shard.read_bytes())
    record = shard.with_suffix(".json")
    if what == "flipped":
        content[len(content) // 2] ^= 1
    if what == "cut short":
        del content[-7:]
    shard.write_bytes(content)
    if what == "no images":
        shard.unlink()
    if what == "record torn":
        record.write_text(record.read_text()[:50])
    if what == "of another plan":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"key": "other"}))


@pytest.mark.parametrize("what", ["flipped", "cut short", "no images", "record torn", "of another plan"])
def test_a_torn_shard_is_detected_and_encoded_again(tmp_path: Path, folder: Path, what: str) -> None:
    options = EncodeOptions(split="all", size=64, shard=2)
    whole = tmp_path / "y.beton"
    encode(str(folder), whole, options)
    dest, parts = tmp_path / "x.beton", tmp_path / "x.beton.parts"
    with pytest.raises(KeyboardInterrupt):
        encode(str(folder), dest, options, interrupt)
    assert not dest.exists()
    damage(parts, what)
    again, said = Recording(), []
    encode(str(folder), dest, options, runner=again, note=said.append)
    assert again.spans == [(2, 4)]
    assert any("not the bytes that were written" in line for line in said) is (what == "flipped")
    assert dest.read_bytes() == whole.read_bytes()


def test_shards_of_other_options_are_not_used(tmp_path: Path, folder: Path) -> None:
    dest, runners = tmp_path / "x.beton", (Recording(), Recording())
    with pytest.raises(KeyboardInterrupt):
        encode(str(folder), dest, EncodeOptions(split="all", size=64), interrupt, runner=runners[0])
    encode(str(folder), dest, EncodeOptions(split="all", size=32), runner=runners[1])
    assert [each.spans for each in runners] == [[(0, N)], [(0, N)]]
    assert np.minimum(*(getattr(beton.check(dest), side) for side in ("heights", "widths"))).max() == 32


class Rotten(InProcess):
    """A disk that does not give back what it was given."""

    def __call__(self, jobs: Sequence[Job], done: Callable[[int], None]) -> None:
        super().__call__(jobs, done)
        for job in jobs:
            shard = job.folder / f"{job.span[0]:09}-{job.span[1]:09}.images"
            shard.write_bytes(bytes(shard.stat().st_size))


def test_a_disk_that_always_tears_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"x\.beton\.parts: what is read there is not what was written; check"):
        encode(str(folder), tmp_path / "x.beton", EncodeOptions(split="all", size=16), runner=Rotten(1))
    assert not (tmp_path / "x.beton").exists()


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ("nothing", r"does not see .*parts.*NFS"),
        ("another plan", r"does not see .*parts"),
        ("no images", r"can't read"),
    ],
)
def test_a_worker_that_does_not_see_the_storage_says_so(tmp_path: Path, folder: Path, seen: str, message: str) -> None:
    found, how = find(str(folder), None, "all", None), How(0.0, 90, 16, False, 0, "skip")
    plan = Plan(key="k", images=N, per_shard=N)
    if seen != "nothing":
        open_parts(tmp_path / "parts", plan if seen != "another plan" else Plan(key="k", images=N, per_shard=2))
    part = found.part(0, N)
    if seen == "no images":
        part = replace(part, root=tmp_path / "nowhere")
    job = Job(tmp_path / "parts", plan, (0, N), part, how)
    with pytest.raises(InputError, match=message):
        job.check_place()
    shutil.rmtree(tmp_path / "parts", ignore_errors=True)
    open_parts(tmp_path / "parts", plan)
    replace(job, found=found.part(0, N)).check_place()


@pytest.mark.parametrize(("mode", "share"), [("raw", 0.0), ("jpg", 1.0), ("proportion", 0.5)])
def test_the_plan_of_photographs_is_near_what_comes_out(
    tmp_path: Path, test_data: Path, mode: str, share: float
) -> None:
    with tarfile.open(test_data / "imagenet_even.tar") as archive:
        archive.extractall(tmp_path / "set", members=archive.getmembers()[:260], filter="data")
    said: list[str] = []
    options = EncodeOptions.model_validate({"split": "all", "mode": mode})
    guess = estimate(find(str(tmp_path / "set"), None, "all", None), How(share, 90, None, False, 0, "skip"))
    manifest = encode(str(tmp_path / "set"), tmp_path / "x.beton", options, note=said.append)
    # The first and the last page are partly empty, which counts for little in a long file.
    assert guess.file_bytes(share) == pytest.approx(manifest.bytes - (2 << 20), rel=0.1, abs=2 << 20)
    assert (guess.images, len(guess.sample)) == (manifest.n, 128)
    assert 0 < guess.read_s < 1
    assert f"{manifest.n:,} images, estimated from 128: jpg" in said[0]
    assert " (chosen)" in said[0]


def test_pages_are_reckoned_with(tmp_path: Path) -> None:
    """Images a little larger than half a page leave almost half of it empty."""
    np.savez(tmp_path / "x.npz", images=np.zeros((8, 600, 600, 3), np.uint8), labels=np.arange(8))
    guess = estimate(find(str(tmp_path / "x.npz"), None, "all", None), How(0.0, 90, None, False, 0, "skip"))
    manifest = encode(str(tmp_path / "x.npz"), tmp_path / "x.beton", EncodeOptions(split="all"))
    assert guess.shard_bytes(0.0) == 8 * 600 * 600 * 3
    assert guess.file_bytes(0.0) == pytest.approx(8 * 2**21)
    assert manifest.bytes == pytest.approx(9 * 2**21, rel=1e-3)
    # A long file has larger pages, of which seven such images leave a tenth.
    longer = replace(guess, images=100_000)
    assert longer.file_bytes(0.0) == pytest.approx(100_000 / 7 * 2**23, rel=1e-3)


@pytest.mark.parametrize(
    ("largest", "total", "page"),
    [
        (1, 1, 2**21),
        (2**21 - 2**16 - 1, 2**21, 2**21),
        (2**21 - 2**16, 2**21, 2**22),  # with the room that JPEG of noise may need
        (600_000, 2**26, 2**21),
        (600_000, 2**26 + 1, 2**22),
        (600_000, 2**40, 2**23),
        (10**8, 2**40, 2**27),
    ],
)
def test_pages_hold_the_largest_image_and_long_files_have_ffcv_s_usual_ones(
    largest: int, total: int, page: int
) -> None:
    assert ffcv_write.page_size(largest, total) == page


def test_shards_hold_some_seconds_work(tmp_path: Path) -> None:
    for side, images_in in ((2, 16_384), (512, 682)):
        np.savez(tmp_path / "x.npz", images=np.zeros((2, side, side), np.uint8), labels=np.arange(2))
        guess = estimate(find(str(tmp_path / "x.npz"), None, "all", None), How(0.0, 90, None, False, 0, "skip"))
        assert guess.per_shard == images_in
    assert Plan(key="", images=7, per_shard=3).spans() == [(0, 3), (3, 6), (6, 7)]


def test_two_workers_at_one_shard_leave_it_whole(tmp_path: Path, folder: Path) -> None:
    """One that was given up for lost may finish late: it writes the same bytes, under a name of its own until then."""
    plan, how = Plan(key="k", images=N, per_shard=N), How(1.0, 90, 32, False, 0, "skip")
    open_parts(tmp_path / "parts", plan)
    job = Job(tmp_path / "parts", plan, (0, N), find(str(folder), None, "all", None).part(0, N), how)
    job.run(1)
    record = shards.read_record(job.folder, plan, job.span)
    assert record
    before = b"".join(shards.images_of(job.folder, job.span, record))
    job.run(3)
    assert shards.read_record(job.folder, plan, job.span) == record
    assert b"".join(shards.images_of(job.folder, job.span, record)) == before
    assert sorted(path.suffix for path in job.folder.iterdir()) == [".images", ".json", ".json"]
