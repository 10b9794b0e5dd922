"""What an MLflow server that goes away costs a training: nothing, if it is true that training never waits for it.

Measured: the steps of one stage, from the first interval told to the last, in a process that mirrors its run to an
MLflow server (HTTP, SQLite, on the same machine). Three variants take turns: the server answers all the time; it is
stopped for the middle third of the steps, and started again; it hangs for the middle third (SIGSTOP: it takes
connections and never answers). CPU seconds are those of the training process, all threads; wall seconds are beside
them. What stopping and starting the server takes is in neither: the training stands still meanwhile.
Encoder steps of small-cnn, 3 × 16 × 16, batch 32, PGD-20 in l2, fp32, one torch thread, 120 of them, an interval every
second step; n = 5 rounds, 1 of warm-up. The images are noise. A request may take 2 s, not the usual 10: the outages are
some seconds long. After each run every loss must have reached the server, or the benchmark fails.

`python -m benchmarks outage` runs it in about ten minutes; nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import torch

from arae import provenance
from arae.config import Recipe, dump_recipe, load_recipe
from arae.errors import AraeError, InputError
from arae.monitor.events import read_events
from arae.tracking.mirror import CARD, ENVIRONMENT, PENDING
from benchmarks.harness import Comparison, Result, Seconds, machine

VARIANTS = ("answers", "stopped", "hung")
WALL = ", wall"
SERVER_S = 120.0
BATCH = 32


@dataclass(frozen=True)
class Size:
    """How much of it."""

    rounds: int = 5
    warmup: int = 1
    steps: int = 120
    attack_steps: int = 20


class Server:
    """`mlflow server` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers; AraeError where it does not come up."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", (self.folder / "artifacts").as_uri()]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdout=quiet, stderr=quiet, start_new_session=True, env=os.environ | ENVIRONMENT
        )
        deadline = time.monotonic() + SERVER_S
        while time.monotonic() < deadline:
            try:
                with urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(0.2)
        raise AraeError(f"outage: MLflow's server was not up after {SERVER_S:.0f} s")

    def stop(self) -> None:
        """Refuse from here on."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def send(self, number: signal.Signals) -> None:
        """A signal to the server and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, number)


def outage(device: torch.device, size: Size | None = None) -> Result:
    """Steps under an outage over steps without; InputError where MLflow is missing."""
    if importlib.util.find_spec("mlflow") is None:
        raise InputError("outage: MLflow is not installed; `pip install 'arae[track]'` adds it")
    size = size or Size()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with _server(folder) as server:
            seconds = _rounds(folder, server, size)
    compared = [
        Comparison(what=f"{variant} over answers{kind}", slow=f"{variant}{kind}", fast=f"answers{kind}")
        for kind in ("", WALL)
        for variant in VARIANTS[1:]
    ]
    return Result(
        name="outage",
        about=f"{size.steps} encoder steps (small-cnn, 3 × 16 × 16, batch {BATCH}, PGD-{size.attack_steps}) of a run "
        "that is mirrored to an MLflow server, which answers, is stopped, or hangs for the middle third of them.",
        images=_counted(size) * BATCH,
        warmup=size.warmup,
        seconds=seconds,
        clock="CPU seconds of the training process, and seconds on the wall",
        comparisons=tuple(compared),
        left_out={},
        notes=(f"After each of the {3 * (size.rounds + size.warmup)} runs the server had every loss of its log.",),
        hardware=machine(torch.device("cpu")) | {"torch_threads": 1},
        versions=provenance.versions(),
        git=provenance.git_revision(),
        time=provenance.now(),
    )


def _counted(size: Size) -> int:
    """Steps from the first interval told to the last."""
    return size.steps - max(1, min(50, size.steps // 50))


def _rounds(folder: Path, server: Server, size: Size) -> dict[str, Seconds]:
    seconds: dict[str, list[float]] = {f"{v}{kind}": [] for kind in ("", WALL) for v in VARIANTS}
    for number in range(size.warmup + size.rounds):
        for variant in VARIANTS:
            found = _run(folder / f"{number}-{variant}", variant, server, size)
            print(f"outage: round {number}, {variant}: {found}", file=sys.stderr, flush=True)
            if number >= size.warmup:
                seconds[variant].append(found["cpu"])
                seconds[variant + WALL].append(found["wall"])
    return {name: tuple(values) for name, values in seconds.items()}


def _run(folder: Path, variant: str, server: Server, size: Size) -> dict[str, float]:
    """One training in a process of its own; CPU and wall seconds of its steps."""
    folder.mkdir()
    images = folder / "images.npz"
    random = np.random.default_rng(0)
    np.savez(images, images=random.integers(0, 256, (96, 16, 16, 3), dtype=np.uint8), labels=np.arange(96) % 3)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe(images, size, variant)))
    own = {"ARAE_RUNS": str(folder / "runs"), "MLFLOW_TRACKING_URI": server.uri, "OMP_NUM_THREADS": "1"}
    env = os.environ | ENVIRONMENT | own | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.outage", str(folder / "recipe.yaml")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
        cwd=Path(__file__).resolve().parent.parent,
    ) as training:
        assert training.stdin
        assert training.stdout
        try:
            for away in (True, False):
                _expect(training.stdout.readline(), "third")
                _change(server, variant, away=away)
                training.stdin.write("\n")
                training.stdin.flush()
            found = json.loads(_expect(training.stdout.readline(), "{"))
        finally:
            server.send(signal.SIGCONT)
    _check(folder / "runs" / variant, server)
    return found


def _expect(line: str, start: str) -> str:
    if not line.startswith(start):
        raise AraeError(f"outage: the training said {line!r} in place of {start}…")
    return line


def _change(server: Server, variant: str, *, away: bool) -> None:
    if variant == "stopped":
        server.stop() if away else server.start()
    elif variant == "hung":
        server.send(signal.SIGSTOP if away else signal.SIGCONT)


def _check(run: Path, server: Server) -> None:
    """AraeError unless the server has every loss of the log, each under its step."""
    from mlflow import MlflowClient

    if (run / PENDING).exists():
        raise AraeError(f"outage: {run / PENDING} was not sent by the end of the run")
    told = [(e["step"], e["metrics"]["loss"]) for e in read_events(run / "log.jsonl") if e["event"] == "interval"]
    run_id = json.loads((run / CARD).read_text())["run_id"]
    history = MlflowClient(server.uri).get_metric_history(run_id, "encoder/loss")
    if sorted((point.step, point.value) for point in history) != told:
        raise AraeError(f"outage: the server has {len(history)} points of {len(told)}")


@contextmanager
def _server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def recipe(images: Path, size: Size, name: str) -> Recipe:
    """The run's recipe: an encoder alone, no state but the last."""
    document: dict[str, Any] = {
        "name": name,
        "precision": "fp32",
        "data": {"train": str(images), "test": str(images), "size": 16, "channels": 3},
        "encoder": {
            "name": "small-cnn",
            "steps": size.steps,
            "batch": BATCH,
            "lr": 0.01,
            "attack": {"norm": "l2", "eps": 0.5, "steps": size.attack_steps},
        },
        "decoder": None,
        "evaluate": {"lpips": None},
        "state": {"every": size.steps, "minutes": None},
    }
    return Recipe.model_validate(document)


class Stopwatch:
    """Hears a training's events and times its steps; says when a third is done, and waits for an answer."""

    def __init__(self, steps: int) -> None:
        self._thirds = [steps // 3, 2 * steps // 3]
        self._first: tuple[float, float] | None = None
        self._held = 0.0
        self.taken: dict[str, float] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        """Count one event."""
        if event["event"] != "interval":
            return
        cpu, wall = time.process_time(), time.perf_counter()
        self._first = self._first or (cpu, wall)
        self.taken = {"cpu": cpu - self._first[0], "wall": wall - self._first[1] - self._held}
        if self._thirds and event["step"] >= self._thirds[0]:
            self._thirds.pop(0)
            print("third", flush=True)
            sys.stdin.readline()
            self._held += time.perf_counter() - wall


def train(path: str) -> None:
    """The training process: a whole session, as a command has it."""
    import mlflow  # noqa: F401 -- importing it takes seconds, once, and is none of what an outage costs

    from arae.launch import Where, launch
    from arae.session import session

    loaded = load_recipe(path)
    watch = Stopwatch(loaded.encoder.steps or 0)
    with session(loaded) as run:

        def listen(event: dict[str, Any]) -> None:
            run.listen(event)
            watch(event)

        launch(loaded, run.folder, Where(device="cpu"), listen)
    print(json.dumps(watch.taken), flush=True)


if __name__ == "__main__":
    train(sys.argv[1])
