"""Reading `.beton` files through FFCV, with a decoder and an iterator of our own.

FFCV's random crops draw from per-thread state, which can't be repeated; ours are a hash of (seed, epoch, sample). Its
resize enlarges by nearest neighbour (OpenCV's INTER_AREA), and most random crops of ImageNet at 256 pixels are smaller
than 224; ours interpolates. Its compiler takes seconds in every process, and what is compiled spends its time in the
same libraries: our decoder is Python, and threads share a batch, for those libraries let go of the interpreter.
FFCV's iterator hides errors of its thread and hangs; ours passes them on. FFCV is imported only where it is used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from arae.data import windows
from arae.data.beton import JPEG, Beton
from arae.data.cache import Cache, best_cache, chosen_cache
from arae.data.memory import available_memory
from arae.errors import InputError
from arae.seeds import mix

CHUNK = 256
AREA_FROM = 1.25
"""How many times both sides of a window are those of the image to be, from which pixels are averaged over areas."""


class Decoding:
    """Decodes samples of a `.beton` to uint8 [m, 3, H, W]: the centre, or with `crop_seed` random resized crops.

    `workers` threads decode a batch (clamped to the cores); the bytes are the same for any number of them.
    """

    def __init__(
        self,
        file: Beton,
        size: tuple[int, int],
        *,
        crop_seed: int | None = None,
        workers: int = 1,
    ) -> None:
        self.file = file
        self.size = size
        self.crop_seed = crop_seed
        self.workers = max(1, min(workers, len(os.sched_getaffinity(0))))
        self._loaders: dict[Cache, Any] = {}

    def batches(self, ids: np.ndarray) -> Iterator[torch.Tensor]:
        """For ids int64 [k, m] (epoch * samples of the file + sample): k tensors uint8 [m, 3, H, W] on the CPU,
        channels-last, as the trainers want them."""
        if not ids.size:
            return
        loader = self._loader(ids)
        loader.batch_size = ids.shape[1]
        iterator = _iterator_class()(loader, np.ascontiguousarray(ids.reshape(-1)))
        try:
            for (images,) in iterator:
                yield torch.from_numpy(images).permute(0, 3, 1, 2)
            if iterator.error is not None:
                raise iterator.error
        finally:
            iterator.close()

    def _loader(self, ids: np.ndarray) -> Any:
        """FFCV's loader with the cache that is best for these ids; at most one of each is opened."""
        kind = chosen_cache()
        size, available = self.file.path.stat().st_size, available_memory()
        if kind is None and size <= available:
            kind = "page"
        if kind is None:
            reader = self._opened("page").reader
            table = reader.alloc_table[np.argsort(reader.alloc_table["sample_id"], kind="stable")]
            rows = ids % self.file.n
            pages, wanted = (table["ptr"] // reader.page_size)[rows], int(table["size"][rows].sum())
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            kind = best_cache(size, pages.astype(np.int64), int(reader.page_size), wanted, available, processes)
        return self._opened(kind)

    def _opened(self, kind: Cache) -> Any:
        if kind not in self._loaders:
            loader = self._loaders[kind] = self._open(kind)
            schedule, n = loader.memory_manager.schedule_epoch, self.file.n
            # Our ids carry the epoch; the cache knows samples of the file.
            loader.memory_manager.schedule_epoch = lambda batches: schedule([batch % n for batch in batches])
        return self._loaders[kind]

    def _open(self, kind: Cache) -> Any:
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline.compiler import Compiler

        image, label = self.file.fields
        pipelines: Any = {image: [_decoder_class()(self)], label: None}
        before = (torch.get_num_threads(), Compiler.is_enabled)
        Compiler.set_enabled(False)
        try:
            # FFCV's constructor sets the threads of torch for the whole process; the threads that decode are ours.
            return Loader(
                str(self.file.path),
                batch_size=1,
                num_workers=1,
                os_cache=kind == "page",
                order=OrderOption.SEQUENTIAL,
                pipelines=pipelines,
                drop_last=False,
                batches_ahead=2,
            )
        finally:
            torch.set_num_threads(before[0])
            Compiler.set_enabled(before[1])


class Ffcv:
    """Streams a `.beton`; for sets larger than memory, and for random crops. See `arae.data.load.Source`."""

    def __init__(
        self,
        decoding: Decoding,
        rows: np.ndarray,
        convert: Callable[[torch.Tensor], torch.Tensor],
        channels: int,
        device: torch.device,
    ) -> None:
        file = decoding.file
        self.decoding = decoding
        self.rows = rows
        self.convert = convert
        self.device = device
        self.n = len(rows)
        self.shape = (channels, *decoding.size)
        self.classes = file.classes
        self.labels = torch.from_numpy(file.labels[rows])

    def batches(self, ids: np.ndarray) -> Iterator[torch.Tensor]:
        """See `Source.batches`."""
        in_file = ids // self.n * self.decoding.file.n + self.rows[ids % self.n]
        for images in self.decoding.batches(in_file):
            yield self.convert(images).to(self.device)


def in_chunks(decoding: Decoding, rows: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
    """Every sample of `rows` once: (position of the first, images uint8 [m, 3, H, W])."""
    whole = len(rows) // CHUNK * CHUNK
    for ids in (rows[:whole].reshape(-1, CHUNK), rows[None, whole:]):
        start = 0 if ids.shape[0] != 1 or ids.shape[1] == CHUNK else whole
        for images in decoding.batches(ids):
            yield start, images
            start += len(images)


def need_ffcv(what: str) -> None:
    """InputError where FFCV can't be imported. Call it before any other import of FFCV's."""
    threads = torch.get_num_threads()
    try:
        import numba.typed

        # FFCV keeps the names of its two modes in a typed dictionary, whose methods Numba would compile: four seconds
        # of every process that imports it. Nothing compiled looks into it, so that a plain one does.
        with mock.patch.object(numba.typed, "Dict", dict):
            import ffcv  # noqa: F401
    except ImportError as error:
        raise InputError(f"{what} needs FFCV ({error}): pip install 'arae[ffcv]', or use .npz files") from None
    finally:
        torch.set_num_threads(threads)  # importing it leaves the whole process with one


_ITERATOR = threading.local()


def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that decode for the iterator whose thread asks."""
    if not hasattr(_ITERATOR, "pool"):
        _ITERATOR.pool = ThreadPoolExecutor(workers, "arae-decode")
    return _ITERATOR.pool


def _end_pool() -> None:
    if hasattr(_ITERATOR, "pool"):
        _ITERATOR.pool.shutdown()
        del _ITERATOR.pool


def fitted(window: np.ndarray, out: np.ndarray) -> None:
    """A window [h, w, 3] of an image in the size of `out` [H, W, 3], both uint8, into it."""
    import cv2

    (h, w), (height, width) = window.shape[:2], out.shape[:2]
    if (h, w) == (height, width):
        out[...] = window
        return
    # Averages over areas want a reduction by both sides, and are four times as slow as two points by two; where it is a
    # small one they hardly differ (44 dB from Pillow's in place of 49 at 256 to 224 pixels).
    reduced = h >= AREA_FROM * height and w >= AREA_FROM * width
    cv2.resize(window, (width, height), out, interpolation=cv2.INTER_AREA if reduced else cv2.INTER_LINEAR)


@cache
def _decoder_class() -> Any:
    import cv2
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode

    class Decoder(SimpleRGBImageDecoder):
        """FFCV's decoder of colour images for ids that carry the epoch; it cuts windows out and resizes them."""

        def __init__(self, wanted: Decoding) -> None:
            super().__init__()
            self.file, self.size = wanted.file, wanted.size
            self.crops = None if wanted.crop_seed is None else mix(wanted.crop_seed, "crop")
            jpeg = self.file.modes == JPEG
            self.largest = int((3 * self.file.heights * self.file.widths)[jpeg].max(initial=0))
            self.workers = wanted.workers
            cv2.setNumThreads(1)  # for the process: each of our threads has an image of its own

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            return previous_state, None  # each batch has memory of its own, so that it is handed out as it is

        def generate_code(self) -> Callable[..., Any]:
            self.read: Callable[..., Any] = cast(Any, self.memory_read)
            return self.decode

        def decode(self, ids: np.ndarray, _memory: None, metadata: np.ndarray, storage: Any) -> np.ndarray:
            """A batch: ids int64 [m] (epoch * n + sample) to uint8 [m, H, W, 3]."""
            epochs, samples = np.divmod(ids, self.file.n)
            heights, widths = self.file.heights[samples], self.file.widths[samples]
            if self.crops is None:
                cut = windows.centred(heights, widths, self.size)
            else:
                cut = windows.random(self.crops, epochs, samples, heights, widths)
            pointers = metadata["data_ptr"][samples]  # FFCV looks them up among its own, of the same type
            # The others are Python's numbers: to take one out of an array for each image costs more than a small image.
            columns = (self.file.modes[samples], heights, widths, cut)
            images = list(zip(pointers, samples, *(column.tolist() for column in columns), strict=True))
            out = np.empty((len(ids), *self.size, 3), np.uint8)
            some = partial(self._some, images, out, storage)
            if self.workers == 1:
                some(range(len(ids)))
            else:
                list(_pool(self.workers).map(some, (range(i, len(ids), self.workers) for i in range(self.workers))))
            return out

        def _some(self, images: list[Any], out: np.ndarray, storage: Any, which: range) -> None:
            buffer, read = np.empty(self.largest, np.uint8), self.read
            for k in which:
                pointer, sample, mode, height, width, (top, left, h, w) = images[k]
                data = np.asarray(read(pointer, storage))
                if mode == JPEG:
                    image = buffer[: 3 * height * width].reshape(height, width, 3)
                    if imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False):
                        raise InputError(f"{self.file.path}: image {sample} is a damaged JPEG; encode the set again")
                else:
                    image = data.reshape(height, width, 3)
                fitted(image[top : top + h, left : left + w], out[k])

    return Decoder


@cache
def _iterator_class() -> Any:
    import queue

    from ffcv.loader.epoch_iterator import EpochIterator

    class Batches(EpochIterator):
        """FFCV's iterator, whose thread leaves torch's threads alone, hands on its errors and ends when closed."""

        error: Exception | None = None

        def run(self) -> None:
            try:
                slots = self.loader.batches_ahead + 2
                for number, ids in enumerate(self.iter_ixes):
                    slot = number % slots
                    if not self._put((slot, self.run_pipeline(number, ids, slot, None))):
                        return
            except Exception as error:  # noqa: BLE001 -- handed on to the thread that asked for the batch
                self.error = error
            finally:
                _end_pool()
            self._put(None)

        def _put(self, item: Any) -> bool:
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put(item, timeout=0.2)
                    return True
                except queue.Full:
                    continue
            return False

        def close(self) -> None:
            self.terminate_event.set()
            if self.is_alive():
                self.join()
            if not self.closed:
                self.closed = True
                self.memory_context.__exit__(None, None, None)  # ends the process cache's threads

    return Batches
