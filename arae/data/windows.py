"""What is cut out of an image while it is decoded: the centre, or a random window that is a hash of its address."""

from __future__ import annotations

import math

import numpy as np

from arae.seeds import mix_array

CROP_SCALE = (0.08, 1.0)  # share of the area, and aspect 3/4 to 4/3: as in Inception and its successors
CROP_ASPECT = 4 / 3
CROP_TRIES = 10


def centred(heights: np.ndarray, widths: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest window of the aspect of `size` (height, width) in the middle of each image.

    Heights and widths are int64 [m]; out come top, left, height and width, int64 [m, 4].
    """
    h = np.maximum(np.minimum(heights, widths * size[0] // size[1]), 1)
    w = np.maximum(np.minimum(widths, heights * size[1] // size[0]), 1)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], 1)


def random(
    address: int, epochs: np.ndarray, samples: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """A window of each image, drawn as Inception's are: a function of (address, epoch, sample) alone.

    All are int64 [m]; out come top, left, height and width, int64 [m, 4]. Where none of ten windows lies in the image,
    it is the largest in the middle whose aspect is within the bounds.
    """
    numbers = np.arange(4 * CROP_TRIES)[:, None]
    uniform = (mix_array(address, epochs, samples, numbers) >> 10) * 2.0**-53
    share, aspect, down, right = uniform.reshape(CROP_TRIES, 4, -1).swapaxes(0, 1)
    sides = np.sqrt(heights * widths * (CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * share))
    x = (2 * aspect - 1) * (0.5 * math.log(CROP_ASPECT))
    # exp(x) for |x| < 0.15 by its series, to 1e-13: libraries differ in the last bit of theirs.
    stretch = 1 + x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    w, h = (sides * stretch + 0.5).astype(np.int64), (sides / stretch + 0.5).astype(np.int64)
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    first = (fits.argmax(0), np.arange(len(samples)))
    h = np.where(fits[first], h[first], np.minimum(heights, widths * 4 // 3))
    w = np.where(fits[first], w[first], np.minimum(widths, heights * 4 // 3))
    top = np.where(fits[first], (down[first] * (heights - h + 1)).astype(np.int64), (heights - h) // 2)
    left = np.where(fits[first], (right[first] * (widths - w + 1)).astype(np.int64), (widths - w) // 2)
    return np.stack([top, left, h, w], 1)
