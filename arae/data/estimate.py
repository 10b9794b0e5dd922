"""What an encoding will take, from a sample of its images: bytes in every mode, time, and whether the disk has room."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from arae.data import ffcv_write
from arae.data.images import UnusableImageError
from arae.data.shards import How, encoded
from arae.data.sources import Found
from arae.errors import InputError

SAMPLE = 128
SHARD_BYTES = 512 << 20  # of pixels: some ten seconds' work for one core
SHARD_IMAGES = 16_384
PAGES, MOST = 64, 20_000  # pages that are filled to see how full they get, by so many images at the most
_MARGIN = 1.1  # the mean of 128 photographs is seldom out by more


@dataclass(frozen=True)
class Estimate:
    """A sample of the images of a source, as they will be written, and what follows for all of them."""

    images: int
    """In the whole source."""
    sample: np.ndarray
    """Bytes of each image of the sample, raw and as JPEG: int64 [m, 2]."""
    read_s: float
    """CPU seconds to read and fit one image."""
    jpeg_s: float
    """CPU seconds to compress it."""
    how: How

    def shard_bytes(self, jpeg_share: float) -> float:
        """Of all the images, where such a share of them is compressed."""
        return float(self.images * (self.sample.mean(axis=0) @ (1 - jpeg_share, jpeg_share)))

    def file_bytes(self, jpeg_share: float) -> float:
        """Of the `.beton`: pages are never quite full."""
        page = ffcv_write.page_size(int(self.sample[:, 0].max()), int(self.shard_bytes(jpeg_share)))
        enough = int(PAGES * page * self.images / self.shard_bytes(jpeg_share))
        many = np.resize(self.sample, (min(MOST, max(len(self.sample), enough)), 2))
        # Compressed ones evenly among the others.
        as_jpeg = np.diff(np.floor(np.arange(len(many) + 1) * jpeg_share)) > 0
        sizes = np.where(as_jpeg, many[:, 1], many[:, 0])
        places, _ = ffcv_write.places(sizes, page, 0)
        last = places[-1] // page * page  # the last page is partly empty, which a long file has but once
        room = float(last / sizes[places < last].sum()) if last else 1.0
        return room * self.shard_bytes(jpeg_share)

    @property
    def core_seconds(self) -> float:
        """CPU seconds for the whole source."""
        return self.images * (self.read_s + self.how.jpeg_share * self.jpeg_s)

    @property
    def per_shard(self) -> int:
        """Images in a shard, the same for the same source and options."""
        mean = self.sample[:, 0].mean() if len(self.sample) else 1
        return int(min(SHARD_IMAGES, max(1, SHARD_BYTES // mean)))


def estimate(found: Found, how: How) -> Estimate:
    """Encode up to 128 images, evenly over the source, and write none. Images that can't be used are passed over."""
    total = len(found.labels)
    positions = np.unique(np.linspace(0, total - 1, min(SAMPLE, total)).astype(int)).tolist()
    raw = replace(how, jpeg_share=0.0)
    sizes, seconds = [], []
    for position in [positions[0], *positions]:  # the first twice: it loads the libraries
        try:
            start = time.thread_time()
            plain = encoded(found, position, position, raw)
            middle = time.thread_time()
            pixels = np.frombuffer(plain.content, np.uint8).reshape(plain.height, plain.width, 3)
            small = ffcv_write.jpeg(pixels, how.quality)
            end = time.thread_time()
        except UnusableImageError:
            continue
        sizes.append((len(plain.content), len(small)))
        seconds.append((middle - start, end - middle))
    if not sizes:
        return Estimate(total, np.zeros((0, 2), np.int64), 0, 0, how)
    read_s, jpeg_s = np.mean(seconds[1:] or seconds, axis=0).tolist()
    return Estimate(total, np.array(sizes[1:] or sizes), read_s, jpeg_s, how)


def described(guess: Estimate, dest: Path, workers: int, kept: float) -> list[str]:
    """The plan for people: sizes in every mode, what the disk must hold, how long it takes. `kept`: share done."""
    if not len(guess.sample):
        return [f"{guess.images:,} images, and none of a sample can be used"]
    share = guess.how.jpeg_share
    sizes = ", ".join(
        f"{name} {_size(guess.file_bytes(part))}{' (chosen)' if part == share else ''}" for name, part in _modes(share)
    )
    left = guess.core_seconds * (1 - kept)
    return [
        f"{guess.images:,} images, estimated from {len(guess.sample)}: {sizes}",
        f"shards and file together need {_size(needed(guess, kept))}, {_size(_free(dest))} are free; "
        f"{_clock(left)} of one core, so about {_clock(left / workers)} on {workers}",
    ]


def check_disk(guess: Estimate, dest: Path, kept: float) -> None:
    """InputError where the disk of `dest` can't hold the shards that are still to be made and the file beside them."""
    need, free = needed(guess, kept), _free(dest)
    if need > free:
        raise InputError(
            f"{dest}: about {_size(need)} are needed (shards and file, for a while both), {_size(free)} are free: "
            f"make room, choose another place, or a smaller size or limit"
        )


def needed(guess: Estimate, kept: float) -> float:
    """Bytes that shards and file still take, with a margin for what the sample may be out by."""
    if not len(guess.sample):
        return 0
    share, margin = guess.how.jpeg_share, _MARGIN if len(guess.sample) < guess.images else 1
    return margin * (guess.shard_bytes(share) * (1 - kept) + guess.file_bytes(share)) + ffcv_write.MIN_PAGE


def _modes(share: float) -> list[tuple[str, float]]:
    own = [] if share in (0.0, 1.0) else [(f"proportion={share:g}", share)]
    return [("jpg", 1.0), *own, ("raw", 0.0)]


def _free(dest: Path) -> int:
    return shutil.disk_usage(dest.parent).free


def _size(count: float) -> str:
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count / 1e6:.2g} MB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
