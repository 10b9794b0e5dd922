"""What goes wrong in the middle of training: what is said, with which exit code, and what is left behind."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import BATCH, tiny_recipe, weights

from arae.config import Recipe
from arae.data.load import open_source, stream
from arae.errors import AraeError, InputError, Stopped
from arae.runs import RunFolder
from arae.seeds import mix
from arae.train import course, faults
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.run import train
from arae.train.state import list_states, newest_state

CPU = torch.device("cpu")


def begun(recipe: Recipe, path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create(recipe)
    return folder


def encoder_recipe(images: Path, **over: object) -> Recipe:
    return tiny_recipe(images, encoder__steps=9, evaluate__looks=None, **over).replace({"decoder": None})


def notes(folder: RunFolder) -> list[str]:
    events = map(json.loads, folder.log.read_text().splitlines())
    return [e["text"] for e in events if e["event"] == "note"]


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int, where: str = "loss") -> None:
    """Make the steps go wrong: their loss, or the weights that they leave, are NaN."""
    real = EncoderTrainer.step

    def step(self: EncoderTrainer, number: int, micros: Any) -> dict[str, torch.Tensor]:
        out = real(self, number, micros)
        if number in steps:
            if where == "weights":
                next(self.model.parameters()).data.fill_(torch.nan)
            else:
                out["loss"] = out["loss"] * torch.nan
        return out

    monkeypatch.setattr(EncoderTrainer, "step", step)


@pytest.mark.parametrize(
    ("where", "at", "told", "suspects", "kept"),
    [
        ("loss", 5, 5, [4, 5], 3),  # it may have been the update before
        ("weights", 5, 5, [5], 3),  # about to be saved: they are looked at
        ("weights", 3, 4, [3, 4], 3),  # the next loss tells it
    ],
)
def test_a_loss_that_is_no_number_stops_and_names_the_batch(
    tiny_npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    at: int,
    told: int,
    suspects: list[int],
    kept: int,
) -> None:
    poison(monkeypatch, at, where=where)
    recipe = encoder_recipe(tiny_npz)
    folder = begun(recipe, tmp_path / "run")
    with pytest.raises(AraeError, match=rf"encoder's loss is nan at step {told + 1}.*not_finite\.jsonl") as raised:
        train(recipe, folder, CPU)
    assert raised.value.exit_code == 1
    line = json.loads((folder.path / "not_finite.jsonl").read_text())
    ids = stream(96, BATCH, mix(recipe.seed, "order", "encoder"), suspects[0], told + 1)
    batches = [
        {"step": step, "epochs": [1], "images": (row % 96).tolist()} for step, row in zip(suspects, ids, strict=True)
    ]
    assert line == {"stage": "encoder", "step": told, "loss": "nan", "batches": batches}
    found = newest_state(folder.state, "encoder", pytest.fail)
    assert found is not None
    assert found[0].step == kept
    assert all(torch.isfinite(value).all() for value in found[1]["trainer"]["model"].values())


@pytest.mark.parametrize("where", ["loss", "weights"])
@pytest.mark.parametrize("last", [3, 4, 5])
def test_rolling_back_leaves_the_batch_out_and_goes_on(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, last: int
) -> None:
    """Whatever shows first, a loss or the weights, and wherever the last state was: the step at fault is found."""
    poison(monkeypatch, 0, last, where=where)
    recipe = encoder_recipe(tiny_npz, state__not_finite="rollback")
    folder = begun(recipe, tmp_path / "run")
    train(recipe, folder, CPU)
    assert any("gone back to step 0" in note for note in notes(folder))
    assert any("gone back to step 3" in note for note in notes(folder))

    # What is left out is part of the state: stopped and resumed, it ends at the same weights.
    asked = iter(range(100))
    cut = begun(recipe, tmp_path / "cut")
    with pytest.raises(Stopped):
        train(recipe, cut, CPU, stop=lambda: next(asked) == 7)
    kept = newest_state(cut.state, "encoder", pytest.fail)
    assert kept is not None
    assert kept[1]["left_out"] == [0, last]
    train(recipe, cut, CPU)
    assert weights(cut) == weights(folder)


def test_going_back_again_and_again_ends(tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 1, 2, 3, 4)
    recipe = encoder_recipe(tiny_npz, state__not_finite="rollback")
    with pytest.raises(AraeError, match="again, after 3 batches were left out"):
        train(recipe, begun(recipe, tmp_path / "run"), CPU)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (None, "encoder.micro_batch lower"),
        (2**34, "largest that should fit: encoder.micro_batch=8"),
        (1, "not even one image fits"),
    ],
)
def test_out_of_memory_says_what_fits(tiny_npz: Path, there: int | None, said: str) -> None:
    recipe = encoder_recipe(tiny_npz)
    engine = Engine(CPU, "fp32")
    error = faults.out_of_memory(recipe, "encoder", open_source(recipe.data, "train", CPU), there, engine)
    assert said in str(error)
    assert "a micro-batch of 16 images needs about" in str(error)


def test_a_device_that_runs_out_of_memory_is_one_line(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: there is no GPU here to fill."""
    real = EncoderTrainer.step

    def step(self: EncoderTrainer, number: int, micros: Any) -> dict[str, torch.Tensor]:
        if number == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, number, micros)

    monkeypatch.setattr(EncoderTrainer, "step", step)
    monkeypatch.setattr(faults, "_device_memory", lambda device: 16 * faults.GIB)
    recipe = encoder_recipe(tiny_npz)
    folder = begun(recipe, tmp_path / "run")
    said = r"encoder: out of memory; a micro-batch of 16 images needs about .* has 16\.00 GiB; .*encoder\.micro_batch=8"
    with pytest.raises(InputError, match=said) as raised:
        train(recipe, folder, CPU)
    assert raised.value.exit_code == 2
    assert [s.step for s in list_states(folder.state)][-1] == 3


def test_storage_that_goes_away_ends_with_75_and_the_state_is_there_when_it_is_back(
    tiny_npz: Path, tmp_path: Path
) -> None:
    recipe = encoder_recipe(tiny_npz)
    folder, aside = begun(recipe, tmp_path / "run"), tmp_path / "aside"
    asked = iter(range(100))

    def vanish() -> bool:
        if next(asked) == 4:
            folder.path.rename(aside)
        return False

    with pytest.raises(Stopped, match="the storage does not answer") as raised:
        train(recipe, folder, CPU, stop=vanish)
    assert raised.value.exit_code == 75
    assert not folder.path.exists()
    aside.rename(folder.path)
    assert list_states(folder.state)
    train(recipe, folder, CPU)
    whole = begun(recipe, tmp_path / "whole")
    train(recipe, whole, CPU)
    assert weights(folder) == weights(whole)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_errors_of_a_network_disk_are_told_likewise(tmp_path: Path, number: int) -> None:
    with pytest.raises(Stopped, match="the same command"), faults.storage_told(RunFolder(tmp_path)):
        raise OSError(number, "some error")


def test_other_errors_of_files_are_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), faults.storage_told(RunFolder(tmp_path)):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_ids_of_a_batch_name_images_and_epochs(tmp_path: Path) -> None:
    lost = faults.LostNumbers(2, float("inf"), exact=True)
    faults.write_batches(RunFolder(tmp_path), "decoder", lost, np.array([[98, 99, 203]]), 100)
    line = json.loads((tmp_path / "not_finite.jsonl").read_text())
    batch = {"step": 2, "epochs": [0, 2], "images": [98, 99, 3]}
    assert line == {"stage": "decoder", "step": 2, "loss": "inf", "batches": [batch]}


@pytest.mark.parametrize(
    ("own", "begun_in", "wanted", "goes_on_in"),
    [
        ("bf16", None, "auto", "bf16"),
        ("bf16", "fp32", "auto", "fp32"),  # every device has it
        ("bf16", "fp16", "auto", "bf16"),  # a CPU has no fp16: resuming then says what to do
        ("fp32", "bf16", "fp32", "fp32"),  # the recipe decides
    ],
)
def test_a_stage_goes_on_in_the_precision_it_was_begun_in(
    monkeypatch: pytest.MonkeyPatch, own: str, begun_in: str | None, wanted: str, goes_on_in: str
) -> None:
    monkeypatch.setattr("arae.precision.cpu_has_bf16", lambda: own == "bf16")
    engine = Engine(CPU, wanted)
    engine.go_on_in(begun_in, wanted)
    assert engine.precision == goes_on_in


def test_courses_of_older_states_are_read() -> None:
    from arae.train.state import Saved

    found = course.course_of(Saved("a", "", 0, "encoder", 7, "d"), {"seconds": 2.0})
    assert found == course.Course(7, 2.0, [], None)
