"""Events, recipes and records for the tests of tracking; a store, and servers that are away."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arae.config import Recipe
from arae.records import Model, Record, Threat
from arae.runs import RunFolder
from arae.tracking import Tracker, mirror
from arae.tracking.mirror import CARD, tracking_uri

MARKS = [
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


@pytest.fixture
def root(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs with an empty store of MLflow's."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in mirror.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    shutil.copy(empty_store(tmp_path_factory.getbasetemp()), tmp_path / "mlflow.db")
    return tmp_path


def empty_store(folder: Path) -> Path:
    """MLflow's tables, made once: it takes seconds."""
    path = folder / "empty-mlflow.db"
    if not path.exists():
        mirror.prepare_environment()
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
