"""One, two and four workers compute the same training: same samples, same global batch, same micro-batches.

In float64, where rounding stays far below anything else that could differ: with batch norm, PGD, dropout, spectral norm
and a discriminator. Adam has its usual betas here. With the paper's (0, 0.9) an update is nearly the sign of the newest
gradient, and a last bit grows to anything within 50 steps, on however many workers.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_npz
from groups import tensors, train_on
from training import tiny_recipe

from arae.config import Recipe
from arae.runs import RunFolder

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
STEPS = 50
WORLDS = (1, 2, 4)
TOLERANCE = 1e-9


def recipe_of(images: Path) -> Recipe:
    return tiny_recipe(
        images,
        precision="fp64",
        encoder__name="resnet18-cifar",
        encoder__width=0.125,
        encoder__steps=STEPS,
        encoder__batch=16,
        encoder__micro_batch=4,
        encoder__lr=0.005,
        decoder__steps=STEPS,
        decoder__batch=16,
        decoder__micro_batch=4,
        decoder__lr=3e-4,
        decoder__discriminator_lr=3e-4,
        decoder__betas=[0.9, 0.999],
        state__every=20,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], RunFolder]:
    """The finished run on a number of workers; each is made once."""
    folder = tmp_path_factory.mktemp("worlds")
    recipe, made = recipe_of(make_tiny_npz(folder)), {}

    def of(world: int) -> RunFolder:
        if world not in made:
            made[world] = train_on(world, recipe, folder / str(world))
        return made[world]

    return of


def intervals(run: RunFolder, stage: str) -> list[dict]:
    events = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [e for e in events if e["event"] == "interval" and e["stage"] == stage]


def assert_same(run: RunFolder, other: RunFolder) -> None:
    ones, others = tensors(run), tensors(other)
    assert set(ones) == set(others)
    for name, one in ones.items():
        worst = (one.double() - others[name].double()).abs().max()
        assert worst <= TOLERANCE * one.double().abs().max(), f"{name}: {worst}"


@pytest.mark.parametrize("world", WORLDS[1:])
def test_any_number_of_workers_computes_what_one_does(trained: Callable[[int], RunFolder], world: int) -> None:
    one, several = trained(1), trained(world)
    assert {tensor.dtype for tensor in tensors(one).values()} == {torch.float64, torch.int64}
    assert_same(one, several)
    for stage in ("encoder", "decoder"):
        mine, theirs = intervals(one, stage), intervals(several, stage)
        assert [e["step"] for e in mine] == [e["step"] for e in theirs]
        assert [len(e["workers"]) for e in theirs] == [world] * len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert b["metrics"] == pytest.approx(a["metrics"], rel=TOLERANCE)
    for stage, falls in (("encoder", 0.95), ("decoder", 0.6)):
        losses = [e["metrics"]["loss"] for e in intervals(one, stage)]
        assert losses[-1] < falls * losses[0]  # or any two trainings would agree


@pytest.mark.parametrize(("before", "after"), [(4, 1)])
def test_a_state_goes_on_at_another_number_of_workers(
    trained: Callable[[int], RunFolder], tmp_path: Path, before: int, after: int
) -> None:
    whole = trained(1)
    recipe = recipe_of(make_tiny_npz(tmp_path))
    cut = train_on(before, recipe, tmp_path / "cut", steps=31)
    assert "encoder-00000031.pt" in (cut.state / "manifest.json").read_text()
    assert_same(whole, train_on(after, recipe, tmp_path / "cut"))


def test_a_group_of_three_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """A ring of three sums each element in an order of its own, by its place in the bucket: the places must stay."""
    recipe = recipe_of(make_tiny_npz(tmp_path)).replace({"encoder.steps": 12, "decoder.steps": 6})
    whole = tensors(train_on(3, recipe, tmp_path / "whole"))
    train_on(3, recipe, tmp_path / "cut", steps=7)
    again = tensors(train_on(3, recipe, tmp_path / "cut"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
