"""A run and its mirror: what the tracker makes of a run's events, and where it goes."""

import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tracking
from tracking import GENEROUS, PGD, T0, Notes, begin, client, epoch, history, interval, recipe, record, run_of, stage
from waiting import PATIENCE_S

from arae.errors import Stopped
from arae.monitor.progress import Progress
from arae.runs import RunFolder
from arae.tracking import mirror
from arae.tracking import tracker as tracker_module
from arae.tracking.journal import Journal
from arae.tracking.mirror import PENDING, tracking_uri
from arae.tracking.operations import speeds

pytestmark = tracking.MARKS
root, away = tracking.root, tracking.away

# --- a run and its mirror -----------------------------------------------------------------------------------------


def test_a_whole_run_is_mirrored(root: Path) -> None:
    folder = RunFolder.of(recipe(), root)
    (folder.images).mkdir(parents=True)
    (folder.images / "decoder-000100.png").write_bytes(b"png")
    with begin(root, parent="demo") as tracker:
        tracker(stage("started"))
        for step in (10, 20, 30):
            tracker(interval(step, 3.0 - step / 100))
        tracker(epoch(1, {"loss": 2.0, "robust_accuracy": 0.5}))
        tracker(epoch(2, {"loss": 2.5, "robust_accuracy": 0.6}))
        tracker(stage("finished"))
        tracker({"event": "picture", "stage": "decoder", "step": 100, "path": "images/decoder-000100.png"})
        folder.records.write_text("{}\n")
        tracker.log_records([record("psnr", 23.5), record("robust_accuracy", 0.6, threat=PGD), record("lpips", None)])
        assert tracker.close(timeout=GENEROUS)
    assert not (folder.path / PENDING).exists()
    run = run_of(root)
    assert (run.info.run_name, run.info.status) == ("demo/eps-1.5", "FINISHED")
    assert client(root).get_experiment(run.info.experiment_id).name == "demo"
    assert run.data.params["encoder.attack.eps"] == "1.5"
    assert run.data.params["train_eps"] == "1.5"
    wanted = {"scale": "small", "norm": "l2", "eps": "1.5", "dataset": "fashion-mnist", "recipe": "demo/eps-1.5"}
    wanted |= {
        "digest": recipe().digest,
        "stage": "encoder finished",
        "mlflow.parentRunId": run_of(root, "demo").info.run_id,
    }
    assert wanted.items() <= run.data.tags.items()
    assert run.data.tags["git"]
    assert history(root, "encoder/loss") == [(s, int(1000 * (T0 + s)), 3.0 - s / 100) for s in (10, 20, 30)]
    expected = {
        "encoder/images_per_s": 800.0,
        "encoder/epoch/loss": 2.5,
        "best/encoder/loss": 2.0,
        "best/encoder/robust_accuracy": 0.6,
        "final/encoder/loss": 2.5,
        "final/encoder/robust_accuracy": 0.6,
        "final/psnr.reconstruction": 23.5,
        "final/robust_accuracy.l2-1.5.pgd-50x5": 0.6,
        "train_eps": 1.5,
    }
    assert expected.items() <= run.data.metrics.items()
    assert not any("lpips" in name for name in run.data.metrics)
    found = {a.path for folder in ("", "images") for a in client(root).list_artifacts(run.info.run_id, folder or None)}
    assert {"recipe.yaml", "records.jsonl", "images/decoder-000100.png"} <= found
    assert (root / "mlartifacts").is_dir()


def test_a_restart_continues_the_same_run(root: Path) -> None:
    first = begin(root)
    for step in (10, 20):
        first(interval(step, 1.0))
    first(epoch(1, {"loss": 1.0}))
    first.close("KILLED", timeout=GENEROUS)
    before = run_of(root)
    assert before.info.status == "KILLED"
    again = begin(root)
    for step in (10, 20, 30):  # resumed from step 0: two steps come again, later and with the same values
        again(interval(step, 1.0, late=500))
    again(epoch(1, {"loss": 1.0}))
    again(epoch(2, {"loss": 2.0}))
    assert again.close(timeout=GENEROUS)
    after = run_of(root)
    assert after.info.run_id == before.info.run_id
    assert after.info.status == "FINISHED"
    assert [step for step, _, _ in history(root, "encoder/loss")] == [10, 20, 30]
    assert after.data.metrics["best/encoder/loss"] == 1.0


def group_interval(step: int, works: list[float], **fields: Any) -> dict[str, Any]:
    workers = [
        {"rank": rank, "host": f"h{rank}", "images_per_s": 400.0, "work_s": work, "wait_s": 0.1}
        for rank, work in enumerate(works)
    ]
    return interval(step, 1.0) | {"workers": workers, "step_s": 0.5, "eta_s": 60.0, "saving_s": 0.25} | fields


def test_the_group_its_speed_and_its_restarts_are_mirrored(root: Path) -> None:
    reason = "worker 1 on h1 was killed by signal 9"
    group = {"event": "group", "time": T0, "hosts": ["h0", "h1"], "device": "cpu", "precision": "fp32", "engine": "ddp"}
    restart = {"event": "restart", "time": T0, "reason": reason, "world_size": 1, "step": 10}
    first = begin(root)
    first(group | {"world_size": 2})
    first(group_interval(10, [0.2, 0.4]))
    first(restart | {"count": 1})
    first.close("KILLED", timeout=GENEROUS)
    again = begin(root)  # a new launch counts its own restarts from one
    again(restart | {"count": 1, "step": 20})
    again(group | {"world_size": 1, "hosts": ["h0"]})
    again(group_interval(30, [0.2]))
    assert again.close(timeout=GENEROUS)
    run = run_of(root)
    wanted = {"workers": "1", "hosts": "h0", "device": "cpu", "precision": "fp32", "engine": "ddp"}
    assert wanted.items() <= run.data.tags.items()
    told = run.data.tags["restarts"].splitlines()
    assert [line.split()[0] for line in told] == ["2.", "1."]
    assert told[1].endswith(f"{reason}; goes on from step 10 by 1 worker")
    assert [(step, value) for step, _, value in history(root, "restarts")] == [(1, 1.0), (2, 2.0)]
    expected: dict[str, Any] = {
        "loader_wait": [(10, 0.2), (30, 0.2)],
        "saving_s": [(10, 0.25), (30, 0.25)],
        "eta_s": [(10, 60.0), (30, 60.0)],
        "world_size": [(10, 2.0), (30, 1.0)],
        "straggler_ratio": [(10, pytest.approx(4 / 3))],
        "workers/0/images_per_s": [(10, 400.0)],
        "workers/1/work_s": [(10, 0.4)],
    }
    assert {
        name: [(step, value) for step, _, value in history(root, f"encoder/{name}")] for name in expected
    } == expected


@pytest.mark.parametrize("workers", [2, 16, 17, 500])
def test_the_number_of_series_does_not_grow_with_the_group(workers: int) -> None:
    found = speeds(group_interval(10, [0.1 * (rank + 1) for rank in range(workers)]))
    each = {name: value for name, value in found.items() if name.startswith("workers/")}
    assert len(each) == (2 * workers if workers <= 16 else 6)
    assert max(value for name, value in each.items() if "work_s" in name) == pytest.approx(0.1 * workers)


def test_the_reasons_of_many_restarts_stay_short(away: str, tmp_path: Path) -> None:
    tracker = begin(tmp_path)
    for n in range(100):
        tracker({"event": "restart", "time": T0, "count": n, "reason": f"{n} " * 500, "world_size": 2, "step": n})
    tracker.close(timeout=GENEROUS)
    tags = [o["value"] for o in Journal(tmp_path / "demo/eps-1.5" / PENDING).all() if o.get("key") == "restarts"]
    assert len(tags) == 100
    assert tags[-1].startswith("100. ")
    assert max(map(len, tags)) < 5000


def test_parent_and_children_are_one_family(root: Path) -> None:
    children = [recipe("demo/eps-0", encoder__attack={"eps": 0}), recipe("demo/eps-1.5")]
    with begin(root, recipe("demo")):  # alive while its children come and go
        for child in children:
            begin(root, child, parent="demo").close(timeout=GENEROUS)
    parent = run_of(root, "demo").info
    found = client(root).search_runs([parent.experiment_id], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert {run.info.run_name for run in found} == {"demo/eps-0", "demo/eps-1.5"}
    assert len(client(root).search_runs([parent.experiment_id])) == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (Stopped("s"), "KILLED"), (KeyboardInterrupt(), "KILLED"), (OSError(), "FAILED")],
)
def test_the_status_says_how_it_ended(tmp_path: Path, error: BaseException | None, status: str) -> None:
    tracker = begin(tmp_path, enabled=False)
    ends: list[str] = []
    tracker.close = lambda status="", timeout=0.0: bool(ends.append(status))  # type: ignore[method-assign]
    tracker.__exit__(type(error) if error else None, error, None)
    assert ends == [status]


def test_what_cannot_be_changed_in_mlflow_is_said_in_a_tag(root: Path) -> None:
    begin(root).close(timeout=GENEROUS)
    assert begin(root, recipe(encoder__attack__eps=2.0, encoder__lr=0.1)).close(timeout=GENEROUS)
    run = run_of(root)
    assert run.data.params["encoder.attack.eps"] == "1.5"
    assert run.data.tags["changed.encoder.attack.eps"] == "2.0"
    assert run.data.tags["eps"] == "2"


def test_one_refused_metric_holds_nothing_up(root: Path) -> None:
    tracker = begin(root)
    tracker(interval(10, 1.0) | {"metrics": {"x" * 300: 1.0}})
    tracker(interval(20, 2.0))
    assert tracker.close(timeout=GENEROUS)
    assert [point[2] for point in history(root, "encoder/loss")] == [2.0]
    assert any("refused" in note for note in tracker._note)  # type: ignore[attr-defined]


def test_a_run_deleted_in_mlflow_is_made_anew(root: Path) -> None:
    begin(root).close(timeout=GENEROUS)
    old = run_of(root).info.run_id
    client(root).delete_run(old)
    assert begin(root).close(timeout=GENEROUS)
    assert run_of(root).info.run_id != old
    assert run_of(root).info.status == "FINISHED"


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event": "unheard of"},
        {"event": "interval"},
        {"event": "interval", "stage": "encoder", "step": "x", "time": 0, "metrics": {"loss": 1}},
        {"event": "interval", "stage": "encoder", "step": 1, "time": 0, "metrics": None},
        {"event": "epoch", "stage": "encoder", "step": 1, "time": None, "metrics": {"loss": 1.0}},
        {"event": "picture"},
        {"event": "stage", "stage": "encoder"},
        {"event": "note", "text": "resumed"},
    ],
)
def test_events_that_are_not_understood_are_passed_over(away: str, tmp_path: Path, event: dict[str, Any]) -> None:
    tracker = begin(tmp_path)
    before = (tmp_path / "demo/eps-1.5" / PENDING).read_text()
    tracker(event)
    assert (tmp_path / "demo/eps-1.5" / PENDING).read_text() == before
    tracker.close(timeout=GENEROUS)


# --- without MLflow, without a disk -------------------------------------------------------------------------------


def test_without_mlflow_there_is_one_note_and_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "_said_missing", threading.Event())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    notes = Notes()
    for _ in range(2):
        with begin(tmp_path, note=notes) as tracker:
            tracker(interval(1, 1.0))
            tracker.log_records([record("psnr", 1.0)])
    assert len(notes) == 1
    assert "arae[track]" in notes[0]
    assert not (tmp_path / "demo/eps-1.5" / PENDING).exists()


def test_a_full_disk_does_not_reach_the_training(away: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = begin(tmp_path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    tracker(interval(1, 1.0))
    assert any("No space left" in note for note in tracker._note)  # type: ignore[attr-defined]
    tracker.close(timeout=GENEROUS)


def test_a_tracker_that_is_switched_off_leaves_no_trace(tmp_path: Path) -> None:
    tracker = begin(tmp_path, enabled=False)
    tracker(interval(1, 1.0))
    assert tracker.close()
    assert {path.name for path in (tmp_path / "demo/eps-1.5").iterdir()} == {"recipe.yaml"}


# --- where it goes ------------------------------------------------------------------------------------------------


def test_the_store_lies_beside_the_runs_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(Path("runs")) == "http://tracker:5000"


def test_the_users_own_time_outs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in mirror.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    mirror.prepare_environment()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


@pytest.mark.integration
def test_two_processes_make_one_store_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code = (
        "import sys; from pathlib import Path; from tracking import *;"
        "t = begin(Path(sys.argv[1]), recipe(sys.argv[2]), parent='demo'); t(interval(1, 1.0));"
        "sys.exit(not t.close(timeout=90))"
    )
    names = ["demo/a", "demo/b"]
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=Path(__file__).parent) for name in names
    ]
    assert [process.wait(PATIENCE_S) for process in started] == [0, 0]
    parent = run_of(tmp_path, "demo").info
    for name in names:
        assert run_of(tmp_path, name).data.tags["mlflow.parentRunId"] == parent.run_id
        assert len(history(tmp_path, "encoder/loss", name)) == 1
    assert len(client(tmp_path).search_runs([parent.experiment_id])) == 3


def test_importing_the_tracker_imports_no_mlflow() -> None:
    heavy = {"mlflow", "rich", "sqlalchemy"}
    code = f"import sys, arae.tracking, arae.monitor.progress; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_folder_that_went_away_does_not_come_back(root: Path) -> None:
    """Or workers would go on in an empty one."""
    with begin(root) as tracker:
        folder = tracker.folder.path
        folder.rename(root / "aside")
        with Progress(RunFolder(folder), stream=io.StringIO()) as progress:
            tracker(interval(10, 0.5))
            progress.note("still here")
            tracker.close(timeout=5)
        assert not folder.exists()
        (root / "aside").rename(folder)
