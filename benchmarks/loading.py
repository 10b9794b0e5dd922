"""Loading: the resident source against the streaming one, on the same file.

Measured: handing out batches of 256 uint8 images, 1 × 28 × 28, in the shuffled order of training. On Fashion-MNIST's
60,000 training images, encoded raw by arae into a temporary folder first (not timed). One timing is 100 batches, 25,600
images; n = 7 rounds, 1 of warm-up, in which FFCV's decoder is compiled, as arae does for a file of this length. CPU
seconds count FFCV's decoding threads, and starting them once a timing, as at the start of a stage.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from arae.config import Data
from arae.data.encode import EncodeOptions, encode
from arae.data.load import Source, open_source, stream
from benchmarks.harness import Comparison, Result, measure

BATCH, BATCHES = 256, 100


def loading(device: torch.device) -> Result:
    """Images a second of both sources; InputError where Fashion-MNIST or FFCV is missing."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "images.beton"
        encode("fashion-mnist", path, EncodeOptions(split="train"))
        sources = {
            loader: open_source(Data(name="fashion-mnist", train=str(path), loader=loader), "train", device)
            for loader in ("resident", "ffcv")
        }
        ids = stream(sources["ffcv"].n, BATCH, 0, 0, BATCHES)
        return measure(
            "loading",
            f"{BATCHES} shuffled batches of {BATCH} uint8 images, 1 × 28 × 28, from Fashion-MNIST encoded raw: held in "
            "memory (resident), or streamed from the file (ffcv).",
            {name: partial(drain, source, ids) for name, source in sources.items()},
            [Comparison(what="streamed over resident", slow="ffcv", fast="resident")],
            images=BATCH * BATCHES,
            rounds=7,
            warmup=1,
            device=device,
        )


def drain(source: Source, ids: np.ndarray) -> None:
    """Take every batch and do nothing with it."""
    for _ in source.batches(ids):
        pass
