"""Reading `.beton` files through FFCV, with a decoder and an iterator of our own.

FFCV's random crops draw from per-thread state, which can't be repeated; ours are a hash of (seed, epoch, sample).
FFCV's iterator hides errors of its thread and hangs; ours passes them on. FFCV is imported only where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from arae.data.beton import JPEG, Beton
from arae.data.cache import Cache, best_cache, chosen_cache
from arae.data.memory import available_memory
from arae.data.windows import window
from arae.errors import InputError

JIT_FROM = 50_000  # images from which compiling (some seconds) is made up for
CHUNK = 256


class Decoding:
    """Decodes samples of a `.beton` to uint8 [m, 3, H, W]: the centre, or with `crop_seed` random resized crops.

    `workers` threads decode a batch (clamped to the cores); `jit` None compiles the decoder where the file is large.
    The bytes are the same for any number of threads, with and without compilation.
    """

    def __init__(
        self,
        file: Beton,
        size: tuple[int, int],
        *,
        crop_seed: int | None = None,
        workers: int = 1,
        jit: bool | None = None,
    ) -> None:
        self.file = file
        self.size = size
        self.crop_seed = crop_seed
        self.workers = workers
        self.jit = file.n >= JIT_FROM if jit is None else jit
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
            for (images,) in iterator:  # the buffer is used again: copy before yielding, in its own order of bytes
                yield torch.from_numpy(images).permute(0, 3, 1, 2).clone()
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
        import numba
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline.compiler import Compiler

        image, label = self.file.fields
        workers = max(1, min(self.workers, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        pipelines: Any = {image: [_decoder_class()(self.file, self.size, self.crop_seed)], label: None}
        before = (torch.get_num_threads(), Compiler.is_enabled, numba.get_num_threads())
        Compiler.set_enabled(self.jit)
        try:
            # FFCV's constructor sets the threads of torch for the whole process.
            return Loader(
                str(self.file.path),
                batch_size=1,
                num_workers=workers,
                os_cache=kind == "page",
                order=OrderOption.SEQUENTIAL,
                pipelines=pipelines,
                drop_last=False,
                batches_ahead=2,
            )
        finally:
            torch.set_num_threads(before[0])
            Compiler.set_enabled(before[1])
            numba.set_num_threads(before[2])


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


@cache
def _decoder_class() -> Any:
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler

    class Decoder(CenterCropRGBImageDecoder):
        """FFCV's cropping decoder for ids that carry the epoch."""

        def __init__(self, file: Beton, size: tuple[int, int], crop_seed: int | None) -> None:
            super().__init__(size, 1.0)
            self.n = file.n
            self.any_jpeg = bool((file.modes == JPEG).any())
            self.crop_seed = crop_seed

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            state, queries = super().declare_state_and_memory(previous_state)
            output, buffer = cast(Any, queries)
            return state, (output, buffer if self.any_jpeg else AllocationQuery((1,), buffer.dtype))

        def generate_code(self) -> Callable[..., Any]:
            mem_read: Any = self.memory_read
            my_range = Compiler.get_iterator()
            imdecode_c, resize_c = Compiler.compile(imdecode), Compiler.compile(resize_crop)
            cut = window(self.crop_seed, self.n, self.output_size)
            n, jpeg, (out_height, out_width) = self.n, JPEG, self.output_size

            def decode(batch_indices, my_storage, metadata, storage_state):  # noqa: ANN001, ANN202
                destination, buffers = my_storage
                for k in my_range(len(batch_indices)):
                    field = metadata[batch_indices[k] % n]
                    data = mem_read(field["data_ptr"], storage_state)
                    height, width = np.int64(field["height"]), np.int64(field["width"])
                    if field["mode"] == jpeg:
                        image = buffers[k].reshape(-1)[: 3 * height * width].reshape(height, width, 3)
                        imdecode_c(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
                    else:
                        image = data.reshape(height, width, 3)
                    top, left, h, w = cut(batch_indices[k], height, width)
                    if h == out_height and w == out_width:
                        destination[k] = image[top : top + h, left : left + w]
                    else:
                        resize_c(image, top, top + h, left, left + w, destination[k])
                return destination[: len(batch_indices)]

            decode.is_parallel = True  # type: ignore[attr-defined]
            return decode

    return Decoder


@cache
def _iterator_class() -> Any:
    import queue

    import numba
    from ffcv.loader.epoch_iterator import EpochIterator

    class Batches(EpochIterator):
        """FFCV's iterator, whose thread leaves torch's threads alone, hands on its errors and ends when closed."""

        error: Exception | None = None

        def run(self) -> None:
            try:
                if self.loader.num_workers > 1:
                    numba.set_num_threads(self.loader.num_workers)
                slots = self.loader.batches_ahead + 2
                for number, ids in enumerate(self.iter_ixes):
                    slot = number % slots
                    if not self._put((slot, self.run_pipeline(number, ids, slot, None))):
                        return
            except Exception as error:  # noqa: BLE001 -- handed on to the thread that asked for the batch
                self.error = error
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
