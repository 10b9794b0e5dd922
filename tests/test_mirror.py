"""Delivery to MLflow: a server that is away, kills between deliveries, an artifact store that fails."""

import time
from pathlib import Path
from typing import Any

import pytest
import tracking
from tracking import GENEROUS, T0, begin, client, history, interval, record, run_of, stage
from waiting import until

from arae.tracking import Tracker
from arae.tracking import tracker as tracker_module
from arae.tracking.journal import Card, Journal
from arae.tracking.mirror import PENDING, Sender, send_pending, tracking_uri

pytestmark = tracking.MARKS
root, away, hanging = tracking.root, tracking.away, tracking.hanging


@pytest.mark.parametrize("fault", ["away", "hanging"])
def test_what_a_server_missed_is_kept_and_sent_later(
    root: Path, fault: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request.getfixturevalue(fault)
    start = time.monotonic()
    tracker = begin(root, parent="demo")
    for step in range(1, 101):
        tracker(interval(step, 1 / step))
    tracker(stage("started", "decoder"))
    tracker.log_records([record("psnr", 23.5)])
    assert time.monotonic() - start < GENEROUS / 3
    assert not tracker.close(timeout=GENEROUS)
    pending = root / "demo/eps-1.5" / PENDING
    kept = Journal(pending).all()
    assert [o["step"] for o in kept if o.get("series")] == list(range(1, 101))
    assert kept[0]["op"] == "run"
    assert kept[-1]["op"] == "end"
    assert any("kept in" in note for note in tracker._note)  # type: ignore[attr-defined]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert send_pending(root) == len(kept)
    assert not pending.exists()
    assert history(root, "encoder/loss") == [(s, int(1000 * (T0 + s)), 1 / s) for s in range(1, 101)]
    run = run_of(root)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "decoder started"
    assert run.data.metrics["final/psnr.reconstruction"] == 23.5
    assert run.info.start_time == kept[0]["time"]
    assert run.info.end_time == kept[-1]["time"]
    assert run.data.tags["mlflow.parentRunId"] == run_of(root, "demo").info.run_id
    assert send_pending(root) == 0


def test_the_next_tracker_sends_what_the_last_could_not(root: Path, monkeypatch: pytest.MonkeyPatch, away: str) -> None:
    tracker = begin(root)
    tracker(interval(1, 1.0))
    assert not tracker.close("FAILED", timeout=GENEROUS)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker = begin(root)
    tracker(interval(1, 1.0, late=60))
    tracker(interval(2, 2.0))
    assert tracker.close(timeout=GENEROUS)
    assert history(root, "encoder/loss") == [(s, int(1000 * (T0 + s)), float(s)) for s in (1, 2)]
    assert run_of(root).info.status == "FINISHED"


def test_closing_waits_no_longer_than_it_is_told(root: Path, hanging: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    tracker = begin(root)
    start = time.monotonic()
    assert not tracker.close(timeout=0.5)
    assert time.monotonic() - start < 10
    assert tracker._thread
    assert tracker._thread.is_alive()
    assert Journal(root / "demo/eps-1.5" / PENDING).all()


def test_a_server_that_comes_back_gets_all_of_it_meanwhile(
    root: Path, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    monkeypatch.setattr(tracker_module, "LONGEST_PAUSE", 0.2)
    tracker = begin(root)
    tracker(interval(1, 1.0))
    until(lambda: bool(tracker._note), "note")  # type: ignore[arg-type]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker._sender.uri = tracking_uri(root)
    until(lambda: not tracker._journal.path.exists(), "end of the journal")
    until(lambda: len(tracker._note) == 2, "second note")  # type: ignore[arg-type]
    assert "answers again" in tracker._note[1]  # type: ignore[index]
    assert history(root, "encoder/loss") == [(1, int(1000 * (T0 + 1)), 1.0)]
    assert tracker.close(timeout=GENEROUS)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


@pytest.mark.parametrize(
    ("owner", "method", "when"),
    [
        (Sender, "_create", "after"),
        (Sender, "_send", "before"),
        (Sender, "_send", "after"),
        (Card, "save", "after"),
        (Journal, "drop", "before"),
        (Journal, "drop", "after"),
    ],
)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_between_deliveries_loses_and_doubles_nothing(
    root: Path, owner: type, method: str, when: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "_deliver", lambda self: None)
    tracker = begin(root)
    for step in range(1, 301):  # more than one head of the journal
        tracker(interval(step, 1 / step))
    tracker.close()
    original, calls = getattr(owner, method), []

    def cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if when == "before" and len(calls) == call:
            raise Killed
        result = original(self, *args, **kwargs)
        if when == "after" and len(calls) == call:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, cut)
        try:
            Sender(root / "demo/eps-1.5", root).drain()
        except Killed:
            pass
        else:
            assert len(calls) < call  # it isn't called that often
    Sender(root / "demo/eps-1.5", root).drain()
    assert not (root / "demo/eps-1.5" / PENDING).exists()
    assert history(root, "encoder/loss") == [(s, int(1000 * (T0 + s)), 1 / s) for s in range(1, 301)]
    run = run_of(root)
    assert run.info.status == "FINISHED"
    assert len(client(root).search_runs([run.info.experiment_id])) == 1


def test_an_artifact_store_that_fails_does_not_hold_the_numbers_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def refuse(*args: Any) -> None:
        raise ModuleNotFoundError("No module named 'boto3'")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    monkeypatch.setattr(tracker_module, "LONGEST_PAUSE", 0.05)
    tracker = begin(root)
    tracker(interval(1, 1.0))
    until(lambda: not tracker._journal.path.exists(), "end of the journal")
    assert tracker.close(timeout=GENEROUS)
    assert history(root, "encoder/loss") == [(1, int(1000 * (T0 + 1)), 1.0)]
    assert any("boto3" in note for note in tracker._note)  # type: ignore[attr-defined]


def test_a_password_in_the_servers_address_reaches_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:hush@127.0.0.1:{tracking.free_port()}")
    tracker = begin(tmp_path)
    tracker(interval(1, 1.0))
    assert not tracker.close(timeout=GENEROUS)
    notes = " ".join(tracker._note)  # type: ignore[arg-type]
    assert "MLflow is away" in notes
    assert "hush" not in notes
    kept = (path.read_text() for path in (tmp_path / "demo/eps-1.5").iterdir() if path.is_file())
    assert "hush" not in " ".join(kept)
