"""An MLflow server that stops, or hangs, for the middle third of a run: training goes on, and nothing is missing after.

A real server and a real browser; the outages last seconds, and the time-out of a request is shortened to match.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from browser import chromium, text_of
from conftest import make_tiny_npz
from selenium.webdriver import Chrome
from tracking import MARKS, free_port
from training import tiny_recipe
from waiting import PATIENCE_S, until

from arae.config import dump_recipe
from arae.tracking.mirror import CARD, ENVIRONMENT, PENDING

pytestmark = [pytest.mark.cluster, *MARKS]

Points = dict[str, list[tuple[int, float]]]
"""Of each series, steps and values in order."""


class Server:
    """`mlflow server` on loopback, over an SQLite store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.resume()
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'store.db'}"]
        command += ["--artifacts-destination", (self.folder / "artifacts").as_uri()]
        with (self.folder / "server.log").open("ab") as log:
            env = {**os.environ, **ENVIRONMENT}
            self._process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, env=env)
        until(self._answers, "answer of the server", self._process)

    def stop(self) -> None:
        """Refuse connections from here on."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def hang(self) -> None:
        """Take connections from here on, and never answer."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.uri}/health", timeout=5):
                return True
        except (URLError, OSError):
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("mlflow")) as one:
        yield one


def recipe_file(folder: Path, name: str, encoder: int, decoder: int) -> Path:
    recipe = tiny_recipe(
        make_tiny_npz(folder),
        name=name,
        encoder__steps=encoder,
        decoder__steps=decoder,
        encoder__attack__steps=20,
        state__every=1000,
    )
    path = folder / f"{name}.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def environment(folder: Path, uri: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    return own | {
        "ARAE_RUNS": str(folder / "runs"),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
        "OMP_NUM_THREADS": "1",
    }


def events(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def in_log(run: Path) -> Points:
    """What the run's log says that MLflow must have."""
    points: Points = {}
    for event in events(run):
        if event["event"] in ("interval", "epoch"):
            series = event["stage"] if event["event"] == "interval" else f"{event['stage']}/epoch"
            values = event["metrics"] | {k: event[k] for k in ("images_per_s",) if k in event}
            for name, value in values.items():
                points.setdefault(f"{series}/{name}", []).append((event["step"], value))
    return points


def in_server(uri: str, run_id: str, names: list[str]) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = {name: client.get_metric_history(run_id, name) for name in names}
    return {name: sorted((m.step, m.value) for m in history) for name, history in found.items()}


CHARTS = """
  const found = {};
  for (const chart of document.querySelectorAll('.js-plotly-plot'))
    for (const line of chart.data || [])
      if (line.metricKey && line.x) found[line.metricKey] = Array.from(line.x, (x, i) => [x, line.y[i]]);
  for (const e of document.querySelectorAll('*')) {
    if (e.scrollHeight <= e.clientHeight + 4 || getComputedStyle(e).overflowY === 'visible') continue;
    const end = e.scrollTop + e.clientHeight >= e.scrollHeight - 4;
    e.scrollTop = end ? 0 : e.scrollTop + e.clientHeight / 2;
  }
  return found;
"""


def in_charts(browser: Chrome, uri: str, run_id: str, wanted: Points) -> Points:
    """What the charts on the run's page draw, once they draw as many points as are wanted; they are drawn as one
    scrolls. A page that shows nothing for a while is opened anew, as a reader would."""
    page = f"{uri}/#/experiments/{experiment_of(uri, run_id)}/runs/{run_id}/model-metrics"
    drawn: Points = {}
    for _ in range(3):
        browser.get("about:blank")
        browser.get(page)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for name, points in browser.execute_script(CHARTS).items():
                drawn[name] = [(int(step), value) for step, value in points]
            if all(len(drawn.get(name, ())) >= len(points) for name, points in wanted.items()):
                return drawn
            time.sleep(0.2)
    counts = {name: len(drawn.get(name, ())) for name in wanted}
    raise AssertionError(f"drawn: {counts}\nthe page:\n{text_of(browser)}\nits log: {browser.get_log('browser')}")


def experiment_of(uri: str, run_id: str) -> str:
    from mlflow import MlflowClient

    return MlflowClient(uri).get_run(run_id).info.experiment_id


@pytest.mark.parametrize("fault", ["stopped", "hung"])
def test_no_point_is_missing_after_an_outage(fault: str, server: Server, tmp_path: Path) -> None:
    recipe, run = recipe_file(tmp_path, fault, 100, 100), tmp_path / "runs" / fault
    command = [sys.executable, "-m", "arae", "train", str(recipe)]

    def reached(intervals: int) -> Callable[[], bool]:
        return lambda: training.poll() is not None or sum(e["event"] == "interval" for e in events(run)) >= intervals

    with (tmp_path / "out.txt").open("w") as out:
        training = subprocess.Popen(command, env=environment(tmp_path, server.uri), stdout=out, stderr=out)
    try:
        until(reached(33), "33 intervals")
        (server.stop if fault == "stopped" else server.hang)()
        until(reached(67), "67 intervals")
        waiting = len((run / PENDING).read_text().splitlines())
        if fault == "hung":
            server.resume()
        else:
            training.send_signal(signal.SIGSTOP)  # a server takes seconds to start: the last third is with it, too
            server.start()
            training.send_signal(signal.SIGCONT)
        assert training.wait(PATIENCE_S) == 0, (tmp_path / "out.txt").read_text()
    finally:
        if training.poll() is None:
            training.kill()
            training.wait()
    said = (run / "log.txt").read_text()
    assert "MLflow is away" in said
    assert "MLflow answers again" in said
    assert waiting > 33, "the outage fell on nothing"
    assert not (run / PENDING).exists()
    run_id = json.loads((run / CARD).read_text())["run_id"]
    wanted = in_log(run)
    assert {len(wanted["encoder/loss"]), len(wanted["decoder/loss"])} == {50}
    assert in_server(server.uri, run_id, list(wanted)) == wanted
    with chromium(tmp_path / "profile", height=3000) as browser:
        drawn = in_charts(browser, server.uri, run_id, wanted)
    for name, points in wanted.items():
        assert [step for step, _ in drawn[name]] == [step for step, _ in points], name
        assert [y for _, y in drawn[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


def test_a_run_ends_though_the_server_hangs_and_says_what_is_left(server: Server, tmp_path: Path) -> None:
    recipe, run = recipe_file(tmp_path, "ends", 7, 7), tmp_path / "runs" / "ends"
    env = environment(tmp_path, server.uri)
    del env["MLFLOW_HTTP_REQUEST_TIMEOUT"]  # with arae's own

    def arae(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "arae", *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, check=False)

    server.hang()
    try:
        trained = arae("train", str(recipe))
    finally:
        server.resume()
    assert trained.returncode == 0, trained.stderr
    assert f"{run / PENDING}: MLflow has not had all of this run yet" in trained.stderr
    assert "`arae ui` sends it" in trained.stderr
    sent = arae("ui")
    assert sent.returncode == 0, sent.stderr
    assert not (run / PENDING).exists()
    wanted = in_log(run)
    assert wanted
    assert in_server(server.uri, json.loads((run / CARD).read_text())["run_id"], list(wanted)) == wanted
