import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arae.config import Recipe
from arae.errors import InputError, Stopped
from arae.records import Model, Record, Threat
from arae.runs import RunFolder
from arae.tracking import Tracker, metric_name, mirror, record_names, ui
from arae.tracking import tracker as tracker_module
from arae.tracking.journal import Card, Journal, is_better
from arae.tracking.mirror import CARD, PENDING, Sender, batches, send_pending, tracking_uri

pytestmark = [
    # What MLflow and its libraries warn of themselves on import and at the first use of a store.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sqlalchemy"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

T0 = 1_800_000_000.0
GENEROUS = 30.0  # seconds for what takes two, on a busy machine


def recipe(name: str = "demo/eps-1.5", **overrides: Any) -> Recipe:
    whole = Recipe.model_validate(
        {
            "name": name,
            "scale": "small",
            "data": {"name": "fashion-mnist"},
            "encoder": {"name": "small-cnn", "epochs": 2, "attack": {"norm": "l2", "eps": 1.5}},
            "decoder": {"epochs": 1},
        }
    )
    return whole.replace({key.replace("__", "."): value for key, value in overrides.items()})


def interval(step: int, loss: float, stage: str = "encoder", late: float = 0.0) -> dict[str, Any]:
    event = {
        "event": "interval",
        "stage": stage,
        "step": step,
        "steps": 100,
        "epoch": step / 50,
        "time": T0 + step + late,
    }
    return event | {"metrics": {"loss": loss, "lr": 0.1}, "images_per_s": 800.0}


def epoch(number: int, metrics: dict[str, float], stage: str = "encoder") -> dict[str, Any]:
    step = 50 * number
    return {"event": "epoch", "stage": stage, "step": step, "epoch": number, "time": T0 + step, "metrics": metrics}


def stage(state: str, name: str = "encoder") -> dict[str, Any]:
    return {"event": "stage", "stage": name, "state": state, "time": T0 + 200}


def record(metric: str, value: float | None, **fields: Any) -> Record:
    accuracy = metric.endswith("accuracy")
    given = {
        "metric": metric,
        "value": value,
        "unit": "fraction" if accuracy else "dB",
        "direction": "higher",
        "reason": None if value is not None else "no weights",
        "dataset": "fashion-mnist",
        "split": "test",
        "protocol": "classification" if accuracy else "reconstruction",
        "model": Model(encoder="small-cnn", train_norm="l2", train_eps=1.5),
        "digest": "d",
        "stage": "encoder" if accuracy else "decoder",
        "seed": 0,
        "scale": "small",
        "git": "abc",
        "time": "2027-01-15T08:00:00+00:00",
    }
    return Record.model_validate(given | fields)


PGD = Threat(norm="l2", eps=1.5, steps=50, step_size=0.075, restarts=5)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: it takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mirror.prepare_environment()
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in mirror.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


class Notes(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def begin(
    root: Path,
    what: Recipe | None = None,
    *,
    parent: str | None = None,
    enabled: bool = True,
    note: Notes | None = None,
) -> Tracker:
    what = what or recipe()
    folder = RunFolder.of(what, root)
    folder.create(what)
    return Tracker(folder, what, root, parent=parent, enabled=enabled, note=Notes() if note is None else note)


def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(root))


def run_of(root: Path, name: str = "demo/eps-1.5") -> Any:
    return client(root).get_run(json.loads((root / name / CARD).read_text())["run_id"])


def history(root: Path, metric: str, name: str = "demo/eps-1.5") -> list[tuple[int, int, float]]:
    points = client(root).get_metric_history(run_of(root, name).info.run_id, metric)
    return [(point.step, point.timestamp, point.value) for point in points]


# --- names, directions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (record("clean_accuracy", 0.8), "final/clean_accuracy"),
        (record("robust_accuracy", 0.6, threat=PGD), "final/robust_accuracy.l2-1.5.pgd-50x5"),
        (record("psnr", 23.0), "final/psnr.reconstruction"),
        (record("psnr", 20.0, threat=PGD), "final/psnr.under-l2-1.5.pgd-50x5"),
        (record("psnr", 9.0, protocol="mean image"), "final/psnr.mean image"),
        (record("psnr", 9.0, protocol="upscale-4", threat=PGD), "final/psnr.upscale-4.under-l2-1.5.pgd-50x5"),
        (record("clean_accuracy", 0.9, split="train"), "final/clean_accuracy.train"),
        (record("clean_accuracy", 0.1, dataset="m+nist"), "final/clean_accuracy.m-nist"),
        (
            record("robust_accuracy", 0.6, threat=PGD.model_copy(update={"norm": "linf", "eps": 8 / 255, "steps": 10})),
            "final/robust_accuracy.linf-8of255.pgd-10x5",
        ),
    ],
)
def test_a_record_has_a_readable_name(given: Record, name: str) -> None:
    assert list(record_names([given], "fashion-mnist")) == [name]


def test_records_that_differ_elsewhere_keep_distinct_names() -> None:
    records = [record("psnr", v, threat=PGD.model_copy(update={"step_size": v})) for v in (0.1, 0.2, 0.3)]
    named = record_names(records, "fashion-mnist")
    assert list(named.values()) == records


def test_metric_names_hold_only_what_mlflow_takes() -> None:
    assert metric_name("a+b=c/d e.f:g-h_1(é)") == "a-b-c/d e.f:g-h_1---"


@pytest.mark.parametrize(
    ("name", "value", "than", "better"),
    [
        ("encoder/epoch/loss", 1.0, 2.0, True),
        ("encoder/epoch/loss", 2.0, 1.0, False),
        ("encoder/epoch/loss", 1.0, 1.0, False),
        ("decoder/epoch/lpips", 0.1, 0.2, True),
        ("robust_accuracy", 0.6, 0.5, True),
        ("psnr", 20.0, 21.0, False),
        ("psnr", 20.0, None, True),
        ("psnr", float("nan"), None, False),
        ("lr", 0.1, None, False),
        ("lossy/epoch/psnr", 2.0, 1.0, True),
    ],
)
def test_better_is_by_direction(name: str, value: float, than: float | None, better: bool) -> None:
    assert is_better(name, value, than) is better


# --- the journal and the card -------------------------------------------------------------------------------------


def test_a_journal_is_a_queue_that_leaves_no_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / PENDING)
    journal.append(*({"op": "tag", "n": n} for n in range(5)))
    head = journal.head(limit=3)
    assert [o["n"] for o in head.operations] == [0, 1, 2]
    journal.append({"op": "tag", "n": 5})
    journal.drop(head.size)
    assert [o["n"] for o in journal.all()] == [3, 4, 5]
    journal.drop(journal.head().size)
    assert list(tmp_path.iterdir()) == []
    assert journal.head().size == 0


@pytest.mark.parametrize("torn", [b'{"op": "tag", "n', b"\xff\xfe", b"[1]", b"\n"])
def test_a_torn_line_costs_no_other(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / PENDING
    journal = Journal(path)
    journal.append({"n": 0})
    path.write_bytes(path.read_bytes() + torn)
    journal.append({"n": 1})
    assert [o["n"] for o in journal.all()] == [0, 1]
    journal.drop(journal.head().size)
    assert not path.exists()


def test_nothing_is_lost_between_writers_and_a_sender(tmp_path: Path) -> None:
    path = tmp_path / PENDING
    read: list[tuple[int, int]] = []

    def write(who: int) -> None:
        for n in range(100):
            Journal(path).append({"who": who, "n": n})

    writers = [threading.Thread(target=write, args=(who,)) for who in range(3)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers) or path.exists():
        head = Journal(path).head(limit=7)
        read += [(o["who"], o["n"]) for o in head.operations]
        if head.size:
            Journal(path).drop(head.size)
    assert sorted(read) == [(who, n) for who in range(3) for n in range(100)]
    assert all([n for w, n in read if w == who] == list(range(100)) for who in range(3))


def test_batches_keep_the_order_and_mlflows_limits() -> None:
    many = [{"op": "metrics", "values": dict.fromkeys(map(str, range(400)), 1.0)} for _ in range(6)]
    operations = [{"op": "run"}, *[{"op": "param"}] * 250, *many, {"op": "artifact"}, {"op": "tag"}, {"op": "end"}]
    groups = list(batches(operations))
    assert [o for group in groups for o in group] == operations
    for group in groups:
        assert sum(len(o.get("values", ())) for o in group) <= 1000
        assert sum(o["op"] in ("param", "tag") for o in group) <= 100
        assert len(group) == 1 or not {"run", "artifact", "end"} & {o["op"] for o in group}


def test_a_card_forgets_a_stage_whose_recipe_has_changed() -> None:
    card = Card()
    run = {
        "op": "run",
        "name": "a",
        "experiment": "a",
        "parent": None,
        "time": 1,
        "digests": {"encoder": "1", "decoder": "1"},
    }
    card.absorb(run)
    for series in ("encoder/epoch", "decoder/epoch"):
        card.absorb({"op": "metrics", "series": series, "step": 5, "values": {f"{series}/loss": 1.0}})
    card.absorb(run | {"digests": {"encoder": "1", "decoder": "2"}})
    assert card.reached == {"encoder/epoch/loss": 5}
    assert card.best == card.last == {"encoder/epoch/loss": 1.0}


def test_a_copied_folder_does_not_write_into_the_run_of_the_original() -> None:
    card = Card(run_id="f00", key="k", name="a", reached={"encoder/loss": 9})
    card.absorb({"op": "run", "name": "b", "experiment": "b", "parent": None, "time": 1, "digests": {}})
    assert (card.run_id, card.key, card.name, card.reached) == (None, None, "b", {})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"run_id": "a", "unknown": 1}'])
def test_a_card_that_cannot_be_read_is_blank(tmp_path: Path, text: str) -> None:
    (tmp_path / CARD).write_text(text)
    assert Card.load(tmp_path / CARD).reached == {}


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


# --- a server that is away ----------------------------------------------------------------------------------------


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> str:
    """A port that refuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    for name, value in mirror.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name, value in mirror.ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield str(server.getsockname()[1])


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
    wait_for(lambda: bool(tracker._note))  # type: ignore[arg-type]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker._sender.uri = tracking_uri(root)
    wait_for(lambda: not tracker._journal.path.exists())
    wait_for(lambda: len(tracker._note) == 2)  # type: ignore[arg-type]
    assert "answers again" in tracker._note[1]  # type: ignore[index]
    assert history(root, "encoder/loss") == [(1, int(1000 * (T0 + 1)), 1.0)]
    assert tracker.close(timeout=GENEROUS)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + GENEROUS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
    wait_for(lambda: not tracker._journal.path.exists())
    assert tracker.close(timeout=GENEROUS)
    assert history(root, "encoder/loss") == [(1, int(1000 * (T0 + 1)), 1.0)]
    assert any("boto3" in note for note in tracker._note)  # type: ignore[attr-defined]


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
        "import sys; from pathlib import Path; from test_tracking import *;"
        "t = begin(Path(sys.argv[1]), recipe(sys.argv[2]), parent='demo'); t(interval(1, 1.0));"
        "sys.exit(not t.close(timeout=90))"
    )
    names = ["demo/a", "demo/b"]
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=Path(__file__).parent) for name in names
    ]
    assert [process.wait(120) for process in started] == [0, 0]
    parent = run_of(tmp_path, "demo").info
    for name in names:
        assert run_of(tmp_path, name).data.tags["mlflow.parentRunId"] == parent.run_id
        assert len(history(tmp_path, "encoder/loss", name)) == 1
    assert len(client(tmp_path).search_runs([parent.experiment_id])) == 3


def test_importing_the_tracker_imports_no_mlflow() -> None:
    code = (
        "import sys, arae.tracking, arae.progress; sys.exit(bool({'mlflow', 'rich', 'sqlalchemy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- arae ui ------------------------------------------------------------------------------------------------------


def test_ui_without_a_store_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r"mlflow\.db: no runs yet"):
        ui(tmp_path, port=free_port())


@pytest.mark.parametrize("port", ["taken", 70000])
def test_ui_on_a_port_that_cannot_be_had_is_bad_input(root: Path, port: int | str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1] if port == "taken" else int(port)
        with pytest.raises(InputError, match=f"{number} can't be used .* --port"):
            ui(root, port=number)


def test_ui_points_at_a_server_that_runs_elsewhere(
    root: Path, away: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    begin(root).close(timeout=GENEROUS)
    with caplog.at_level(logging.WARNING):
        assert ui(root) == 0
    assert away in capsys.readouterr().err
    assert "not sent" in caplog.text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
