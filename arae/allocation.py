"""Memory on a CPU: what a step frees is kept for the next."""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # mallopt(3)
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}


def keep_freed(device: torch.device) -> bool:
    """Let this process keep what it frees, where it works on a CPU under glibc; whether it does.

    glibc hands large blocks back to the kernel at once, which must clear them page by page when the next step asks for
    as much again: a sixth of a step of AlexNet on 64 images. The peak stays what it was. Who sets malloc's variables
    (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_, …, or GLIBC_TUNABLES) has chosen otherwise.
    """
    return device.type == "cpu" and _kept()


@cache
def _kept() -> bool:
    chosen = [name for name in os.environ if name.startswith("MALLOC_")]
    if chosen or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    done = [mallopt(what, value) for what, value in KEEP.items()]
    return all(done)
