"""Which of FFCV's two ways of holding a `.beton` in memory: the kernel's page cache, or a cache of the process's own.

Through the page cache (`os_cache=True`) the file is mapped: all processes of a machine share one copy, the kernel drops
what it needs elsewhere, and of a file that does not fit only what is asked for is read, in small random pieces, by the
threads that decode. The process cache (`os_cache=False`) has threads of its own that read whole pages of the file
(8 MiB) three batches ahead into memory of this process alone, and holds a page from the first to the last batch that
needs it.

So, where the file fits into the memory that is available, the page cache: no copy, and shared. Where it does not, the
process cache while it is cheap: the pages it must hold at once fit into this process's share of the memory, and it does
not read much more than is asked for. That is so for images in the file's order (evaluation). Training's order is random
over the whole file: nearly every page would be held from begin to end, which is the file once more for every worker and
would not fit either; there the page cache reads the least.

`ARAE_FFCV_CACHE=page` or `process` overrides the choice: on some network file systems mapped files are slow.
"""

from __future__ import annotations

import os
from typing import Literal

import numpy as np

from arae.errors import InputError

Cache = Literal["page", "process"]

AHEAD = 3  # batches that FFCV's process cache reads ahead
SHARE = 0.5  # of the available memory, for all processes of this machine together
WASTE = 2.0  # times what is asked for that may be read


def chosen_cache() -> Cache | None:
    """What `ARAE_FFCV_CACHE` says; None where it leaves the choice; InputError for another word."""
    said = os.environ.get("ARAE_FFCV_CACHE", "auto")
    if said == "auto":
        return None
    if said == "page" or said == "process":
        return said
    raise InputError(f"ARAE_FFCV_CACHE={said}: write page, process or auto")


def best_cache(
    file_bytes: int, pages: np.ndarray, page_bytes: int, wanted_bytes: int, available: int, processes: int
) -> Cache:
    """The better cache for reading some batches of a file.

    pages: int64 [k, m], the file's page of each image of k batches; wanted_bytes: of all these images; available:
    memory in bytes; processes: of this machine, that read as this one does.
    """
    if file_bytes <= available:
        return "page"
    fits = held_at_once(pages) * page_bytes <= SHARE * available / max(1, processes)
    cheap = len(np.unique(pages)) * page_bytes <= WASTE * wanted_bytes
    return "process" if fits and cheap else "page"


def held_at_once(pages: np.ndarray) -> int:
    """The most pages that the process cache holds at a time for batches of these pages, int64 [k, m]."""
    if not pages.size:
        return 0
    batch = np.repeat(np.arange(len(pages)), pages.shape[1])
    _, where = np.unique(pages.reshape(-1), return_inverse=True)
    first, last = np.full(where.max() + 1, len(pages)), np.full(where.max() + 1, -1)
    np.minimum.at(first, where, batch)
    np.maximum.at(last, where, batch)
    change = np.zeros(len(pages) + 1, np.int64)
    np.add.at(change, np.maximum(0, first - AHEAD), 1)
    np.add.at(change, last + 1, -1)
    return int(np.cumsum(change).max())
