"""What is cut out of an image while FFCV decodes it: the centre, or a random window that is a hash of its address."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from arae.seeds import FIRST, GOLDEN, SECOND, mix

CROP_SCALE = (0.08, 1.0)  # share of the area, and aspect 3/4 to 4/3: as in Inception and its successors
CROP_ASPECT = 4 / 3
CROP_TRIES = 10


@cache
def random_crop() -> Any:
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


def window(crop_seed: int | None, n: int, size: tuple[int, int]) -> Any:
    """(id, height, width) → (top, left, height, width) of what is cut out."""
    from ffcv.pipeline.compiler import Compiler

    out_height, out_width = size

    def centre(_, height, width):  # noqa: ANN001, ANN202 -- the largest window of the output's aspect
        h, w = min(height, width * out_height // out_width), min(width, height * out_width // out_height)
        h, w = max(h, 1), max(w, 1)
        return (height - h) // 2, (width - w) // 2, h, w

    if crop_seed is None:
        return Compiler.compile(centre)
    crop: Any = random_crop()
    address = np.uint64(mix(crop_seed, "crop"))

    def random(identity, height, width):  # noqa: ANN001, ANN202
        return crop(address, identity // n, identity % n, height, width)

    return Compiler.compile(random)
