"""Memory on a CPU: what a step frees is kept for the next."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # mallopt(3)
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 64 << 20}
USUAL = {MMAP_MAX: 1 << 16, TRIM_THRESHOLD: 64 << 20, TOP_PAD: 128 << 10}
"""glibc's own; the threshold, which it adjusts to what a process does, at its highest."""


@contextmanager
def memory_kept(device: torch.device) -> Iterator[bool]:
    """Let this process keep what it frees, where it works on a CPU under glibc; yields whether it does.

    glibc hands large blocks back to the kernel at once, which must clear them page by page when the next step asks for
    as much again: a sixth of a step of AlexNet on 64 images, whose peak grew by 2 % (Xeon at 2.5 GHz). In other threads
    than the first, such as those in which Ray's workers train, blocks of more than 64 MiB are handed back as before.
    At the end what is free goes back to the kernel, and memory is handled as before. Who sets malloc's variables
    (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_, …, or GLIBC_TUNABLES) has chosen otherwise, and nothing is changed.
    """
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield False
        return
    kept = all([libc.mallopt(what, value) for what, value in KEEP.items()])  # noqa: C419 -- each is to be set
    try:
        yield kept
    finally:
        for what, value in USUAL.items():
            libc.mallopt(what, value)
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library; None where it is another, or was told otherwise."""
    chosen = [name for name in os.environ if name.startswith("MALLOC_")]
    if chosen or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (AttributeError, OSError):
        return None
