"""`arae encode`: any source of images to a `.beton` file with a manifest beside it, all or nothing, shard by shard."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field

from arae.config import Count, Part, digest_of
from arae.data import beton, estimate, ffcv_io, ffcv_write, shards
from arae.data.beton import Manifest, manifest_path
from arae.data.shards import How, Job, Plan, Record, TornShardError, read_record
from arae.data.sources import Found, LostImageError, find
from arae.errors import InputError
from arae.files import Written, write_text, write_with
from arae.storage.remote import as_url, is_url

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""

JOINS = 3  # times that shards may turn out damaged before the disk is to blame


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
    """Threads, where this process encodes; default: the cores."""
    shard: Count | None = None
    """Images in a shard, the piece that a kill can cost; default: by their size, some seconds' work."""


class Runner(Protocol):
    """Encodes shards somewhere: here, or on a cluster."""

    workers: int
    """Images that are encoded at a time."""

    def __call__(self, jobs: Sequence[Job], done: Callable[[int], None]) -> None:
        """Run every job; `done` is called with the number of their images done so far. Raises what `Job.run` raises."""


class InProcess:
    """Shard after shard, each in threads."""

    def __init__(self, threads: int | None) -> None:
        self.workers = threads or len(os.sched_getaffinity(0))

    def __call__(self, jobs: Sequence[Job], done: Callable[[int], None]) -> None:
        """See `Runner`."""
        before = 0
        for job in jobs:
            job.run(self.workers, lambda count, before=before: done(before + count))
            before += len(job.found.labels)


def encode(
    source: str,
    dest: Path,
    options: EncodeOptions,
    progress: Progress | None = None,
    *,
    runner: Runner | None = None,
    note: Callable[[str], None] | None = None,
) -> Manifest:
    """Write `dest` (.beton) and `dest`.json from a catalogue name, a folder, an `.npz`, or `images-idx,labels-idx`.

    Nothing half is ever under the final name. Killed, the same command goes on from the shards in `dest`.parts. Where
    `dest` is there already, made from the same source with the same options, it is left as it is. The bytes are the
    same wherever `runner` (default: this process) encodes the shards. `note` is told the plan before anything is
    written. InputError: bad source or option, no usable image, disk full, another writer at work.
    """
    if options.crop and options.size is None:
        raise InputError("crop=true needs a size: give size=64, say")
    if is_url(dest):
        raise InputError(f"{as_url(dest)}: give a path; copy the finished file there with the .json beside it")
    if dest.suffix != ".beton":
        raise InputError(f"{dest}: give a name that ends in .beton")
    found = find(source, options.source, options.split, options.limit)
    tell = progress or (lambda what, done, total: None)
    work = _Work(source, found, dest, options, runner or InProcess(options.workers), tell)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with _sole_writer(dest):
            ready = _ready(dest, work.fingerprint)
            if ready:
                tell("ready", ready.n, ready.n)
                return ready
            if find_spec("ffcv") is None:  # writing could do without, but hardly anything could read it
                ffcv_io.need_ffcv(f"encoding to {dest}")
            return work.write(note or (lambda text: None))
    except LostImageError as error:
        raise InputError(
            f"{source}: an image changed or went away while it was read ({error}); run the same command again"
        ) from None
    except OSError as error:
        raise InputError(
            f"{dest}: can't be written ({error.strerror or error}); make room, or choose another place"
        ) from None


class _Work:
    """One encoding under way."""

    def __init__(
        self, source: str, found: Found, dest: Path, options: EncodeOptions, runner: Runner, tell: Progress
    ) -> None:
        self.source, self.found, self.dest, self.options = source, found, dest, options
        self.runner, self.tell = runner, tell
        self.parts = dest.absolute().with_name(dest.name + ".parts")
        chosen = options.model_dump(mode="json", exclude={"workers", "source", "shard"})
        self.fingerprint = digest_of([found.listing, chosen])
        share = {"jpg": 1.0, "raw": 0.0, "proportion": options.proportion}[options.mode]
        self.how = How(share, options.quality, options.size, options.crop, options.seed, options.bad)

    def write(self, note: Callable[[str], None]) -> Manifest:
        if self.found.skipped and self.options.bad == "fail":
            (path, why), count = self.found.skipped[0], len(self.found.skipped)
            raise InputError(f"{self.source}: {count} files can't be used, first {path}: {why}; bad=skip lists them")
        plan = self._plan(note)
        for _ in range(JOINS):
            shards.open_parts(self.parts, plan)
            self._encode(plan)
            try:
                manifest = self._join(plan)
            except TornShardError as torn:
                note(f"{torn}: encoded again")
                continue
            shutil.rmtree(self.parts, ignore_errors=True)
            return manifest
        raise InputError(f"{self.parts}: what is read there is not what was written; check that disk")

    def _plan(self, note: Callable[[str], None]) -> Plan:
        """Say what it will take, and refuse what does not fit."""
        guess = estimate.estimate(self.found, self.how)
        key = digest_of([self.fingerprint, _versions()])
        plan = shards.find_plan(self.parts, key)
        if plan is None or self.options.shard not in (None, plan.per_shard):
            plan = Plan(key=key, images=guess.images, per_shard=self.options.shard or guess.per_shard)
        kept = plan.images - sum(stop - start for start, stop in self._missing(plan))
        for line in estimate.described(guess, self.dest, self.runner.workers, kept / plan.images):
            note(line)
        if kept:
            note(f"{kept:,} of the images are encoded already")
        estimate.check_disk(guess, self.dest, kept / plan.images)
        return plan

    def _missing(self, plan: Plan) -> list[tuple[int, int]]:
        return [span for span in plan.spans() if read_record(self.parts, plan, span) is None]

    def _encode(self, plan: Plan) -> None:
        """Encode the shards that are not there."""
        missing = self._missing(plan)
        kept = plan.images - sum(stop - start for start, stop in missing)
        jobs = [Job(self.parts, plan, span, self.found.part(*span), self.how) for span in missing]
        if jobs:
            self.tell("encoding", kept, plan.images)
            self.runner(jobs, lambda done: self.tell("encoding", kept + done, plan.images))

    def _join(self, plan: Plan) -> Manifest:
        """Make the file of the shards, and check it."""
        there = {span: read_record(self.parts, plan, span) for span in plan.spans()}
        records = {span: record for span, record in there.items() if record}
        if len(records) < len(there):
            raise TornShardError(f"{self.parts}: a shard has gone")
        contents = self._contents(list(records.values()))
        images = (image for span, record in records.items() for image in shards.images_of(self.parts, span, record))
        temporary = self.dest.with_name(f".{self.dest.name}.whole.tmp")
        n = len(contents.sizes)
        try:
            written = write_with(
                temporary,
                lambda file: ffcv_write.write(file, contents, images, lambda done: self.tell("joining", done, n)),
            )
            beton.check(temporary)
            manifest = self._manifest(list(records.values()), contents, written)
            # The manifest first: killed in between, its hash refuses the old file; nothing is there without a manifest.
            write_text(manifest_path(self.dest), manifest.model_dump_json(indent=1) + "\n")
            temporary.replace(self.dest)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(self.dest.parent)
        return manifest

    def _contents(self, records: Sequence[Record]) -> ffcv_write.Contents:
        def column(name: str) -> np.ndarray:
            return np.concatenate([np.array(getattr(record, name), np.int64) for record in records])

        positions = column("positions")
        if not len(positions):
            shutil.rmtree(self.parts, ignore_errors=True)
            skipped = self._skipped(records)
            first = f"; first {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise InputError(f"{self.source}: no usable image for split {self.options.split!r}{first}")
        names = ("heights", "widths", "modes", "sizes")
        return ffcv_write.Contents(*(column(name) for name in names), labels=self.found.labels[positions])

    def _skipped(self, records: Sequence[Record]) -> tuple[tuple[str, str], ...]:
        return (*self.found.skipped, *(each for record in records for each in record.skipped))

    def _manifest(self, records: Sequence[Record], contents: ffcv_write.Contents, written: Written) -> Manifest:
        found = self.found
        converted: Counter[str] = Counter()
        for record in records:
            converted.update(record.converted)
        counts = np.bincount(contents.labels, minlength=len(found.classes))
        return Manifest(
            source=self.source,
            split=self.options.split,
            options=self.options.model_dump(mode="json"),
            fingerprint=self.fingerprint,
            versions=_versions(),
            sha256=written.sha256,
            bytes=written.bytes,
            n=len(contents.sizes),
            channels=found.channels,
            height=(int(contents.heights.min()), int(contents.heights.max())),
            width=(int(contents.widths.min()), int(contents.widths.max())),
            classes=found.classes,
            counts=dict(zip(found.classes, counts.tolist(), strict=True)),
            converted=dict(sorted(converted.items())),
            skipped=self._skipped(records),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("arae", "ffcv", "numpy", "pillow")}


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
