"""Training on several gloo workers of this machine, without Ray: quick, and of any size."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from arae.config import Recipe, dump_recipe, load_recipe
from arae.errors import Stopped
from arae.runs import RunFolder
from arae.train.run import train


def joined(rank: int, world: int, folder: str, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """One worker of the group: `work(rank, *arguments)` between joining and leaving."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store-{os.getppid()}-{world}", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    work(rank, *arguments)
    torch.distributed.destroy_process_group()
    # Not by the interpreter's own end: a group that some cycle of objects still holds has a thread, which would abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def spawn(world: int, folder: Path, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(rank, *arguments)` on `world` workers; what one raises is raised here."""
    store = folder / f"store-{os.getpid()}-{world}"
    store.unlink(missing_ok=True)
    mp.spawn(joined, args=(world, os.fspath(folder), work, arguments), nprocs=world)


def train_until(rank: int, folder: str, steps: int | None) -> None:
    """Train the folder's recipe; stop where `steps` steps have been asked about."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return steps is not None and asked >= steps

    recipe = load_recipe(Path(folder) / "recipe.yaml")
    try:
        train(recipe, RunFolder(Path(folder)), torch.device("cpu"), stop=stop)
    except Stopped:
        assert steps is not None


def train_on(world: int, recipe: Recipe, folder: Path, steps: int | None = None) -> RunFolder:
    """Train a recipe into a folder on `world` workers; `steps`: stop once so many steps were made."""
    run = RunFolder(folder)
    if not run.recipe.is_file():
        run.create(recipe)
    run.recipe.write_text(dump_recipe(recipe))
    spawn(world, folder, train_until, os.fspath(folder), steps)
    return run


def tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    """Every tensor of the exported model."""
    return {
        f"{path.stem} {name}": tensor
        for path in sorted(run.model.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
