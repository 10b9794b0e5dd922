"""A run killed by SIGKILL goes on by the same command, and ends bit for bit where it would have (one worker, CPU)."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training import tiny_recipe, weights
from waiting import PATIENCE_S, until

from arae.config import Recipe, dump_recipe
from arae.runs import RunFolder

STEPS, EVERY = 40, 7


def steps_of(log: Path, stage: str) -> list[int]:
    """Steps of a stage that the log has told so far."""
    lines = log.read_text().splitlines() if log.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [e["step"] for e in events if e["event"] == "interval" and e["stage"] == stage]


def kill_at(command: list[str], log: Path, stage: str, step: int) -> None:
    """Start the command and SIGKILL it as soon as it has told this step of this stage."""
    before = len(steps_of(log, stage))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until(lambda: any(s >= step for s in steps_of(log, stage)[before:]), f"step {step}", process, pause=0.005)
        process.send_signal(signal.SIGKILL)


def write_recipe(path: Path, recipe: Recipe) -> str:
    path.write_text(dump_recipe(recipe))
    return str(path)


@pytest.mark.integration
def test_sigkill_in_both_stages_costs_at_most_n_steps_and_no_bit(tmp_path: Path, tiny_npz: Path) -> None:
    recipe = tiny_recipe(tiny_npz, encoder__steps=STEPS, decoder__steps=STEPS, state__every=EVERY)
    runs = Path(os.environ["ARAE_RUNS"])
    file = write_recipe(tmp_path / "killed.yaml", recipe.replace({"name": "killed"}))
    command = [sys.executable, "-m", "arae", "train", file]
    folder = RunFolder(runs / "killed")
    kill_at(command, folder.log, "encoder", 17)
    kill_at(command, folder.log, "decoder", 24)
    subprocess.run(command, check=True, capture_output=True)

    notes = [e["text"] for e in map(json.loads, folder.log.read_text().splitlines()) if e["event"] == "note"]
    resumed = [int(note.split(" at step ")[1].split()[0]) for note in notes if "resumed" in note]
    assert len(resumed) == 2
    for stage, start in zip(("encoder", "decoder"), resumed, strict=True):
        told = steps_of(folder.log, stage)
        killed_at = next(a for a, b in itertools.pairwise(told) if b <= a)
        assert start > 0
        assert killed_at - start <= EVERY

    file = write_recipe(tmp_path / "whole.yaml", recipe.replace({"name": "whole"}))
    subprocess.run([sys.executable, "-m", "arae", "train", file], check=True, capture_output=True)
    assert weights(folder) == weights(RunFolder(runs / "whole"))


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75(tmp_path: Path, tiny_npz: Path, number: signal.Signals) -> None:
    recipe = tiny_recipe(tiny_npz, encoder__steps=400, state__every=400)
    file = write_recipe(tmp_path / "r.yaml", recipe)
    folder = RunFolder(Path(os.environ["ARAE_RUNS"]) / "tiny")
    command = [sys.executable, "-m", "arae", "train", file]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: steps_of(folder.log, "encoder"), "training", process, pause=0.01)
        process.send_signal(number)
        error = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 75
    assert "the same command goes on from there" in error
    assert "Traceback" not in error
    (saved,) = json.loads((folder.state / "manifest.json").read_text())["states"]
    assert 0 < saved["step"] < 400
