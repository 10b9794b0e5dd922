"""Randomness is addressed, not consumed: every draw is a function of where it stands (seed, stage, step, sample, ...).

One mixing function serves numbers, NumPy arrays and tensors, and gives the same values on every device and platform:
the finaliser of SplitMix64 (Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators), folded over
the parts.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
_MASK63 = (1 << 63) - 1
GOLDEN = 0x9E3779B97F4A7C15
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB


def mix(*parts: int | str) -> int:
    """An address as one number in [0, 2**63), fit for `torch.manual_seed`: `mix(seed, "encoder", step, micro)`.

    Integers count modulo 2**64; text counts by its SHA-256. The order of the parts matters, and so does their number.
    """
    state = 0
    for part in parts:
        state = _fold(state, part if isinstance(part, int) else _number(part))
    return state & _MASK63


def mix_array(address: int, *parts: np.ndarray) -> np.ndarray:
    """`mix(address, *parts)` of arrays of ids, element by element: int64 in, of shapes that broadcast; int64 in
    [0, 2**63) of the shape they broadcast to out."""
    state = np.array(_fold(0, address), np.uint64)
    for part in parts:
        z = (part.astype(np.uint64) ^ state) + np.uint64(GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
        state = z ^ (z >> np.uint64(31))
    return np.asarray(state & np.uint64(_MASK63)).astype(np.int64)


def mix_tensor(address: int, ids: torch.Tensor) -> torch.Tensor:
    """`mix(address, id)` of every id, on the tensor's device: int64 of any shape in, int64 in [0, 2**63) out."""
    # Tensors have no full set of unsigned operations: int64 wraps the same way, and the masks make >> a logical shift.
    z = (ids ^ _signed(_fold(0, address))) + _signed(GOLDEN)
    z = (z ^ ((z >> 30) & (_MASK64 >> 30))) * _signed(FIRST)
    z = (z ^ ((z >> 27) & (_MASK64 >> 27))) * _signed(SECOND)
    return (z ^ ((z >> 31) & (_MASK64 >> 31))) & _MASK63


def _fold(state: int, part: int) -> int:
    z = ((state ^ (part & _MASK64)) + GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * FIRST) & _MASK64
    z = ((z ^ (z >> 27)) * SECOND) & _MASK64
    return z ^ (z >> 31)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
