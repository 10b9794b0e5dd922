"""Several workers compute the step that one does: same samples, same global batch, same micro-batches."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_npz
from groups import spawn, train_on
from safetensors.torch import load_file, save_file
from training import tiny_recipe

from arae import precision
from arae.config import Recipe
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.train import engine as engine_module
from arae.train.decoder import DecoderTrainer
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro


def recipe_of(images: Path) -> Recipe:
    """A network with batch norm and a discriminator with spectral norm: what could depend on the world size."""
    return tiny_recipe(
        images,
        encoder__name="resnet18-cifar",
        encoder__width=0.25,
        encoder__steps=2,
        encoder__attack__steps=1,
        encoder__attack__eps=0.1,
        encoder__lr=0.01,
        decoder__steps=3,
    )


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_and_two_workers_end_at_the_same_weights(tmp_path: Path, tiny_npz: Path) -> None:
    recipe = recipe_of(tiny_npz)
    made = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        run = train_on(world, recipe, folder)
        made[world] = {p.name: load_file(p) for p in sorted(run.model.glob("*.safetensors"))}
    assert set(made[1]) == {"encoder.safetensors", "decoder.safetensors"}
    for part, tensors in made[1].items():
        for name, one in tensors.items():
            scale = one.float().std() if one.numel() > 1 else one.float().abs()
            worst = (one.float() - made[2][part][name].float()).abs().max()
            assert worst <= 2e-3 * scale + 1e-6, f"{part} {name}: {worst} of {scale}"


# --- gradients ----------------------------------------------------------------------------------------------------

BATCH, SHARE = 128, 32
# Network, objective, micro-batch of the one worker: without batch norm it may see all 128 images at once.
ENCODERS = {
    "encoder, no batch norm": ("small-cnn", "at", BATCH),
    "encoder, batch norm": ("resnet18-cifar", "at", SHARE),
    "encoder, two passes": ("resnet18-cifar", "trades", SHARE),
}
CASES = [*ENCODERS, "decoder"]


def batch(engine: Engine, size: int) -> list[Micro]:
    """This worker's micro-batches, of `size` images, of one batch of 128."""
    g = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, 8, 8, generator=g).split(size)
    labels = torch.randint(0, 3, (BATCH,), generator=g).split(size)
    return [Micro(images[i], labels[i], i, len(images)) for i in engine.share(len(images), "encoder")]


def gradients(case: str, images: Path, size: int) -> dict[str, torch.Tensor]:
    """The step's gradient in every parameter, once the step is done, and the buffers it leaves."""
    engine = Engine(torch.device("cpu"), "fp32")
    micros = batch(engine, size)
    name, objective, _ = ENCODERS.get(case, ("small-cnn", "at", SHARE))
    recipe = tiny_recipe(images).replace(
        {
            "encoder.attack": {"norm": "l2", "eps": 0.5, "steps": 2},
            "encoder.label_smoothing": 0,
            "encoder.objective.kind": objective,
        }
    )
    torch.manual_seed(0)
    encoder = create_encoder(name, 3, width=1 if name == "small-cnn" else 0.125)
    if case != "decoder":
        EncoderTrainer(recipe, encoder, engine, total=10).step(3, micros)
        return taken(encoder, "encoder")
    shapes = encoder.feature_shape((3, 8, 8), "conv2"), (3, 8, 8)
    generator, discriminator = create_decoder("mirror", *shapes), create_discriminator("mirror", *shapes)
    recipe = recipe.replace({"encoder.layer": "conv2"})
    DecoderTrainer(recipe, encoder, generator, discriminator, engine, total=10).step(3, micros)
    return taken(generator, "generator") | taken(discriminator, "discriminator")


def taken(network: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    found = {f"{name} {key} gradient": p.grad for key, p in network.named_parameters() if p.grad is not None}
    found |= {f"{name} {key}": buffer.float() for key, buffer in network.named_buffers()}
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


def gradient_worker(rank: int, folder: str) -> None:
    for case in CASES:
        save_file(gradients(case, Path(folder) / "tiny.npz", SHARE), f"{folder}/{case}-{rank}.safetensors")
    Path(folder, f"precision-{rank}.json").write_text(json.dumps(mixed_group(rank)))


def mixed_group(rank: int) -> dict[str, object]:
    """What a group makes of `auto` where only its first two workers are good at bf16, and then of a stage begun."""
    precision.cpu_has_bf16 = lambda: rank < 2
    engine = Engine(torch.device("cpu"), "auto")
    found = {"agreed": engine.precision, "mixed": engine.mixed}
    precision.cpu_has_bf16 = lambda: True
    alike = Engine(torch.device("cpu"), "auto")
    found |= {"alike": alike.precision, "alike mixed": alike.mixed}
    alike.go_on_in("fp32" if rank == 0 else None, "auto")
    return found | {"goes on in": alike.precision}


@pytest.fixture(scope="module")
def four_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the gradients that each of four workers ends with, in every case."""
    folder = tmp_path_factory.mktemp("four")
    make_tiny_npz(folder)
    spawn(BATCH // SHARE, folder, gradient_worker, os.fspath(folder))
    return folder


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_one_worker_by_128_are_those_of_four_by_32(four_workers: Path, tiny_npz: Path, case: str) -> None:
    """To 1e-5 of the largest entry: the rounding of float32 sums in another order, through two steps of an attack."""
    torch.set_num_threads(1)  # as the workers: with other kernels a ReLU near zero may fall the other way
    one = gradients(case, tiny_npz, ENCODERS.get(case, ("", "", SHARE))[2])
    every = [load_file(four_workers / f"{case}-{rank}.safetensors") for rank in range(BATCH // SHARE)]
    assert all(set(each) == set(one) for each in every)
    assert sum(value.abs().sum() > 0 for key, value in one.items() if key.endswith("gradient")) > 5
    for key, value in one.items():
        for each in every:
            worst = (value - each[key]).abs().max()
            assert worst <= 1e-5 * value.abs().max() + 1e-8, f"{key}: {worst} of {value.abs().max()}"


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gradients_of_batch_norm_depend_on_the_micro_batch_alone(tiny_npz: Path) -> None:
    """What the tolerance above can tell apart: one micro-batch of 128 is another function than four of 32."""
    torch.set_num_threads(1)
    whole, cut = (gradients("encoder, batch norm", tiny_npz, size) for size in (BATCH, SHARE))
    name = "encoder net.fc.weight gradient"
    assert (whole[name] - cut[name]).abs().max() > 1e-3 * whole[name].abs().max()


@pytest.mark.integration
def test_a_mixed_group_agrees_on_what_its_weakest_has(four_workers: Path) -> None:
    found = [json.loads((four_workers / f"precision-{rank}.json").read_text()) for rank in range(4)]
    expected = {"agreed": "fp32", "mixed": True, "alike": "bf16", "alike mixed": False, "goes on in": "fp32"}
    assert found == [expected] * 4


def comes_late(rank: int, folder: str) -> None:
    """Rank 1 takes longer to come than a collective may; the second time it does not come in time."""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    if rank == 1:
        time.sleep(3)
    engine = Engine(torch.device("cpu"), "auto")
    met = engine.mean(torch.tensor([float(rank)])).item()
    engine_module.ASSEMBLE_S = 0.5
    said = ""
    if rank == 0:
        try:
            engine.assemble()
        except RuntimeError as error:
            said = str(error)
    Path(folder, f"late-{rank}.json").write_text(json.dumps([met, said]))


@pytest.mark.integration
def test_workers_wait_for_one_that_has_images_to_bring(tmp_path: Path) -> None:
    spawn(2, tmp_path, comes_late, os.fspath(tmp_path))
    found = [json.loads((tmp_path / f"late-{rank}.json").read_text()) for rank in (0, 1)]
    assert [met for met, _ in found] == [0.5, 0.5]
    assert "1 of 2 workers came" in found[0][1]
