"""The shards of an encoding: runs of images that are encoded apart, kept in `DEST.parts/`, and read in order at last.

A shard is two files: the images' bytes one behind the other, then a record of what they are, with their SHA-256. A
shard is there when its record is, so a kill costs the shards that were in work and no others. Nothing depends on where
or by whom a shard was encoded: two workers that take the same one write the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from arae.config import Part
from arae.data import beton, ffcv_write
from arae.data.images import UnusableImageError
from arae.data.sources import Found
from arae.errors import InputError
from arae.files import HashingFile, Written, write_text, write_with
from arae.seeds import mix

PLAN = "plan.json"
ARRAY_CHUNK = 64  # images of an array that a thread takes at a time


@dataclass(frozen=True)
class How:
    """How one image becomes bytes; see `EncodeOptions`."""

    jpeg_share: float
    quality: int
    size: int | None
    crop: bool
    seed: int
    bad: Literal["skip", "fail"]


class Record(Part):
    """What a shard holds: one entry an image, in order."""

    key: str
    """Of the plan that it belongs to."""
    sha256: str
    bytes: int
    positions: tuple[int, ...]
    """Of the images that could be used, in the source."""
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    modes: tuple[int, ...]
    sizes: tuple[int, ...]
    """Bytes."""
    converted: dict[str, int]
    skipped: tuple[tuple[str, str], ...]


class Plan(Part):
    """What `DEST.parts` holds the shards of. Its file tells a worker that it sees the same storage."""

    key: str
    """Hash of all that the images' bytes follow from."""
    images: int
    """Images of the source."""
    per_shard: int

    def spans(self) -> list[tuple[int, int]]:
        """(first, one behind the last) of every shard."""
        return [(at, min(at + self.per_shard, self.images)) for at in range(0, self.images, self.per_shard)]


class TornShardError(Exception):
    """A shard's bytes are not those that its record describes; it has been removed."""


def find_plan(folder: Path, key: str) -> Plan | None:
    """The plan of the shards that are there, where it has this key."""
    try:
        plan = Plan.model_validate_json((folder / PLAN).read_bytes())
    except (OSError, ValidationError):
        return None
    return plan if plan.key == key else None


def open_parts(folder: Path, plan: Plan) -> None:
    """Make the folder ready for the plan's shards; those of another plan are removed."""
    if find_plan(folder, plan.key) != plan:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLAN, plan.model_dump_json())
    for leftover in folder.glob(".*"):  # of a command that was killed
        leftover.unlink(missing_ok=True)


def read_record(folder: Path, plan: Plan, span: tuple[int, int]) -> Record | None:
    """The record of a shard that is there, and as long as it says; None for any other."""
    images, record = _names(folder, span)
    try:
        found = Record.model_validate_json(record.read_bytes())
        return found if found.key == plan.key and found.bytes == images.stat().st_size else None
    except (OSError, ValidationError):
        return None


def images_of(folder: Path, span: tuple[int, int], record: Record) -> Iterator[bytes]:
    """The bytes of each image. TornShardError, after the last, where they are not those that were written."""
    images, described = _names(folder, span)
    digest = hashlib.sha256()
    with images.open("rb") as file:
        for size in record.sizes:
            content = file.read(size)
            digest.update(content)
            if len(content) < size:
                break
            yield content
    if digest.hexdigest() != record.sha256:
        described.unlink(missing_ok=True)
        raise TornShardError(f"{images}: not the bytes that were written")


@dataclass(frozen=True)
class Job:
    """One shard to be encoded: all that whoever does it needs, wherever it runs."""

    folder: Path
    """`DEST.parts`, absolute."""
    plan: Plan
    span: tuple[int, int]
    found: Found
    """The shard's images alone."""
    how: How

    def check_place(self) -> None:
        """InputError where this machine does not see the shards' folder or the images, or may not write."""
        host, tell = socket.gethostname(), "use storage that every node mounts at the same place, as NFS"
        if find_plan(self.folder, self.plan.key) != self.plan:
            raise InputError(f"{host} does not see {self.folder}, where the command writes: {tell}")
        some = [self.found.root / path for path in self.found.paths[:: len(self.found.paths) // 8 + 1]]
        if some and not any(os.access(path, os.R_OK) for path in some):
            raise InputError(f"{host} can't read {some[0]}: {tell}")
        if not os.access(self.folder, os.W_OK):
            raise InputError(f"{host} may not write to {self.folder}: give its user the right to")

    def run(self, threads: int, tell: Callable[[int], None] | None = None) -> None:
        """Encode the shard; `tell` is called with the number of images looked at so far.

        LostImageError and OSError where storage fails; InputError for a bad image where `how.bad` is `fail`.
        """
        images, described = _names(self.folder, self.span)
        # A name of one's own: a worker that was given up for lost may still be at the same shard.
        own = self.folder / f".{images.name}-{socket.gethostname()}-{os.getpid()}"
        table = _Table()
        try:
            written = write_with(own, lambda file: self._encode(file, table, threads, tell or (lambda done: None)))
            own.replace(images)
            write_text(own, table.record(self.plan.key, written).model_dump_json())
            own.replace(described)
        finally:
            own.unlink(missing_ok=True)

    def _encode(self, file: HashingFile, table: _Table, threads: int, tell: Callable[[int], None]) -> None:
        total = len(self.found.labels)
        step = 1 if self.found.paths else ARRAY_CHUNK  # of small images, the handing over would take most of the time
        with ThreadPoolExecutor(threads) as pool:
            for start, images in zip(range(0, total, step), self._in_order(pool, step, 4 * threads), strict=True):
                for at, image in enumerate(images, start):
                    self._put(at, image, file, table)
                tell(min(start + step, total))

    def _put(self, at: int, image: Encoded | str, file: HashingFile, table: _Table) -> None:
        if not isinstance(image, str):
            file.write(image.content)
            table.add(self.span[0] + at, image)
        elif self.how.bad == "fail":
            raise InputError(f"{self.found.paths[at]} can't be used: {image}; bad=skip lists such files")
        else:
            table.skipped.append((self.found.paths[at], image))

    def _images(self, start: int, stop: int) -> list[Encoded | str]:
        def one(at: int) -> Encoded | str:
            try:
                return encoded(self.found, at, self.span[0] + at, self.how)
            except UnusableImageError as error:
                return str(error)

        return [one(at) for at in range(start, min(stop, len(self.found.labels)))]

    def _in_order(self, pool: ThreadPoolExecutor, step: int, ahead: int) -> Iterator[list[Encoded | str]]:
        """The images, `step` at a time: only `ahead` lists are held, and an interrupt stops it."""
        waiting: deque[Future[list[Encoded | str]]] = deque()
        starts = iter(range(0, len(self.found.labels), step))
        try:
            for start in itertools.islice(starts, ahead):
                waiting.append(pool.submit(self._images, start, start + step))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(self._images, at, at + step) for at in itertools.islice(starts, 1))
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class Encoded:
    """One image as it will lie in the file."""

    content: bytes
    mode: int
    height: int
    width: int
    notes: frozenset[str]


def encoded(found: Found, at: int, position: int, how: How) -> Encoded:
    """Image `at` of `found`, which is image `position` of the whole source; raises what `Found.read` raises."""
    image, notes = found.read(at, how.size, crop=how.crop)
    if 0 < how.jpeg_share < 1:
        as_jpeg = mix(mix(how.seed, "proportion"), position) / 2.0**63 < how.jpeg_share
    else:
        as_jpeg = how.jpeg_share == 1
    mode = beton.JPEG if as_jpeg else beton.RAW
    content = ffcv_write.jpeg(image, how.quality) if mode == beton.JPEG else image.tobytes()
    return Encoded(content, mode, image.shape[0], image.shape[1], frozenset(notes))


class _Table:
    """A record that grows."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.converted: Counter[str] = Counter()
        self.skipped: list[tuple[str, str]] = []

    def add(self, position: int, image: Encoded) -> None:
        self.rows.append((position, image.height, image.width, image.mode, len(image.content)))
        self.converted.update(image.notes)

    def record(self, key: str, written: Written) -> Record:
        positions, heights, widths, modes, sizes = zip(*self.rows, strict=True) if self.rows else ((),) * 5
        return Record(
            key=key,
            sha256=written.sha256,
            bytes=written.bytes,
            positions=positions,
            heights=heights,
            widths=widths,
            modes=modes,
            sizes=sizes,
            converted=dict(self.converted),
            skipped=tuple(self.skipped),
        )


def _names(folder: Path, span: tuple[int, int]) -> tuple[Path, Path]:
    stem = f"{span[0]:09}-{span[1]:09}"
    return folder / f"{stem}.images", folder / f"{stem}.json"
