"""States written while training goes on: whole, bounded in memory, the last few and the best of them kept."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from training import tiny_recipe, weights

from arae.errors import InputError
from arae.files import HashingFile
from arae.runs import RunFolder
from arae.train import saving
from arae.train.run import train
from arae.train.saving import Saver, copied
from arae.train.state import Saved, best_of, list_states, newest_state, retained, save_state

CPU = torch.device("cpu")


def state_of(value: float) -> dict[str, Any]:
    return {"trainer": {"weight": torch.full((3,), value)}, "seconds": 1.0, "images": "x", "precision": "fp32"}


def saver_of(folder: Path, keep: int = 2, tell: Any = lambda saved, seconds: None) -> Saver:
    return Saver(folder / "state", stage="encoder", digest="d", keep=keep, tell=tell)


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path: Path) -> None:
    """Training goes on in the very tensors that are being written."""
    state = state_of(1.0)
    with saver_of(tmp_path) as saver:
        saver.save(state, 1)
        state["trainer"]["weight"].fill_(7)
        saver.wait()
        _, payload = newest_state(tmp_path / "state", "encoder", pytest.fail) or pytest.fail("no state")
    assert payload["trainer"]["weight"].tolist() == [1, 1, 1]


def test_copies_share_nothing_and_keep_the_memory_order() -> None:
    weight = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    made = copied({"a": [weight, (1, "x")], "b": None})
    assert made["a"][0].data_ptr() != weight.data_ptr()
    assert made["a"][0].stride() == weight.stride()
    assert made["a"][1:] == [(1, "x")]
    assert made["b"] is None


def test_one_copy_at_a_time_and_the_caller_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a slow disk takes one state the caller is free; a second one waits for the first, with no copy made yet."""
    disk, begun, copies = threading.Event(), threading.Event(), []

    def slow(folder: Path, payload: dict[str, Any], **rest: Any) -> Saved:
        begun.set()
        assert disk.wait(30)
        return save_state(folder, payload, **rest)

    monkeypatch.setattr(saving, "save_state", slow)
    real = Saver._write
    monkeypatch.setattr(Saver, "_write", lambda self, *rest: copies.append(1) or real(self, *rest))
    told: list[int] = []
    with saver_of(tmp_path, tell=lambda saved, seconds: told.append(saved.step)) as saver:
        saver.save(state_of(1.0), 1)
        assert begun.wait(30)
        saver.check()
        assert (told, len(copies)) == ([], 1)
        second = threading.Thread(target=saver.save, args=(state_of(2.0), 2))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert len(copies) == 1
        disk.set()
        second.join(30)
    assert told == [1, 2]
    assert [s.step for s in list_states(tmp_path / "state")] == [1, 2]


def test_what_goes_wrong_in_the_thread_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Saved:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_state", full)
    saver = saver_of(tmp_path)
    saver.save(state_of(1.0), 1)
    with pytest.raises(OSError, match="No space left"):
        saver.wait()
    saver.check()  # once


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    """Where a mount has vanished, the disk underneath must not take its place."""
    with pytest.raises(FileNotFoundError):
        save_state(tmp_path / "gone" / "state", state_of(1.0), stage="encoder", step=1, digest="d", keep=2)
    assert not (tmp_path / "gone").exists()


def saved_at(step: int, score: float | None) -> Saved:
    return Saved(f"{step}.pt", "", 0, "encoder", step, "d", "fp32", score)


@pytest.mark.parametrize(
    ("scores", "keep", "kept", "best"),
    [
        ([None, None, None], 2, [1, 2], None),
        ([0.9, 0.1, 0.2, 0.3], 2, [0, 2, 3], 0),
        ([0.1, None, 0.3], 1, [2], 2),
        ([0.5, 0.5, None, None], 1, [0, 3], 0),  # the earlier of two equal ones
        ([None], 3, [0], None),
        ([-3.0, -9.0, None], 1, [0, 2], 0),
    ],
)
def test_the_last_few_and_the_best_are_kept(
    scores: list[float | None], keep: int, kept: list[int], best: int | None
) -> None:
    states = [saved_at(step, score) for step, score in enumerate(scores)]
    assert [s.step for s in retained(states, keep)] == kept
    found = best_of(states)
    assert (found.step if found else None) == best


def test_only_what_is_listed_stays_on_disk(tmp_path: Path) -> None:
    tmp_path.joinpath("state").mkdir()
    (tmp_path / "state" / "encoder-00000009.pt.tmp").write_bytes(b"of a process that was killed")
    for step, score in enumerate([0.1, 0.9, 0.2, None, 0.3]):
        save_state(tmp_path / "state", state_of(step), stage="encoder", step=step, digest="d", keep=2, score=score)
    listed = {s.file for s in list_states(tmp_path / "state")}
    assert listed == {f"encoder-{step:08d}.pt" for step in (1, 3, 4)}
    assert {p.name for p in (tmp_path / "state").iterdir()} == listed | {"manifest.json"}


def test_a_state_of_a_step_that_has_one_does_not_touch_it_before_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the file and the list leaves what is listed whole."""

    def save(value: float) -> None:
        save_state(tmp_path, state_of(value), stage="encoder", step=6, digest="d", keep=2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    save(1.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012 -- the patch is the kill
        patch.setattr("arae.train.state.write_text", killed)
        save(2.0)
    for value in (1.0, 3.0):
        if value == 3.0:
            save(value)
        found = newest_state(tmp_path, "encoder", pytest.fail)
        assert found is not None
        assert found[1]["trainer"]["weight"][0] == value
        assert len(list_states(tmp_path)) == 1
    assert len(list(tmp_path.glob("*.pt*"))) == 1


def test_a_manifest_of_before_there_were_scores_is_read(tmp_path: Path) -> None:
    save_state(tmp_path, state_of(1.0), stage="encoder", step=1, digest="d", keep=2)
    document = json.loads((tmp_path / "manifest.json").read_text())
    for entry in document["states"]:
        del entry["score"], entry["precision"]
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    (state,) = list_states(tmp_path)
    assert (state.step, state.score) == (1, None)


def test_minutes_save_beside_steps(tiny_npz: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    recipe = tiny_recipe(tiny_npz, state__every=1000, state__minutes=1e-9, state__keep=9).replace({"decoder": None})
    folder.create(recipe)
    events: list[dict[str, Any]] = []
    train(recipe, folder, CPU, events.append)
    assert [e["step"] for e in events if e["event"] == "state"] == list(range(1, 8))


def test_the_best_state_is_what_is_exported_where_the_recipe_says_so(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores by step as given; the weights of step 6, and not of the last, end up in the model."""
    from arae.train.probe import Probe

    scores = iter([0.2, 0.8, 0.4])
    monkeypatch.setattr(Probe, "classify", lambda self, model: {"clean_accuracy": next(scores)})
    made = {}
    for export, steps in (("best", 9), ("last", 6)):
        recipe = tiny_recipe(
            tiny_npz,
            evaluate__looks=None,
            encoder__steps=steps,
            encoder__export=export,
            encoder__schedule={},
            state__every=100,
        ).replace({"decoder": None})
        folder = RunFolder(tmp_path / export)
        folder.create(recipe)
        scores = iter([0.2, 0.8, 0.4])
        train(recipe, folder, CPU)
        made[export] = weights(folder)
    assert made["best"] == made["last"]


def test_a_rename_is_made_safe_and_nothing_temporary_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced, in order: the file before it is renamed, its folder after."""
    synced: list[bool] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append((tmp_path / "encoder-00000001.pt").exists())
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save_state(tmp_path, state_of(1.0), stage="encoder", step=1, digest="d", keep=2)
    assert synced[:2] == [False, True]
    assert {p.name for p in tmp_path.iterdir()} == {"encoder-00000001.pt", "manifest.json"}


@pytest.mark.parametrize("content", ["", '{"states": [', '{"states": [{"file": 1}]}', "[]"])
def test_a_damaged_manifest_is_told_and_costs_no_state(tmp_path: Path, content: str) -> None:
    """Taken for a run without states, it would begin anew and remove them."""
    save_state(tmp_path, state_of(1.0), stage="encoder", step=1, digest="d", keep=2)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json: damaged .*put a good copy"):
        save_state(tmp_path, state_of(2.0), stage="encoder", step=2, digest="d", keep=2)
    assert (tmp_path / "encoder-00000001.pt").exists()


def test_what_torch_makes_of_a_full_disk_is_told_as_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the disk takes some bytes and no more; torch.save then raises an error of its own."""
    room = iter([True] * 3)
    real = HashingFile.write

    class Full(HashingFile):
        def write(self, content: bytes | memoryview) -> int:
            self.file = self.file if next(room, False) else open("/dev/full", "wb", buffering=0)  # noqa: SIM115
            return real(self, content)

    monkeypatch.setattr("arae.files.HashingFile", Full)
    with pytest.raises(OSError, match="No space left") as raised:
        save_state(tmp_path, state_of(1.0), stage="encoder", step=1, digest="d", keep=2)
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_the_next_best_is_exported_where_the_best_is_damaged(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arae.train import course
    from arae.train.probe import Probe

    scores = iter([0.9, 0.1, 0.8])
    monkeypatch.setattr(Probe, "classify", lambda self, model: {"clean_accuracy": next(scores)})
    real = course.read_state
    monkeypatch.setattr(
        course, "read_state", lambda folder, saved, note: (saved.step != 3 and real(folder, saved, note)) or None
    )
    recipe = tiny_recipe(
        tiny_npz, encoder__steps=9, encoder__export="best", state__every=9, evaluate__looks=None
    ).replace({"decoder": None})
    folder = RunFolder(tmp_path / "run")
    folder.create(recipe)
    train(recipe, folder, CPU)
    notes = [json.loads(line).get("text", "") for line in folder.log.read_text().splitlines()]
    assert any("encoder of step 9 is exported" in note for note in notes)
