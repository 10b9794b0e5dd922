"""Elementwise work on a batch, image by image where that keeps it in a CPU's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 50_000
"""Numbers of an image from which a CPU takes the images of a batch one by one: about 3 × 128 × 128."""


def large(images: Tensor) -> bool:
    """Whether the images [N, ...] are better taken one by one."""
    # A tensor without data, of which a step's memory is counted, has no cache to stay in.
    return type(images) is Tensor and images.device.type == "cpu" and images[:1].numel() >= LARGE


def image_by_image(work: Callable[..., object], *batches: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What `work(*batches, out=...)` writes: a tensor of the shape and order of bytes of the first batch, all [N, ...].

    `work` must treat each image by itself, for it gets all images at once or, large ones on a CPU, one after the other
    (as many together as there are threads): between two passes over it an image stays in the cache, a batch does not.
    dtype: of what comes out, where that is not the first batch's.
    """
    out = torch.empty_like(batches[0], dtype=dtype)
    if large(batches[0]):
        few = torch.get_num_threads()
        for parts in zip(out.split(few), *(batch.split(few) for batch in batches), strict=True):
            work(*parts[1:], out=parts[0])
    else:
        work(*batches, out=out)
    return out
