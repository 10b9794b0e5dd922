"""Writing `.beton` files: the layout of FFCV's own writer, byte for byte, from images that are encoded already.

FFCV's writer forks processes, waits for ever when one of them dies, and puts images where the processes' race leaves
them. Here the place of every image follows from the sizes of those before it, as FFCV's writer has it with one process:
so the file is the same however many machines encoded its images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from arae.data.beton import ALLOCATION, FIELD, FORMAT_VERSION, HEADER, SAMPLE, TYPES
from arae.files import HashingFile

MIN_PAGE, USUAL_PAGE, MANY = 1 << 21, 1 << 23, 32
_NAMES = (b"image", b"label")
_TELL = 256  # images between two calls of `progress`


@dataclass(frozen=True)
class Contents:
    """The images of a file, in order; all int64 [n]."""

    heights: np.ndarray
    """Pixels."""
    widths: np.ndarray
    modes: np.ndarray
    """`beton.JPEG` or `beton.RAW`."""
    sizes: np.ndarray
    """Bytes as written."""
    labels: np.ndarray


def page_size(largest: int, total: int) -> int:
    """Bytes of a page (a power of two) for images of up to `largest` bytes, `total` bytes together.

    No image lies across two pages, so the end of a page stays empty: a fifth of it where three photographs of 500 × 375
    pixels go into FFCV's smallest, 2 MiB. Files of many such pages get FFCV's usual 8 MiB.
    """
    # JPEG of noise can be larger than its pixels by its header.
    page = max(MIN_PAGE, 1 << (largest + (1 << 16)).bit_length())
    while page < USUAL_PAGE and total > MANY * page:
        page *= 2
    return page


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 [H, W, 3] in RGB as JPEG of quality 1..100, by the encoder that FFCV uses."""
    import cv2

    good, made = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not good:
        raise ValueError(f"an image of {image.shape[1]} × {image.shape[0]} pixels can't be written as JPEG")
    return made.tobytes()


def write(file: HashingFile, contents: Contents, images: Iterable[bytes], progress: Callable[[int], None]) -> None:
    """Write a whole `.beton` from the start of `file`. `images` are the bytes of each image, in order.

    `progress` is told the number written so far. OSError where the disk is full.
    """
    head, pointers, page = _head(contents)
    file.write(head)
    for number, (pointer, content) in enumerate(zip(pointers.tolist(), images, strict=True), 1):
        file.write(bytes(pointer - file.count))
        file.write(content)
        if number % _TELL == 0 or number == len(pointers):
            progress(number)
    file.write(bytes(-file.count % page))  # whole pages: FFCV reads nothing less
    file.write(_allocations(pointers, contents.sizes))


def _head(contents: Contents) -> tuple[bytes, np.ndarray, int]:
    """All that comes before the images; where each image lies, int64 [n]; bytes of a page."""
    n = len(contents.sizes)
    page = page_size(int((contents.heights * contents.widths).max()) * 3, int(contents.sizes.sum()))
    fields = np.zeros(len(TYPES), FIELD)
    for field, kind, name in zip(fields, TYPES, _NAMES, strict=True):
        field["type"] = kind
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    samples = np.zeros(n, SAMPLE)
    begin = HEADER.itemsize + fields.nbytes + samples.nbytes
    pointers, end = places(contents.sizes, page, -(-begin // page) * page)
    samples["label"] = contents.labels
    for name, values in (
        ("mode", contents.modes),
        ("width", contents.widths),
        ("height", contents.heights),
        ("pointer", pointers),
    ):
        samples["image"][name] = values
    header = np.zeros((), HEADER)
    for name, value in (
        ("version", FORMAT_VERSION),
        ("fields", len(TYPES)),
        ("page", page),
        ("n", n),
        ("table", end),
    ):
        header[name] = value
    return header.tobytes() + fields.tobytes() + samples.tobytes(), pointers, page


def places(sizes: np.ndarray, page: int, start: int) -> tuple[np.ndarray, int]:
    """Where each image lies, none across the border of a page, and the end of the last page."""
    places, at = [], start
    for size in sizes.tolist():
        if at % page + size > page:
            at += -at % page
        places.append(at)
        at += size
    return np.array(places, np.int64), at + -at % page


def _allocations(pointers: np.ndarray, sizes: np.ndarray) -> bytes:
    table = np.zeros(len(pointers), ALLOCATION)
    table["sample"], table["pointer"], table["size"] = np.arange(len(pointers)), pointers, sizes
    return table.tobytes()
