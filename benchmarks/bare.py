"""The bare loop that `overhead` compares with: trainer and loader, nothing around them.

`python -m benchmarks.bare RECIPE FOLDER WORKERS` makes the encoder's steps in as many processes, by plain
`torch.distributed` over gloo, and writes the time of each interval's last one to `FOLDER/log.jsonl` in the form of a
run's log, so that both are read alike.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import distributed as dist

from arae.config import load_recipe
from arae.data.load import open_source
from arae.models import create_encoder
from arae.runs import RunFolder
from arae.seeds import mix
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.log import Log
from arae.train.loop import micro_batches
from arae.train.stage import Fit


def bare(rank: int, recipe_path: str, folder: RunFolder, workers: int) -> None:
    """Make every step of the encoder's stage on the CPU, as one process of the group."""
    dist.init_process_group("gloo", f"file://{folder.path.absolute()}/store", rank=rank, world_size=workers)
    recipe = load_recipe(recipe_path)
    part, device = recipe.encoder, torch.device("cpu")
    source = open_source(recipe.data, "train", device, seed=recipe.seed)
    engine, log = Engine(device, recipe.precision), Log(folder, None, active=rank == 0)
    torch.manual_seed(mix(recipe.seed, "initial encoder"))
    channels, height, _ = source.shape
    model = create_encoder(part.name, len(source.classes), channels, height, width=part.width)
    total = part.total_steps(source.n)
    trainer = EncoderTrainer(recipe, model, engine, total)
    run = Fit(recipe, part, recipe.data, folder, source, engine, log, total, "", lambda step: {}, lambda: False)
    batches = micro_batches("encoder", run, 0)
    own = len(engine.share(part.batch // part.micro, "encoder"))
    for step in range(total):
        values = trainer.step(step, [next(batches) for _ in range(own)])
        if (step + 1) % run.interval == 0 or step + 1 == total:
            log.emit("interval", step=step + 1, metrics={key: value.item() for key, value in values.items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    number = int(sys.argv[3])
    mp.spawn(bare, args=(sys.argv[1], RunFolder(Path(sys.argv[2])), number), nprocs=number)  # type: ignore[attr-defined]
