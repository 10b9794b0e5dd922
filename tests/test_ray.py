"""Training through Ray Train: the same run, and the same ends, as in one process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training import tiny_recipe
from waiting import PATIENCE_S, until

from arae.config import dump_recipe
from arae.runs import RunFolder

Run = Callable[..., subprocess.CompletedProcess[str]]


def told(folder: RunFolder, event: str) -> list[dict]:
    lines = folder.log.read_text().splitlines() if folder.log.exists() else []
    return [e for e in (json.loads(line) for line in lines if line.endswith("}")) if e["event"] == event]


@pytest.mark.integration
def test_sigterm_saves_on_two_workers_and_the_same_command_goes_on(
    tmp_path: Path, tiny_npz: Path, run_arae: Run
) -> None:
    recipe = tiny_recipe(tiny_npz, encoder__steps=400, decoder__steps=4, state__every=5000)
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_recipe(recipe))
    folder = RunFolder(Path(os.environ["ARAE_RUNS"]) / "tiny")
    command = [sys.executable, "-m", "arae", "train", str(file), "--workers", "2"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        until(lambda: told(folder, "interval"), "training", process)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 75, error
    assert "the same command goes on from there" in error
    assert "Traceback" not in error
    (saved,) = json.loads((folder.state / "manifest.json").read_text())["states"]
    assert 0 < saved["step"] < 400

    done = run_arae("train", file, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert any(f"at step {saved['step']}" in e["text"] for e in told(folder, "note"))
    config = json.loads((folder.model / "config.json").read_text())
    assert {config[stage]["training"]["world_size"] for stage in ("encoder", "decoder")} == {2}
    assert done.stderr.count("decoder 4/4") == 1  # told once, not once a worker
    assert [(e["world_size"], len(e["hosts"])) for e in told(folder, "group")] == [(2, 2), (2, 2)]
    assert not told(folder, "restart")  # it was the user's


def test_a_batch_that_can_not_be_shared_is_refused_before_ray_starts(
    tmp_path: Path, tiny_npz: Path, run_arae: Run
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_recipe(tiny_recipe(tiny_npz)))
    done = run_arae("train", file, "--workers", 3)
    assert done.returncode == 2
    assert "encoder.micro_batch" in done.stderr
