"""Two workers compute the step that one does: same samples, same global batch, same micro-batches."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from training import tiny_recipe

from arae.config import Recipe, dump_recipe, load_recipe
from arae.runs import RunFolder
from arae.train.run import train


def recipe_of(images: Path) -> Recipe:
    """A network with batch norm and a discriminator with spectral norm: what could depend on the world size."""
    return tiny_recipe(
        images,
        encoder__name="resnet18-cifar",
        encoder__steps=2,
        encoder__attack__steps=1,
        encoder__attack__eps=0.1,
        encoder__lr=0.01,
        decoder__steps=3,
    )


def worker(rank: int, world: int, folder: str) -> None:
    """One worker of a gloo group."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        path = Path(folder)
        train(load_recipe(path / "recipe.yaml"), RunFolder(path / "run"), torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_and_two_workers_end_at_the_same_weights(tmp_path: Path, tiny_npz: Path) -> None:
    recipe = recipe_of(tiny_npz)
    made = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        RunFolder(folder / "run").create(recipe)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        mp.spawn(worker, args=(world, os.fspath(folder)), nprocs=world)
        made[world] = {p.name: load_file(p) for p in sorted((folder / "run" / "model").glob("*.safetensors"))}
    assert set(made[1]) == {"encoder.safetensors", "decoder.safetensors"}
    for part, tensors in made[1].items():
        for name, one in tensors.items():
            scale = one.float().std() if one.numel() > 1 else one.float().abs()
            worst = (one.float() - made[2][part][name].float()).abs().max()
            assert worst <= 2e-3 * scale + 1e-6, f"{part} {name}: {worst} of {scale}"
