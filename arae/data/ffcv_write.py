"""Writing `.beton` files with FFCV's writer, in threads.

FFCV's own loop forks processes and waits for ever when one of them dies (a full disk, a broken image). Decoding,
resizing and JPEG release Python's lock, so threads do as well, need no `__main__` guard, and their errors arrive here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

MIN_PAGE = 1 << 21
_POLL = 0.1  # seconds between looks at the counters


class Samples(Protocol):
    """What is written: sample i is ((image uint8 [H, W, 3], as JPEG), label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[tuple[np.ndarray, bool], int]: ...


class _CancelledError(Exception):
    pass


class _Counter:
    """Counts over threads, in place of FFCV's counter over processes; raises in those that wait once one has failed."""

    def __init__(self, failed: threading.Event) -> None:
        self.failed = failed
        self.lock = threading.RLock()
        self.count = 0

    def get_lock(self) -> threading.RLock:  # type: ignore[valid-type]
        return self.lock

    @property
    def value(self) -> int:
        if self.failed.is_set():
            raise _CancelledError
        return self.count

    @value.setter
    def value(self, count: int) -> None:
        self.count = count


def page_size(largest: int) -> int:
    """Smallest page of FFCV's that holds an image of `largest` bytes (a power of two, 2 MiB or more)."""
    # JPEG of noise can be larger than its pixels by its header.
    return max(MIN_PAGE, 1 << (largest + (1 << 16)).bit_length())


def write(
    path: Path, samples: Samples, *, quality: int, largest: int, threads: int, progress: Callable[[int], None]
) -> None:
    """Write the samples in order. `largest` bounds an image's bytes; `progress` is told the number written so far.

    Raises what a thread raised (OSError for a full disk).
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Image(RGBImageField):
        """Takes (image, as JPEG): the choice is the sample's, not drawn from a global generator."""

        def encode(self, destination: Any, image: tuple[np.ndarray, bool], malloc: Any) -> None:
            (jpeg if image[1] else raw).encode(destination, image[0], malloc)

    jpeg, raw = RGBImageField("jpg", jpeg_quality=quality), RGBImageField("raw")

    class Writer(DatasetWriter):
        """FFCV's writer with its processes replaced."""

        def _write_common(self, num_samples: int, queue_content: Any, work_fn: Any, extra_worker_args: Any) -> None:
            self.num_samples = num_samples
            self.prepare()
            shared = self.metadata_sm
            size = num_samples * self.metadata_type.itemsize
            shared.close()  # type: ignore[attr-defined]
            shared.unlink()  # type: ignore[attr-defined]
            self.metadata_sm = SimpleNamespace(buf=bytearray(size))  # one process needs no shared memory
            fields = {"image": Image(), "label": self.fields["label"]}
            self.finalize(_in_threads(self, fields, queue_content, work_fn, extra_worker_args, progress))

    fields = {"image": RGBImageField("raw"), "label": IntField()}
    writer = Writer(str(path), fields, page_size=page_size(largest), num_workers=threads)
    writer.from_indexed_dataset(samples, chunksize=16)


def _in_threads(
    writer: Any, fields: dict[str, Any], chunks: Any, work_fn: Any, extra: Any, progress: Callable[[int], None]
) -> list[Any]:
    """Run FFCV's worker function in threads; their allocations, or the first error of one."""
    from ffcv.memory_allocator import MemoryAllocator

    failed = threading.Event()
    errors: list[BaseException] = []
    done, allocated, written = (_Counter(failed) for _ in range(3))
    work: SimpleQueue[Any] = SimpleQueue()
    results: SimpleQueue[Any] = SimpleQueue()
    for item in (*chunks, *[None] * writer.num_workers):
        work.put(item)

    def run(allocator: Any) -> None:
        try:
            work_fn(work, writer.metadata_sm, writer.metadata_type, fields, allocator, done, results, *extra)
        except BaseException as error:  # noqa: BLE001 -- raised again by the caller
            errors.append(error)
            failed.set()
        finally:
            if hasattr(allocator, "fp"):  # FFCV leaves it open where the last page can't be written
                allocator.fp.close()

    threads = []
    for _ in range(writer.num_workers):
        allocator: Any = MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
        allocator.next_page_allocated, allocator.next_page_written = allocated, written
        threads.append(threading.Thread(target=run, args=(allocator,), daemon=True))
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(_POLL)
                progress(done.count)
    finally:
        failed.set()  # an interrupt here ends the threads too
    real = [error for error in errors if not isinstance(error, _CancelledError)]
    if real:
        raise real[0]
    return [entry for allocations in _drain(results) for entry in allocations]


def _drain(results: SimpleQueue[Any]) -> Iterator[Any]:
    while not results.empty():
        yield results.get()
