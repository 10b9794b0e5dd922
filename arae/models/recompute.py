"""Activations that are computed anew in the backward pass, so that they need not be kept (activation checkpointing).

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost. A second pass through the same layers must see what the
first one saw and leave no trace: batch norm's running statistics and spectral norm's vectors move with every pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def cuts(layers: nn.Sequential, sizes: Sequence[int], parts: int) -> tuple[int, ...]:
    """Where layers fall into at most `parts` parts that make about as many numbers as one another.

    sizes: of what each layer makes. A part begins with a convolution: a layer that works in place must not be the first
    to see what is kept. Returns the parts' ends, the number of layers last.
    """
    starts = [i for i, layer in enumerate(layers) if i and isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    ends, held = list[int](), 0.0
    for i, size in enumerate(sizes):
        if i in starts and held >= sum(sizes) / parts and len(ends) < parts - 1:
            ends.append(i)
            held = 0.0
        held += size
    return (*ends, len(sizes))


def in_parts(layers: nn.Sequential, z: Tensor, ends: Sequence[int]) -> Tensor:
    """`layers(z)`, of which between the passes only what goes into each part is kept. The same numbers."""
    for begin, end in pairwise((0, *ends)):
        part = layers[begin:end]
        seen = _Seen(part)
        z = checkpoint(part, z, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, seen))
    return z


class _Seen:
    """A part's running values as its first pass found them."""

    def __init__(self, part: nn.Module) -> None:
        self.buffers = list(part.buffers())
        self.before: list[Tensor] = []

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the first pass."""
        self.before = [buffer.clone() for buffer in self.buffers]
        yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around the second."""
        now = [buffer.clone() for buffer in self.buffers]
        self._set(self.before)
        try:
            yield
        finally:
            self._set(now)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value)


def _contexts(seen: _Seen) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return seen.first(), seen.again()
