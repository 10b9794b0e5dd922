"""`arae sweep` through Ray Tune: stages trained once, MLflow's tree, what goes wrong; real processes."""

import json
from pathlib import Path
from typing import Any

import yaml
from disks import on_a_small_disk
from sweeping import EPS, FEATURE, GRID, Sweeping
from tracking import MARKS

from tune.results import load_sweep

pytestmark = [*MARKS]


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


def test_a_full_disk_stops_it_and_with_room_it_goes_on(tmp_path: Path) -> None:
    """Of 8 MiB: it holds some stages, and not all."""
    one = Sweeping(tmp_path / "one", GRID)
    done = on_a_small_disk("8m", one.runs, one.command, env=one.env, cwd=one.home)
    assert done.returncode == 75, done.stderr
    assert "the disk is full" in done.stderr
    assert "same command" in done.stderr.splitlines()[-1]
    begun = {path for kind in ("model", "state") for path in one.runs.glob(f"stages/*/{kind}")}
    assert begun, "nothing was begun before the disk was full"
    code, said = one.run()
    assert code == 0, said
    assert len(one.table()) == 4
    assert set(one.trained().values()) == {1}


def test_trials_with_workers_hold_no_core_of_theirs(tmp_path: Path) -> None:
    """Two trials at once, a worker each, on as many cores as two workers need: they do not wait for each other."""
    one = Sweeping(tmp_path / "one", {FEATURE: {"grid": [0, 0.1]}})
    code, said = one.run("--workers", "1")
    assert code == 0, said
    assert len(one.table()) == 2
    assert set(one.trained().values()) == {1}
    assert {stage["workers"] for entry in one.entries().values() for stage in entry.stages} == {1}
