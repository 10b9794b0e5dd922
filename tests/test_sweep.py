"""`arae sweep` through Ray Tune: stages trained once, MLflow's tree, what goes wrong; real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_tiny_npz
from tracking import MARKS
from training import tiny_recipe

from arae.config import dump_recipe
from arae.records import read_records
from arae.runs import RunFolder
from tune.journal import Entry, Journal
from tune.results import load_sweep
from tune.store import times_trained

pytestmark = [*MARKS]

EPS, FEATURE = "encoder.attack.eps", "decoder.losses.feature"
PATIENCE_S = 200.0


class Sweeping:
    """The command in a folder of its own."""

    def __init__(self, home: Path, axes: Mapping[str, Any], **overrides: object) -> None:
        self.home, self.runs = home, home / "runs"
        home.mkdir(exist_ok=True)
        (home / "tiny.yaml").write_text(dump_recipe(tiny_recipe(make_tiny_npz(home.parent), **overrides)))
        (home / "space.yaml").write_text(yaml.safe_dump({"axes": dict(axes)}, sort_keys=False))
        self.folder = self.runs / "s"
        self.env = {**os.environ, "ARAE_RUNS": str(self.runs)}
        self.command = [sys.executable, "-m", "arae", "sweep", "tiny.yaml", "space.yaml", "name=s", "--jobs", "2"]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *more],
            cwd=self.home,
            env=self.env,
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, *more: str) -> tuple[int, str]:
        """Exit code, and what was said."""
        with self.start(*more) as process:
            out, error = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out + error

    def entries(self) -> dict[str, Entry]:
        return Journal(self.folder).entries()

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return list(Journal(self.folder).events(*kinds))

    def table(self) -> dict[str, list[tuple[str, float | None]]]:
        """Every trial's values, of those that finished."""
        done = [entry for entry in self.entries().values() if entry.state == "finished"]
        return {e.id: [(r.metric, r.value) for r in read_records(self.folder / e.id)] for e in done}

    def trained(self) -> dict[str, int]:
        """How often each stage's training came to its end."""
        stages = sorted((self.runs / "stages").iterdir())
        return {
            path.name: times_trained(RunFolder(path), "encoder" if path.name.startswith("encoder") else "decoder")
            for path in stages
        }


def until(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


GRID = {EPS: {"grid": [0, 0.5]}, FEATURE: {"grid": [0, 0.1]}}


def test_each_stage_is_trained_once_and_mlflow_has_the_tree(tmp_path: Path) -> None:
    one = Sweeping(tmp_path / "one", GRID)
    code, said = one.run()
    assert code == 0, said
    assert len(one.table()) == 4
    assert set(one.trained().values()) == {1}
    assert sorted(name.split("-")[0] for name in one.trained()) == ["decoder"] * 4 + ["encoder"] * 2
    sweep = load_sweep(one.folder)
    assert sweep.spent.needed == {"encoder": 4, "decoder": 4}
    assert sweep.spent.stages == {"encoder": 2, "decoder": 4}
    assert sweep.spent.saved_hours > 0
    for trial in sweep.trials:
        record = trial.record("robust_accuracy")
        assert record is not None
        assert record.value == trial.entry.objectives["robust_accuracy"]
        assert record.model.train_eps == trial.point.values[EPS]
    _check_mlflow(one, sweep.trials)

    begun = len(one.events("begin"))
    code, said = one.run()
    assert code == 0, said
    assert len(one.events("begin")) == begun, "finished trials are not run again"
    code, said = one.run("decoder.lr=0.5")
    assert (code, "another recipe" in said) == (2, True), said


def _check_mlflow(one: Sweeping, trials: Any) -> None:
    """A parent, a child a trial, a grandchild a stage; a trial's parameters are the axes and nothing else."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{one.runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    by_stage: dict[str, list[Any]] = {}
    for run in runs:
        by_stage.setdefault(run.data.tags["stage"].split()[0], []).append(run)
    (parent,) = by_stage["sweep"]
    assert len(by_stage["trial"]) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in by_stage["trial"]} == {parent.info.run_id}
    ids = {run.info.run_id for run in by_stage["trial"]}
    stages = by_stage["encoder"] + by_stage["decoder"]
    assert len(stages) == 6
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} <= ids
    assert all(not run.data.params for run in [*stages, parent])
    for run in by_stage["trial"]:
        trial = next(trial for trial in trials if trial.id == run.data.tags["trial"])
        assert run.data.params == {key: json.dumps(value) for key, value in trial.point.values.items()}
        assert run.data.metrics["final/psnr.reconstruction"] == trial.entry.objectives["psnr"]
        assert {"git", "digest", "norm", "eps", "dataset"} <= run.data.tags.keys()
        assert run.info.status == "FINISHED"


def test_a_trial_that_always_fails_is_left_out_and_none_that_succeeds_is_an_error(tmp_path: Path) -> None:
    """By a learning rate that no number survives. MLflow's server is away meanwhile, which holds nothing up."""
    mixed = Sweeping(tmp_path / "mixed", {"decoder.lr": {"grid": [1e-3, 1e30]}})
    mixed.env["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:1"
    code, said = mixed.run("search.retries=1")
    assert code == 0, said
    assert "1 of 2 trials failed and are left out (lr=1e+30:" in said
    assert said.count("tried again after") == 1
    assert said.count("MLflow is away") == 1
    assert [entry.state for entry in mixed.entries().values()] == ["finished", "failed"]
    failed = list(mixed.entries().values())[1]
    assert failed.reason is not None
    assert "lr" in failed.reason or "finite" in failed.reason

    (mixed.home / "space.yaml").write_text(yaml.safe_dump({"axes": {"decoder.lr": {"grid": [1e30]}}}))
    code, said = mixed.run("name=none", "search.retries=0")
    assert code == 1, said
    assert "none of 1 trials came to its end; the first: " in said


@pytest.mark.cluster
@pytest.mark.ray
def test_killed_three_times_it_ends_with_the_same_table(tmp_path: Path) -> None:
    """A trial's process, then the driver, then Ray's own; nothing is trained twice."""
    sizes = {"encoder__steps": 120, "decoder__steps": 120, "state__every": 10}
    whole, killed = (Sweeping(tmp_path / name, GRID, **sizes) for name in ("whole", "killed"))
    code, said = whole.run()
    assert code == 0, said

    def stages_begun() -> int:
        return sum(1 for path in killed.runs.glob("stages/*/state/manifest.json"))

    with killed.start() as process:
        until(lambda: stages_begun() >= 1, process)
        assert end(killed.home, "ray::ImplicitFunc") == 1
        until(lambda: len(killed.events("end")) >= 1, process)
        process.kill()
    time.sleep(2)
    with killed.start() as process:
        begun = len(killed.events("end"))
        until(lambda: len(killed.events("end")) > begun or stages_begun() > 4, process)
        assert end(killed.home, "raylet", "gcs_server", most=9) > 0
        process.wait(PATIENCE_S)
        assert process.returncode != 0
    code, said = killed.run()
    assert code == 0, said
    assert killed.table() == whole.table()
    assert killed.trained() == whole.trained()
    assert set(killed.trained().values()) == {1}


def end(home: Path, *names: str, most: int = 1) -> int:
    """Kill so many processes by these names that belong to the sweep in `home`."""
    found = 0
    for path in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            words = (path / "cmdline").read_bytes().decode(errors="replace")
            mine = str(home).encode() in (path / "environ").read_bytes()
            if mine and any(name in words for name in names) and found < most:
                os.kill(int(path.name), signal.SIGKILL)
                found += 1
    return found
