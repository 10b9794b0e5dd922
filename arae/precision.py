"""Number formats: what `auto` means on a device, and losses that are never in less than float32."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from arae.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
WEAKEST = ("fp32", "fp16", "bf16")
"""What `auto` chooses, the format that every device has first: a mixed group takes the first that any of it needs."""


def full(x: Tensor) -> Tensor:
    """The tensor in float32, in which losses are computed; in float64 where it is in that already."""
    return x if x.dtype == torch.float64 else x.float()


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bfloat16 (AVX-512 BF16 or AMX); False where that can't be told."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`auto` as bf16, fp16 or fp32 for this device; anything else as it is.

    InputError for fp16 on a CPU, where loss scaling has no kernels to win anything with.
    """
    if wanted == "fp16" and device.type != "cuda":
        raise InputError("precision = fp16 needs a GPU: write precision=bf16 or precision=fp32")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        # A V100 emulates bf16 and says so only when asked not to count that.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"
