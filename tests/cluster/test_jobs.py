"""`arae submit` on a real Ray cluster of one node, over HTTP and with token authentication."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training import tiny_recipe, weights
from waiting import PATIENCE_S, until

from arae.config import dump_recipe
from arae.runs import RunFolder

pytestmark = [pytest.mark.cluster, pytest.mark.ray]

Run = Callable[..., subprocess.CompletedProcess[str]]
MARK = "ARAE_TEST_CLUSTER"


def free_ports(n: int) -> list[int]:
    """Ports above those that Ray gives its workers."""
    found = []
    for port in range(20100, 32000, 7):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == n:
            return found
    raise AssertionError("too few ports are free")


def marked(mark: str) -> list[int]:
    """Processes whose environment holds the mark: Ray's own, and all that they started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@dataclass
class Cluster:
    """A head that runs, and what a client needs to use it."""

    address: str
    token: Path
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client that may use it."""
        return {
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
        }

    def ask(self, path: str, method: str = "GET") -> Any:
        """What the job server's own interface says, as `ray job …` would ask it."""
        import requests

        headers = {"Authorization": f"Bearer {self.token.read_text()}"}
        answer = requests.request(method, f"{self.address}/api/{path}", headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` on loopback, with a token; ended by the processes that it started, and no others."""
    pytest.importorskip("ray")
    folder = Path(tempfile.mkdtemp(prefix="arae-", dir="/tmp"))  # short: Ray's sockets lie in it
    token = tmp_path_factory.mktemp("token") / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    mark, (port, *ports) = secrets.token_hex(8), free_ports(5)
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or it would not stay on loopback
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "OMP_NUM_THREADS": "1",
        MARK: mark,
    }
    places = {
        "num-cpus": 2,
        "object-store-memory": 100_000_000,
        "port": 0,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "dashboard-agent-listen-port": ports[0],  # where another Ray has the usual one, no job would ever start
        "dashboard-agent-grpc-port": ports[1],
        "ray-client-server-port": ports[2],
        "metrics-export-port": ports[3],
        "temp-dir": folder / "ray",
    }
    options = [f"--{name}={value}" for name, value in places.items()]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
    # No PATH to the environment: jobs must find Ray's own Python.
    env = {**os.environ, **own, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    with (folder / "start.log").open("w") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd="/", start_new_session=True)
    cluster = Cluster(f"http://127.0.0.1:{port}", token, folder)
    try:

        def up() -> bool:
            assert head.poll() is None, (folder / "start.log").read_text()
            with contextlib.suppress(OSError, AssertionError):
                return cluster.ask("jobs/") == []
            return False

        until(up, "answer of the job server")
        yield cluster
    finally:
        while left := marked(mark):  # SIGTERM would be answered with half a minute of draining
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.poll()  # a zombie keeps no environment, but a process should not stay one
            time.sleep(0.05)
        head.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(cluster: Cluster, run_arae: Run) -> Run:
    """`arae submit` as a client that may use the cluster."""

    def run(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return run_arae("submit", *words, env={**cluster.env, **(env or {})})

    return run


def write(path: Path, images: Path, **overrides: object) -> Path:
    path.write_text(dump_recipe(tiny_recipe(images, name=path.stem, **overrides)))
    return path


def folder_of(name: str) -> RunFolder:
    return RunFolder(Path(os.environ["ARAE_RUNS"]) / name)


def events(folder: RunFolder, kind: str) -> list[dict]:
    lines = folder.log.read_text().splitlines() if folder.log.exists() else []
    return [e for e in (json.loads(line) for line in lines if line.endswith("}")) if e["event"] == kind]


def test_a_training_runs_as_a_job(cluster: Cluster, submit: Run, tmp_path: Path, tiny_npz: Path) -> None:
    done = submit("--name", "whole", "--", "arae", "train", write(tmp_path / "whole.yaml", tiny_npz), "--workers", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("whole\n")
    assert "decoder 7/7" in done.stdout  # the log was followed
    assert "MiB" in done.stderr.splitlines()[0]
    assert "whole" in done.stderr.splitlines()[1]
    folder = folder_of("whole")
    config = json.loads((folder.model / "config.json").read_text())
    assert config["decoder"]["training"]["world_size"] == 2
    job = cluster.ask("jobs/whole")
    assert job["driver_exit_code"] == 0
    token = cluster.token.read_text()
    assert token not in json.dumps(job) + done.stdout + done.stderr
    assert all(token not in path.read_text() for path in folder.path.rglob("*.jsonl"))
    # Nothing was written where the job worked: the package is all there is.
    (there,) = (p for p in cluster.folder.glob("ray/session_2*/runtime_resources/working_dir_files/*") if p.is_dir())
    assert (there / "arae" / "cli" / "clusters.py").is_file()
    assert not [name for name in (".git", ".venv", "runs", "mlruns", "data", "mlflow.db") if (there / name).exists()]

    again = submit("--name", "whole", "--", "arae", "train", tmp_path / "whole.yaml")
    assert again.returncode == 2
    assert "--name whole" in again.stderr


def test_without_the_token_nothing_runs(cluster: Cluster, submit: Run, tmp_path: Path, tiny_npz: Path) -> None:
    before = {job["submission_id"] for job in cluster.ask("jobs/")}
    file = write(tmp_path / "refused.yaml", tiny_npz)
    for env, said in (
        ({"RAY_AUTH_TOKEN": "0" * 64}, "the token from RAY_AUTH_TOKEN is wrong"),
        ({"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN_PATH": ""}, "this cluster asks for a token, and there is none here"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": ""}, "there is no token here"),
        ({"RAY_AUTH_MODE": "disabled"}, "this cluster asks for a token"),
    ):
        done = submit("--", "arae", "train", file, env={"HOME": str(tmp_path), **env})
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert said in line
        assert done.stdout == ""
    refused = submit("--stop", "whole", env={"RAY_AUTH_TOKEN": "0" * 64})
    assert refused.returncode == 2
    assert {job["submission_id"] for job in cluster.ask("jobs/")} == before
    assert not folder_of("refused").path.exists()
    assert not (tmp_path / ".ray").exists()


def test_bad_data_is_the_jobs_exit_code(submit: Run, tmp_path: Path, tiny_npz: Path) -> None:
    file = write(tmp_path / "bad.yaml", tiny_npz)
    done = submit("--", "arae", "train", file, "data.train=/nowhere/there.npz")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "data.train" in done.stdout  # the job's own line
    assert "Traceback" not in done.stdout + done.stderr


def test_stopped_and_killed_jobs_go_on(cluster: Cluster, submit: Run, tmp_path: Path, tiny_npz: Path) -> None:
    """Followed, let go, attached, stopped with time to save, stopped without: equal to the undisturbed run."""
    settings = {"encoder__steps": 600, "decoder__steps": 4, "state__every": 100}
    file, folder = write(tmp_path / "stopped.yaml", tiny_npz, **settings), folder_of("stopped")
    train = ("--", "arae", "train", file, "--workers", 1)
    whole = write(tmp_path / "undisturbed.yaml", tiny_npz, **settings)
    undisturbed = subprocess.Popen(
        [sys.executable, "-m", "arae", "train", str(whole)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def steps() -> int:
        return len(events(folder, "interval"))

    first = submit("--no-follow", "--name", "first", *train)
    assert (first.returncode, first.stdout) == (0, "first\n"), first.stderr
    command = [sys.executable, "-m", "arae", "submit", "--attach", "first"]
    env = {**os.environ, **cluster.env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen(command, **pipes) as client:
        assert "first" in client.stdout.readline() + client.stdout.readline()
        client.send_signal(signal.SIGINT)
        error = client.communicate(timeout=PATIENCE_S)[1]
    assert client.returncode == 1
    assert "first, which goes on" in error
    assert "Traceback" not in error
    with subprocess.Popen(command, **pipes) as client:
        until(steps, "training")
        assert cluster.ask("jobs/first")["status"] == "RUNNING"
        assert cluster.ask("jobs/first/stop", "POST")["stopped"]
        out, error = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == 75, out + error
    assert "first was stopped; the same command goes on" in error
    assert "the same command goes on from there" in out  # it saved, and said so
    saved = max(state["step"] for state in json.loads((folder.state / "manifest.json").read_text())["states"])
    assert 0 < saved < 600

    before = steps()
    second = submit("--no-follow", "--grace", 0, "--name", "second", *train)
    assert second.returncode == 0, second.stderr
    until(lambda: steps() > before, "step after the resumption")
    assert any(f"resumed the encoder at step {saved} " in event["text"] for event in events(folder, "note"))
    stopped = submit("--stop", "second")
    assert (stopped.returncode, stopped.stdout) == (0, "second: stopped\n"), stopped.stderr
    assert not folder.model.joinpath("config.json").exists()

    third = submit("--", "arae", "train", file)  # without Ray: the same training
    assert third.returncode == 0, third.stdout + third.stderr
    assert undisturbed.wait(PATIENCE_S) == 0
    assert weights(folder) == weights(folder_of("undisturbed"))
    assert weights(folder)
