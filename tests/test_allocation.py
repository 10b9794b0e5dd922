"""Memory on a CPU: what is freed is kept, unless somebody has chosen otherwise, and given back at the end."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from arae.allocation import memory_kept

SCRIPT = """
import resource, torch
from arae.allocation import memory_kept
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
with memory_kept(torch.device("cpu")) as kept:
    for _ in range(30):  # a block may find the hole that the one before it left a few bytes too small
        torch.ones(10_000_000)
    before = faults()
    for _ in range(5):
        torch.ones(10_000_000)  # 40 MB: 9,766 pages of 4 KiB
    found, during = faults() - before, held()
after = held()
torch.ones(100_000_000)
print(kept, found, during - after, held() - after)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
    ],
)
def test_what_is_freed_is_kept_unless_malloc_was_told_otherwise(chosen: dict[str, str], kept: bool) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, env=others | chosen, capture_output=True, text=True, check=True)
    said, faults, given_back, later = run.stdout.split()
    assert said == str(kept)
    assert (int(faults) < 100) is kept
    assert (int(given_back) > 30_000) is kept  # kB
    assert int(later) < 100_000  # of 400 MB that were freed afterwards


def test_a_gpu_has_an_allocator_of_its_own() -> None:
    with memory_kept(torch.device("cuda")) as kept:
        assert not kept
