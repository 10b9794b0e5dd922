"""Reading `.beton` files through FFCV, with a decoder and an iterator of our own.

FFCV's random crops draw from per-thread state, which can't be repeated; ours are a hash of (seed, epoch, sample).
FFCV's iterator hides errors of its thread and hangs; ours passes them on. FFCV is imported only where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import numpy as np
import torch

from arae.data.beton import JPEG, Beton
from arae.errors import InputError
from arae.seeds import FIRST, GOLDEN, SECOND, mix

JIT_FROM = 50_000  # images from which compiling (some seconds) is made up for
CHUNK = 256
CROP_SCALE = (0.08, 1.0)  # share of the area, and aspect 3/4 to 4/3: as in Inception and its successors
CROP_ASPECT = 4 / 3
CROP_TRIES = 10


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
        self._loader: Any = None

    def batches(self, ids: np.ndarray) -> Iterator[torch.Tensor]:
        """For ids int64 [k, m] (epoch * samples of the file + sample): k tensors uint8 [m, 3, H, W] on the CPU."""
        if not ids.size:
            return
        if self._loader is None:
            self._loader = self._open()
        self._loader.batch_size = ids.shape[1]
        iterator = _iterator_class()(self._loader, np.ascontiguousarray(ids.reshape(-1)))
        try:
            for (images,) in iterator:  # the buffer is used again: copy before yielding
                yield torch.from_numpy(images).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
            if iterator.error is not None:
                raise iterator.error
        finally:
            iterator.close()

    def _open(self) -> Any:
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
                os_cache=True,
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
        import ffcv  # noqa: F401
    except ImportError as error:
        raise InputError(f"{what} needs FFCV ({error}): pip install 'arae[ffcv]', or use .npz files") from None
    finally:
        torch.set_num_threads(threads)  # importing it leaves the whole process with one


@cache
def _random_crop() -> Any:
    """Compiled on its own in every mode, without fast math: the same operations give the same crops everywhere."""
    import numba

    golden, first, second, half = np.uint64(GOLDEN), np.uint64(FIRST), np.uint64(SECOND), 0.5 * math.log(CROP_ASPECT)
    r27, r30, r31, r11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
    low, span, tries = CROP_SCALE[0], CROP_SCALE[1] - CROP_SCALE[0], CROP_TRIES

    @numba.njit("uint64(uint64, uint64)")
    def fold(state, part):  # noqa: ANN001, ANN202 -- compiled code
        z = (state ^ part) + golden
        z = (z ^ (z >> r30)) * first
        z = (z ^ (z >> r27)) * second
        return z ^ (z >> r31)

    @numba.njit("float64(uint64, int64)")
    def uniform(state, number):  # noqa: ANN001, ANN202
        return ((fold(state, np.uint64(number)) << np.uint64(1)) >> r11) * 2.0**-53

    @numba.njit("UniTuple(int64, 4)(uint64, int64, int64, int64, int64)", nogil=True)
    def crop(address, epoch, sample, height, width):  # noqa: ANN001, ANN202
        state = fold(fold(fold(np.uint64(0), address), np.uint64(epoch)), np.uint64(sample))
        for attempt in range(tries):
            side = math.sqrt(height * width * (low + span * uniform(state, 4 * attempt)))
            x = (2.0 * uniform(state, 4 * attempt + 1) - 1.0) * half
            # exp(x) for |x| < 0.15 by its series, to 1e-13: libraries differ in the last bit of theirs.
            stretch = 1 + x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
            w, h = int(side * stretch + 0.5), int(side / stretch + 0.5)
            if 0 < w <= width and 0 < h <= height:
                top = int(uniform(state, 4 * attempt + 2) * (height - h + 1))
                left = int(uniform(state, 4 * attempt + 3) * (width - w + 1))
                return top, left, h, w
        h, w = min(height, width * 4 // 3), min(width, height * 4 // 3)
        return (height - h) // 2, (width - w) // 2, h, w

    return crop


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
            window = _window(self.crop_seed, self.n, self.output_size)
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
                    top, left, h, w = window(batch_indices[k], height, width)
                    if h == out_height and w == out_width:
                        destination[k] = image[top : top + h, left : left + w]
                    else:
                        resize_c(image, top, top + h, left, left + w, destination[k])
                return destination[: len(batch_indices)]

            decode.is_parallel = True  # type: ignore[attr-defined]
            return decode

    return Decoder


def _window(crop_seed: int | None, n: int, size: tuple[int, int]) -> Any:
    """(id, height, width) → (top, left, height, width) of what is cut out."""
    from ffcv.pipeline.compiler import Compiler

    out_height, out_width = size

    def centre(_, height, width):  # noqa: ANN001, ANN202 -- the largest window of the output's aspect
        h, w = min(height, width * out_height // out_width), min(width, height * out_width // out_height)
        h, w = max(h, 1), max(w, 1)
        return (height - h) // 2, (width - w) // 2, h, w

    if crop_seed is None:
        return Compiler.compile(centre)
    crop: Any = _random_crop()
    address = np.uint64(mix(crop_seed, "crop"))

    def random(identity, height, width):  # noqa: ANN001, ANN202
        return crop(address, identity // n, identity % n, height, width)

    return Compiler.compile(random)


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

    return Batches
