"""`arae encode`: any source of images to a `.beton` file with a manifest beside it, all or nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from arae.config import Count, Part, digest_of
from arae.data import beton, ffcv_io, ffcv_write
from arae.data.beton import Manifest, manifest_path
from arae.data.images import UnusableImageError
from arae.data.sources import Found, Survey, find, survey
from arae.errors import InputError
from arae.files import write_text
from arae.seeds import mix, mix_array

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""

_JPEG_SHARE = 0.05  # of the raw bytes, at the least: a plain photograph at quality 90


class EncodeOptions(Part):
    """How images are written."""

    split: Literal["train", "test", "all"] = "train"
    """Which part of the source; sources without parts of their own are divided 90 / 10 by a fixed hash."""
    source: str | None = None
    """Where the files of a catalogue set lie; default: the catalogue's place."""
    mode: Literal["jpg", "raw", "proportion"] = "raw"
    """`jpg` compresses every image, `raw` none, `proportion` a share of them."""
    proportion: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share that `proportion` compresses, by hash of the position."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """JPEG quality."""
    size: Count | None = None
    """Bound of the shorter side in pixels: larger images are scaled down, their aspect kept."""
    crop: bool = False
    """Cut the centre to a square of `size`, scaled up where needed."""
    limit: Count | None = None
    """At most this many images, evenly over the classes."""
    bad: Literal["skip", "fail"] = "skip"
    """What to do with files that are no usable image: list them in the manifest, or stop."""
    seed: int = 0
    """Addresses the choice that `proportion` makes."""
    workers: Count | None = None
    """Threads; default: the cores."""


def encode(source: str, dest: Path, options: EncodeOptions, progress: Progress | None = None) -> Manifest:
    """Write `dest` (.beton) and `dest`.json from a catalogue name, a folder, an `.npz`, or `images-idx,labels-idx`.

    Nothing half is ever under the final name. Where `dest` is there already, made from the same source with the same
    options, it is left as it is. InputError: bad source or option, no usable image, disk full, another writer at work.
    """
    if options.crop and options.size is None:
        raise InputError("crop=true needs a size: give size=64, say")
    if dest.suffix != ".beton":
        raise InputError(f"{dest}: give a name that ends in .beton")
    tell = progress or (lambda what, done, total: None)
    found = find(source, options.source, options.split, options.limit)
    fingerprint = digest_of([found.listing, options.model_dump(mode="json", exclude={"workers", "source"})])
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with _sole_writer(dest):
            ready = _ready(dest, fingerprint)
            if ready:
                tell("ready", ready.n, ready.n)
                return ready
            ffcv_io.need_ffcv(f"encoding to {dest}")
            return _write(source, found, dest, options, fingerprint, tell)
    except UnusableImageError as error:
        raise InputError(
            f"{source}: an image changed while it was read ({error}); run the same command again"
        ) from None
    except OSError as error:
        raise InputError(
            f"{dest}: can't be written ({error.strerror or error}); make room, or choose another place"
        ) from None


def _write(source: str, found: Found, dest: Path, options: EncodeOptions, fingerprint: str, tell: Progress) -> Manifest:
    threads = options.workers or len(os.sched_getaffinity(0))
    seen = survey(found, options.size, crop=options.crop, threads=threads, tell=tell)
    _judge(source, seen, options)
    _check_disk(dest, seen, options)
    samples = _Samples(found, seen, options)
    handle, name = tempfile.mkstemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        ffcv_write.write(
            temporary,
            samples,
            quality=options.quality,
            largest=int((seen.heights * seen.widths).max()) * 3,
            threads=threads,
            progress=lambda done: tell("writing", done, len(samples)),
        )
        beton.check(temporary)
        _sync(temporary)
        manifest = _manifest(source, found, seen, options, fingerprint, temporary)
        temporary.chmod(0o644)
        # The manifest first: killed in between, its hash refuses the old file, and nothing is there without a manifest.
        write_text(manifest_path(dest), manifest.model_dump_json(indent=1) + "\n")
        temporary.replace(dest)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(dest.parent)
    return manifest


class _Samples:
    """What FFCV's writer reads: the usable images, in the order of the source."""

    def __init__(self, found: Found, seen: Survey, options: EncodeOptions) -> None:
        self.found = found
        self.seen = seen
        self.options = options
        share = {"jpg": 1.0, "raw": 0.0, "proportion": options.proportion}[options.mode]
        draws = mix_array(mix(options.seed, "proportion"), np.arange(len(seen.usable))) / 2.0**63
        self.as_jpeg = draws < share

    def __len__(self) -> int:
        return len(self.seen.usable)

    def __getitem__(self, index: int) -> tuple[tuple[np.ndarray, bool], int]:
        position = int(self.seen.usable[index])
        image, _ = self.found.read(position, self.options.size, crop=self.options.crop)
        return (image, bool(self.as_jpeg[index])), int(self.found.labels[position])


def _judge(source: str, seen: Survey, options: EncodeOptions) -> None:
    if seen.skipped and options.bad == "fail":
        path, why = seen.skipped[0]
        raise InputError(f"{source}: {len(seen.skipped)} files can't be used, first {path}: {why}; bad=skip lists them")
    if not len(seen.usable):
        first = f"; first {seen.skipped[0][0]}: {seen.skipped[0][1]}" if seen.skipped else ""
        raise InputError(f"{source}: no usable image for split {options.split!r}{first}")


def _check_disk(dest: Path, seen: Survey, options: EncodeOptions) -> None:
    raw = int((seen.heights * seen.widths).sum()) * 3
    share = {"jpg": _JPEG_SHARE, "raw": 1.0, "proportion": 1 - options.proportion * (1 - _JPEG_SHARE)}[options.mode]
    needed, free = int(raw * share), shutil.disk_usage(dest.parent).free
    if needed > free:
        raise InputError(
            f"{dest}: about {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free: make room, choose "
            f"another place, or a smaller size or limit"
        )


def _manifest(
    source: str, found: Found, seen: Survey, options: EncodeOptions, fingerprint: str, written: Path
) -> Manifest:
    counts = np.bincount(found.labels[seen.usable], minlength=len(found.classes))
    converted: Counter[str] = Counter(note for notes in seen.notes for note in notes)
    return Manifest(
        source=source,
        split=options.split,
        options=options.model_dump(mode="json"),
        fingerprint=fingerprint,
        versions={name: metadata.version(name) for name in ("arae", "ffcv", "numpy", "pillow")},
        sha256=beton.sha256_of(written),
        bytes=written.stat().st_size,
        n=len(seen.usable),
        channels=found.channels,
        height=(int(seen.heights.min()), int(seen.heights.max())),
        width=(int(seen.widths.min()), int(seen.widths.max())),
        classes=found.classes,
        counts=dict(zip(found.classes, counts.tolist(), strict=True)),
        converted=dict(sorted(converted.items())),
        skipped=seen.skipped,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _ready(dest: Path, fingerprint: str) -> Manifest | None:
    """The manifest of a file that is there already and is what would be written."""
    try:
        manifest = beton.read_manifest(dest) if dest.is_file() else None
    except InputError:
        return None
    if manifest is None or manifest.fingerprint != fingerprint or manifest.bytes != dest.stat().st_size:
        return None
    if manifest.bytes <= beton.SHA256_BYTES and beton.sha256_of(dest) != manifest.sha256:
        return None
    return manifest


@contextmanager
def _sole_writer(dest: Path) -> Iterator[None]:
    """Hold `dest` against a second command, and remove what a killed one left."""
    with (dest.parent / f".{dest.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{dest}: another command is writing it; wait for it or stop it") from None
        for leftover in dest.parent.glob(f".{dest.name}.*.tmp"):
            leftover.unlink(missing_ok=True)
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
