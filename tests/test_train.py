"""Runs that stop and go on, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_npz
from training import BATCH, tiny_recipe, weights

from arae.config import Recipe
from arae.data.augment import augment
from arae.data.load import open_source, stream
from arae.errors import AraeError, InputError, Stopped
from arae.launch import refuse_another
from arae.runs import RunFolder
from arae.seeds import mix
from arae.train.decoder import DecoderTrainer
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.run import train
from arae.train.state import list_states

CPU = torch.device("cpu")


class StopAt:
    """Asks for a stop once the loop has asked so many times."""

    def __init__(self, asks: int) -> None:
        self.left = asks

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def trained(recipe: Recipe, path: Path, stop: object = None) -> RunFolder:
    folder = RunFolder(path)
    folder.create(recipe)
    train(recipe, folder, CPU, stop=stop or (lambda: False))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the tiny recipe, trained without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return weights(trained(tiny_recipe(make_tiny_npz(folder)), folder / "run"))


@pytest.mark.parametrize("asks", [1, 4, 9, 12])
def test_a_stopped_run_ends_bit_for_bit_where_it_would_have(
    tiny_npz: Path, tmp_path: Path, whole: dict[str, bytes], asks: int
) -> None:
    recipe = tiny_recipe(tiny_npz)
    with pytest.raises(Stopped, match="the same command goes on"):
        trained(recipe, tmp_path / "cut", StopAt(asks))
    assert list_states(tmp_path / "cut" / "state")
    cut = trained(recipe, tmp_path / "cut")
    assert weights(cut) == whole
    assert list(whole) == ["decoder.safetensors", "encoder.safetensors"]
    assert not list_states(cut.state)


@pytest.mark.parametrize("damage", ["flip a byte", "cut short", "remove"])
def test_a_damaged_state_is_told_and_the_one_before_is_used(
    tiny_npz: Path, tmp_path: Path, whole: dict[str, bytes], damage: str
) -> None:
    recipe = tiny_recipe(tiny_npz, evaluate__looks=None)
    with pytest.raises(Stopped):
        trained(recipe, tmp_path / "run", StopAt(4))
    folder = RunFolder(tmp_path / "run")
    old, new = list_states(folder.state)
    assert (old.step, new.step) == (3, 5)
    path = folder.state / new.file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip a byte" else data[:100])
    trained(recipe, folder.path)
    notes = [e["text"] for e in map(json.loads, folder.log.read_text().splitlines()) if e["event"] == "note"]
    assert any(new.file in note for note in notes)
    assert any("at step 3" in note for note in notes)
    assert weights(folder) == whole


def test_another_recipe_is_refused_with_the_difference(tiny_npz: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_npz)
    folder = trained(recipe, tmp_path / "run")
    refuse_another(recipe, folder)
    refuse_another(recipe.replace({"evaluate.n": 5, "state.every": 2}), folder)
    with pytest.raises(InputError, match=r"encoder\.lr = 0\.05 there, 0\.2 here"):
        refuse_another(recipe.replace({"encoder.lr": 0.2}), folder)
    with pytest.raises(InputError, match="trained by another recipe or on other images"):
        train(recipe.replace({"decoder.lr": 0.2}), folder, CPU)


def test_a_loss_that_is_no_number_ends_the_run(tiny_npz: Path, tmp_path: Path) -> None:
    with pytest.raises(AraeError, match=r"loss is (nan|inf).*lower encoder\.lr"):
        trained(tiny_recipe(tiny_npz, encoder__lr=1e30), tmp_path / "run")


def test_workers_that_cannot_share_the_batch_are_told_how() -> None:
    engine = Engine(CPU, "fp32")
    engine.size, engine.rank = 3, 1
    with pytest.raises(InputError, match=r"encoder\.micro_batch"):
        engine.share(2, "encoder")
    assert engine.share(6, "encoder") == range(2, 4)


@pytest.mark.parametrize(("micro_batches", "workers"), [(1, 1), (3, 3), (4, 3), (8, 3), (7, 4), (1024, 9)])
def test_every_micro_batch_is_one_workers_and_none_has_much_more(micro_batches: int, workers: int) -> None:
    engine, shares = Engine(CPU, "fp32"), []
    engine.size = workers
    for engine.rank in range(workers):
        shares.append(engine.share(micro_batches, "encoder"))
    assert [i for share in shares for i in share] == list(range(micro_batches))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_data_order_is_that_of_the_stream(tiny_npz: Path) -> None:
    """What the loop feeds is the addressed stream, augmented by address: batch 5 can be told without batches 0 to 4."""
    from arae.train.log import Log
    from arae.train.loop import Fit, micro_batches

    recipe = tiny_recipe(tiny_npz)
    source = open_source(recipe.data, "train", CPU)
    folder = RunFolder(tiny_npz.parent)
    run = Fit(
        recipe,
        recipe.encoder,
        recipe.data,
        folder,
        source,
        Engine(CPU, "fp32"),
        Log(folder, None, active=False),
        12,
        "any images",
        lambda step: {},
        lambda: False,
    )
    seed = mix(recipe.seed, "order", "encoder")
    ids = torch.from_numpy(stream(source.n, BATCH, seed, 5, 6)).reshape(2, BATCH // 2)
    made = list(micro_batches("encoder", run, 5))[:2]
    everything = list(micro_batches("encoder", run, 0))[10:12]
    for row, micro, late in zip(ids, made, everything, strict=True):
        raw = next(iter(source.batches(row[None].numpy())))
        wanted = augment(raw, row, recipe.data.augment, recipe.data.pad, mix(recipe.seed, "augment", "encoder"))
        assert torch.equal(micro.images, wanted)
        assert torch.equal(late.images, wanted)
        assert torch.equal(micro.labels, source.labels[row % source.n])


@pytest.mark.parametrize(("own", "as_they_are"), [([], True), (None, False), (["flip"], False)])
def test_a_decoder_has_its_own_augmentation(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: list[str] | None, as_they_are: bool
) -> None:
    seen: dict[str, torch.Tensor] = {}
    for stage, trainer in (("encoder", EncoderTrainer), ("decoder", DecoderTrainer)):

        def step(self: object, number: int, batch: list, stage: str = stage, whole: Any = trainer.step) -> Any:
            seen[stage] = torch.cat([micro.images for micro in batch])
            return whole(self, number, batch)

        monkeypatch.setattr(trainer, "step", step)
    trained(tiny_recipe(tiny_npz, encoder__steps=1, decoder__steps=1, decoder__augment=own), tmp_path / "run")
    known = {image.tobytes() for image in np.load(tiny_npz)["images"]}
    levels = {stage: (255 * x).round().byte().permute(0, 2, 3, 1).numpy() for stage, x in seen.items()}
    unchanged = {stage: all(image.tobytes() in known for image in images) for stage, images in levels.items()}
    assert unchanged == {"encoder": False, "decoder": as_they_are}
