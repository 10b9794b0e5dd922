"""Copies of data files on this machine's disk; which cache FFCV reads them through."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from arae.config import Data
from arae.data import beton, cache, ffcv_io, memory, staging
from arae.data.encode import EncodeOptions, encode
from arae.data.load import describe, fingerprint
from arae.errors import InputError, Stopped
from arae.storage import Away, Remote

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Path:
    """A folder with train.beton and its manifest: 120 images of 160 pixels, in several of the file's pages."""
    root = tmp_path_factory.mktemp("encoded")
    images = np.random.default_rng(0).integers(0, 256, (240, 160, 160, 3), np.uint8)
    np.savez(root / "images.npz", images=images, labels=np.arange(240) % 3)
    encode(str(root / "images.npz"), root / "train.beton", EncodeOptions(split="all", mode="raw"))
    return root


@pytest.fixture
def shelf(encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files on storage of the test's own; a scratch folder; nothing staged yet in this process."""
    monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("ARAE_STAGE", "1")
    monkeypatch.setattr(staging, "_ready", {})
    (tmp_path / "shelf").mkdir()
    for path in encoded.glob("train.beton*"):
        shutil.copy(path, tmp_path / "shelf")
    return tmp_path / "shelf"


def staged(path: Path | str, said: list[str] | None = None) -> Path:
    """As a process does that begins now."""
    staging._ready.clear()
    return staging.local(str(path), "data.train", (said if said is not None else []).append)


def test_what_is_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "scratch"))
    inside = str(tmp_path / "scratch" / "x.beton")
    for asked, named, expected in [
        ("", "/nfs/x.beton", False),
        ("0", "/nfs/x.beton", False),
        ("1", "/nfs/x.beton", True),
        ("1", inside, False),
        ("/nfs:/lustre", "/nfs/x.beton", True),
        ("/nfs:/lustre", "/nfsx/x.beton", False),
        ("", "s3://bucket/x.beton", True),
    ]:
        monkeypatch.setenv("ARAE_STAGE", asked)
        assert staging.is_staged(named) is expected, (asked, named)


@pytest.mark.parametrize("kind", ["path", "url"])
def test_a_copy_is_made_once_and_again_where_it_is_damaged_or_old(shelf: Path, kind: str) -> None:
    origin = shelf / "train.beton"
    named, said = str(origin) if kind == "path" else f"local://{origin}", list[str]()
    path = staged(named, said)
    assert path.read_bytes() == origin.read_bytes()
    assert beton.read_manifest(path) == beton.read_manifest(origin)
    assert path.is_relative_to(staging.scratch())
    first = path.stat()
    assert staged(named, said).stat().st_ino == first.st_ino
    assert said == []
    data = Data.model_validate({"name": "images", "train": named})
    local = Data.model_validate({"name": "images", "train": str(path)})
    assert fingerprint(data, "train") == fingerprint(local, "train")
    assert describe(data, "train") == describe(local, "train")

    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged, why in [(bytes(content), "another SHA-256"), (bytes(content[:-7]), "its size")]:
        path.write_bytes(damaged)
        said.clear()
        assert staged(named, said).read_bytes() == origin.read_bytes()
        assert [why in line and "copied anew" in line for line in said] == [True]

    (shelf / "train.beton.json").unlink()  # another file now, as far as can be told
    os.utime(origin, (1, 1))
    other = staged(named, said)
    assert other != path
    assert "only the copy's size is checked" in said[-1]


def test_a_copy_cut_short_is_gone_on_with(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin, whole = shelf / "train.beton", (shelf / "train.beton").read_bytes()
    asked: list[int] = []
    pieces = staging.Origin.pieces

    def counted(self, start: int):
        asked.append(start)
        return pieces(self, start)

    path = staged(origin)
    monkeypatch.setattr(staging.Origin, "pieces", counted)
    cases = [(whole[:12345], [12345]), (b"\0" * 12345, [12345, 0]), (whole + b"more", [0])]
    for part, reads in cases:  # a part that is good, one that is not, one that is too long
        path.unlink()
        path.with_name("train.beton.part").write_bytes(part)
        asked.clear()
        assert staged(origin).read_bytes() == whole
        assert asked == reads
        assert not path.with_name("train.beton.part").exists()


def test_storage_that_is_away_at_the_start(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, said, away = f"local://{shelf}/train.beton", list[str](), 10**9
    entry = Remote.entry

    def failing(self: Remote, name: str = ""):
        nonlocal away
        away -= 1
        if away >= 0:
            raise Away(f"{self.shown}: no answer (timeout)")
        return entry(self, name)

    monkeypatch.setattr(Remote, "entry", failing)
    monkeypatch.setenv("ARAE_STORAGE_WAIT", "0.1")
    with pytest.raises(Stopped, match=r"no answer .timeout.; run the same command again"):
        staged(named, said)
    monkeypatch.setenv("ARAE_STORAGE_WAIT", "60")
    away = 2  # for a moment
    path = staged(named, said)
    assert said == []
    away = 10**9
    assert staged(named, said) == path
    assert ["no answer" in line and "of when it last did, is used" in line for line in said] == [True]
    monkeypatch.setenv("ARAE_STORAGE_WAIT", "0.1")
    change(path, lambda content: content.__setitem__(99, content[99] ^ 1))
    with pytest.raises(Stopped, match="no answer"):  # a copy that is damaged is of no use
        staged(named, said)


def change(path: Path, edit: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda shelf: (shelf / "train.beton").unlink(), "is not there"),
        (lambda shelf: change(shelf / "train.beton", lambda c: c.pop()), "truncated or changed"),
        (lambda shelf: change(shelf / "train.beton", lambda c: c.__setitem__(99, 1)), "another SHA-256"),
        (lambda shelf: (shelf / "train.beton.json").write_text("{}"), "not a manifest"),
    ],
)
@pytest.mark.parametrize("kind", ["path", "url"])
def test_what_can_not_be_staged_is_one_line(shelf: Path, kind: str, spoil: Callable[[Path], None], said: str) -> None:
    spoil(shelf)
    named = str(shelf / "train.beton") if kind == "path" else f"local://{shelf}/train.beton"
    with pytest.raises(InputError, match=said) as error:
        staged(named)
    assert str(error.value).startswith("data.train: ")
    assert "\n" not in str(error.value)
    assert not list(staging.scratch().rglob("*.beton"))


def test_room_is_made_by_what_is_longest_unused_and_never_by_what_is_used(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (shelf / "train.beton").stat().st_size
    for name in "abcd":
        shutil.copy(shelf / "train.beton", shelf / f"{name}.beton")
        os.utime(shelf / f"{name}.beton", (ord(name), ord(name)))
    monkeypatch.setenv("ARAE_SCRATCH_GB", str(2.5 * size / 1e9))
    kept = staging._ready  # each stands for another process
    paths, locks = {}, {}
    for name in "ab":
        paths[name] = staged(shelf / f"{name}.beton")
        locks[name] = kept[str(shelf / f"{name}.beton")][1]
        os.utime(paths[name].parent / ".used", (ord(name), ord(name)))
    with pytest.raises(InputError, match=r"has room for .* set ARAE_SCRATCH to a folder on a larger disk"):
        staged(shelf / "c.beton")
    os.close(locks["a"])
    os.close(locks["b"])
    paths["c"] = staged(shelf / "c.beton")
    assert [paths[name].exists() for name in "abc"] == [False, True, True]
    fcntl.flock(os.open(paths["b"].parent / ".used", os.O_RDWR), fcntl.LOCK_SH)
    os.close(kept[str(shelf / "c.beton")][1])
    paths["d"] = staged(shelf / "d.beton")
    assert [paths[name].exists() for name in "abcd"] == [False, True, False, True]
    monkeypatch.setenv("ARAE_SCRATCH_GB", "plenty")
    with pytest.raises(InputError, match="ARAE_SCRATCH_GB=plenty: write a number"):
        staged(shelf / "a.beton")


def test_of_the_workers_of_a_machine_one_copies_and_the_others_wait(shelf: Path, tmp_path: Path) -> None:
    origin, whole = shelf / "train.beton", (shelf / "train.beton").read_bytes()
    folder = staged(origin).parent
    (folder / "train.beton").unlink()
    code = "import sys; from arae.data.staging import local; print(local(sys.argv[1], 'data.train'))"
    with (folder / ".lock").open("ab") as lock:  # as a worker holds it that copies
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "train.beton.part").write_bytes(whole[: len(whole) // 4])
        waiting = [
            subprocess.Popen([sys.executable, "-c", code, str(origin)], stdout=-1, stderr=-1, text=True)
            for _ in range(2)
        ]
        for each in waiting:
            assert each.stderr is not None
            assert "another process copies" in (line := each.stderr.readline())
            assert "25%" in line
        assert not (folder / "train.beton").exists()
    for each in waiting:
        out, _ = each.communicate(timeout=60)
        assert Path(out.strip()).read_bytes() == whole


CACHES = [  # file bytes, pages of the batches, available, processes → cache; a page is 100 bytes, an image 50
    (1000, [[0, 1], [2, 3]], 1000, 1, "page"),  # it fits
    (10000, [[i, i] for i in range(100)], 1000, 1, "process"),  # in order: four pages at once
    (10000, [[i, i] for i in range(100)], 1000, 2, "page"),  # but not for two processes
    (10000, [[i, 99 - i] for i in range(100)], 1000, 1, "page"),  # all over the file: nearly all of it at once
    (10000, [[i, i + 50] for i in range(0, 50, 9)], 100000, 1, "page"),
    (200000, [[9 * i, 9 * i] for i in range(100)], 1000, 1, "process"),  # two images of each page
    (200000, [[9 * i] for i in range(100)], 1000, 1, "process"),  # one, which is half of it
]


@pytest.mark.parametrize(("size", "pages", "available", "processes", "expected"), CACHES)
def test_the_cache_by_memory(size: int, pages: list[list[int]], available: int, processes: int, expected: str) -> None:
    array = np.array(pages)
    assert cache.best_cache(size, array, 100, 50 * array.size, available, processes) == expected
    # Reading a page for a small part of it is never worth it.
    assert cache.best_cache(10**9, array, 100, array.size, available, processes) == "page"


def test_pages_held_at_once_are_those_ffcv_makes_room_for() -> None:
    schedule = pytest.importorskip("ffcv.memory_managers.process_cache.schedule")
    random = np.random.default_rng(0)
    for pages, batches, size in [(5, 30, 4), (40, 30, 4), (300, 50, 2), (1, 1, 1)]:
        drawn = random.integers(0, pages, (batches, size))
        ours = cache.held_at_once(drawn)
        theirs = schedule.compute_schedule([set(row.tolist()) for row in drawn]).num_slots
        assert ours == theirs, (pages, batches, size)


@needs_ffcv
def test_both_caches_give_the_same_bytes_in_any_epoch(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = beton.check(encoded / "train.beton")
    ids = np.random.default_rng(1).permutation(file.n * 3)[:240].reshape(8, 30)
    found = {}
    for kind in ("page", "process"):
        monkeypatch.setenv("ARAE_FFCV_CACHE", kind)
        decoding = ffcv_io.Decoding(file, (32, 32), crop_seed=1)
        found[kind] = torch.stack([*decoding.batches(ids), *decoding.batches(ids[::-1])])
        assert list(decoding._loaders) == [kind]
    assert torch.equal(found["page"], found["process"])
    monkeypatch.setenv("ARAE_FFCV_CACHE", "both")
    with pytest.raises(InputError, match="ARAE_FFCV_CACHE=both: write page, process or auto"):
        next(ffcv_io.Decoding(file, (32, 32)).batches(ids))


@needs_ffcv
def test_a_file_larger_than_memory_is_read_in_order_through_the_process_cache(
    encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = beton.check(encoded / "train.beton")
    size = file.path.stat().st_size
    in_order, at_random = np.arange(240).reshape(24, 10), np.random.default_rng(0).permutation(240).reshape(24, 10)
    for available, ids, expected in [
        (size, at_random, ["page"]),
        (size - 1, at_random, ["page"]),
        (size - 1, in_order, ["page", "process"]),  # the first to look at the file by
    ]:
        monkeypatch.setattr(ffcv_io, "available_memory", lambda available=available: available)
        decoding = ffcv_io.Decoding(file, (16, 16))
        assert len(list(decoding.batches(ids))) == 24
        assert list(decoding._loaders) == expected


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_memory_is_the_least_of_machine_and_control_groups(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 50 kB\n")
    root, own = tmp_path / "cgroup", tmp_path / "own"

    def there() -> int:
        return memory.available_memory(tmp_path / "meminfo", own, root)

    assert there() == 50 * 1024  # no control groups
    own.write_text("0::/pod/container\n")
    group(root, memory__stat="")
    group(root / "pod", memory__max=40000, memory__current=30000, memory__stat="inactive_file 900\nactive_file 100\n")
    group(root / "pod" / "container", memory__max="max", memory__current=30000, memory__stat="inactive_file 7")
    assert there() == 11000
    own.write_text("0::/not/seen/from/inside\n")
    group(root, memory__max=20000, memory__current=19000)
    assert there() == 1000
    own.write_text("4:cpu,memory:/job\n0::/\n")
    group(root, memory__max="max")
    stat = "total_inactive_file 500\ntotal_active_file 0\n"
    group(root / "memory" / "job", memory__limit_in_bytes=9000, memory__usage_in_bytes=8000, memory__stat=stat)
    assert there() == 1500
