"""What running a training properly costs: Ray Train, saved states and MLflow over the bare loop, on the same work.

Measured: CPU seconds of all processes while the same steps are made in two ways, which take turns:
- `bare`: arae's trainer over the loader's micro-batches in a loop, in two processes joined by plain `torch.distributed`
  over gloo: no Ray, no states, no MLflow.
- `full`: `arae train --workers 2` with a state a minute, and MLflow's server on this machine, reached over HTTP.
  Counted are the workers, the command itself, Ray's own processes, and the server.
Encoder steps of resnet18-cifar (11 million parameters, a state of 89 MB), batch 16 in micro-batches of 8, PGD-2 in l2,
fp32, one torch thread a worker: more than 200 ms a step, which is checked. Two workers, for Ray's and MLflow's own
processes take about the same whatever is trained beside them, and a machine is there to be used: on more cores their
share is smaller, on one it is larger. The images are noise; there are so many that no epoch ends. Counted are the steps
from WARM on, between the moments at which they were made. What comes before (starting Ray, loading) is told apart, as
start-up, and what comes after (the last validation, the export) not at all. n = 3 rounds, bare and full in turn; some
fifteen minutes in all.

`python -m benchmarks overhead` runs it; nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import torch

from arae import provenance
from arae.config import Recipe, dump_recipe
from arae.errors import AraeError, InputError
from arae.runs import RunFolder
from benchmarks.harness import Comparison, Result, machine
from benchmarks.processes import Watch

ROUNDS = 3
STEPS, WARM = 200, 10
SAMPLE_S = 0.5
LEAST_STEP_S = 0.2
SERVER_S = 90.0
PARTS = ("workers", "command", "Ray", "MLflow server")
SHAPE, CLASSES = (32, 32, 3), 10


@dataclass(frozen=True)
class Size:
    """How much of it."""

    rounds: int = ROUNDS
    steps: int = STEPS
    warm: int = WARM
    workers: int = 2
    batch: int = 8
    """Of a worker."""
    width: float = 1.0
    least_step_s: float = LEAST_STEP_S


@dataclass(frozen=True)
class Window:
    """What one run took between the first and the last step counted."""

    steps: int
    wall: float
    """Seconds."""
    cpu: dict[str, float]
    """CPU seconds, by kind of process."""
    start_up: float
    """CPU seconds of all processes before the first step counted, less what the steps before it took."""
    states: tuple[float, ...]
    """Seconds that writing took, beside the training, of each state saved within the window."""
    held_up: float
    """Seconds that saving them held the training up."""


def overhead(device: torch.device, size: Size | None = None) -> Result:
    """CPU seconds of both ways, round by round; InputError where MLflow is missing, or the machine is a GPU's."""
    if device.type != "cpu":
        raise InputError("overhead is measured in CPU seconds, on a machine without a GPU")
    size = size or Size()
    runs: dict[str, list[Window]] = {"bare": [], "full": []}
    with tempfile.TemporaryDirectory(prefix="arae-overhead-") as made:
        folder = Path(made)
        recipe = work(folder, size)
        with mlflow_server(folder) as (uri, server):
            for number in range(size.rounds):
                for way in ("bare", "full"):
                    window = run(way, recipe, folder / f"{way}-{number}", size, uri, server)
                    runs[way].append(window)
                    say(f"round {number + 1} of {size.rounds}, {way}: {told(window)}")
    return result(runs, size)


def work(folder: Path, size: Size) -> Recipe:
    """The recipe, and the images it names."""
    batch = size.batch * size.workers
    count, numbers = batch * (size.steps + 1), np.random.default_rng(0)
    images = numbers.integers(0, 256, (count, *SHAPE), np.uint8)
    for split, rows in (("train", slice(None)), ("test", slice(0, CLASSES))):
        np.savez(folder / f"{split}.npz", images=images[rows], labels=np.arange(count)[rows] % CLASSES)
    attack = {"norm": "l2", "eps": 0.5, "steps": 2}
    encoder = {"name": "resnet18-cifar", "width": size.width, "steps": size.steps, "batch": batch, "lr": 0.01}
    return Recipe.model_validate(
        {
            "name": "overhead",
            "precision": "fp32",
            "data": {"train": str(folder / "train.npz"), "test": str(folder / "test.npz"), "augment": ["flip"]},
            "encoder": encoder | {"attack": attack, "micro_batch": size.batch},
            "state": {"every": 10**9, "minutes": 1},
        }
    )


def run(way: str, recipe: Recipe, folder: Path, size: Size, uri: str, server: int) -> Window:
    """Make the steps in one way, in processes of their own, and account for them."""
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "ARAE_"))}
    env |= {"OMP_NUM_THREADS": "1", "ARAE_RUNS": str(folder), "MLFLOW_TRACKING_URI": uri}
    command = [sys.executable, "-m", "arae", "train", str(path), "--workers", str(size.workers), "--device", "cpu"]
    if way == "bare":
        command = [sys.executable, "-m", "benchmarks.bare", str(path), str(folder), str(size.workers)]
    log = RunFolder.of(recipe, folder).log if way == "full" else folder / "log.jsonl"
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, env=env, stdout=said, stderr=said, cwd=Path(__file__).parent.parent)
        roots = (process.pid, server) if way == "full" else (process.pid,)
        try:
            with Watch(lambda pid, words: kind_of(way, pid, words, process.pid), lambda: roots, SAMPLE_S) as watch:
                code = process.wait()
        finally:
            process.terminate()
    if code:
        raise AraeError(f"overhead: {way} ended with {code}: {(folder / 'said').read_text().strip()[-500:]}")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return window(events, watch, size.warm)


def window(events: Sequence[Mapping[str, Any]], watch: Watch, warm: int) -> Window:
    """From the log's first interval at or after step `warm` to the last but one: the last also validates and ends."""
    intervals = [event for event in events if event["event"] == "interval"]
    first, last = next(e for e in intervals if e["step"] >= warm), intervals[-2]
    begin, end, steps = first["time"], last["time"], last["step"] - first["step"]
    cpu = watch.account.between(begin, end)
    before = sum(watch.account.between(watch.account.times[0], begin).values())
    inside = [e for e in events if begin < e["time"] <= end]
    states = tuple(e["seconds"] for e in inside if e["event"] == "state")
    held_up = sum(e.get("saving_s", 0.0) for e in inside if e["event"] == "interval")
    return Window(steps, end - begin, cpu, before - first["step"] * sum(cpu.values()) / steps, states, held_up)


def kind_of(way: str, pid: int, words: str, command: int) -> str:
    """Which part of the whole a process is."""
    if way == "bare" or words.startswith("ray::RayTrainWorker"):
        return "workers"
    if pid == command:
        return "command"
    return "MLflow server" if re.search(r"mlflow|huey|uvicorn", words) else "Ray"


def result(runs: Mapping[str, Sequence[Window]], size: Size) -> Result:
    """The record: CPU seconds of as many steps in each way."""
    every = [window for way in runs.values() for window in way]
    steps = min(window.steps for window in every)
    step_s = min(window.wall / window.steps for window in every)
    if step_s < size.least_step_s:
        raise AraeError(f"overhead: a step took {1000 * step_s:.0f} ms, less than {1000 * size.least_step_s:.0f}")
    seconds = {way: [sum(w.cpu.values()) * steps / w.steps for w in windows] for way, windows in runs.items()}
    parts = {part: [w.cpu.get(part, 0.0) * steps / w.steps for w in runs["full"]] for part in PARTS}
    alone = median(parts["workers"]) / median(seconds["bare"])
    beside = {part: [w.cpu.get(part, 0.0) / w.wall for w in runs["full"]] for part in PARTS}
    walls = {way: median(w.wall / w.steps for w in windows) for way, windows in runs.items()}
    notes = [
        f"Of `full`, CPU seconds by process, median: {', '.join(f'{p} {median(v):.2f}' for p, v in parts.items())}.",
        f"States saved among the steps counted: {', '.join(str(len(w.states)) for w in runs['full'])}.",
        f"Beside the workers, cores: {', '.join(f'{p} {median(beside[p]):.3f}' for p in PARTS[1:])}.",
        f"A step took {1000 * walls['bare']:.0f} ms (bare) and {1000 * walls['full']:.0f} ms (full) by the clock.",
        "Start-up, not among the steps counted, CPU seconds, median: "
        + ", ".join(f"{way} {median(w.start_up for w in windows):.1f}" for way, windows in runs.items())
        + ".",
    ]
    return Result(
        name="overhead",
        about=f"{steps} encoder steps of resnet18-cifar (batch {size.batch * size.workers}, PGD-2, fp32) in a bare "
        f"loop of {size.workers} processes, and by `arae train --workers {size.workers}` with a state a minute and "
        "MLflow's server.",
        images=steps * size.batch * size.workers,
        warmup=0,
        seconds={way: tuple(values) for way, values in seconds.items()},
        clock="CPU seconds of all processes",
        comparisons=(Comparison(what="full over bare", slow="full", fast="bare"),),
        left_out={},
        notes=tuple(notes),
        numbers=saving_of(runs["full"]) | {"workers alone, full over bare": round(alone, 4)},
        hardware=machine(torch.device("cpu")) | {"torch_threads": 1},
        versions=provenance.versions(),
        git=provenance.git_revision(),
        time=provenance.now(),
    )


def saving_of(windows: Sequence[Window]) -> dict[str, float]:
    """What a state takes: seconds of its thread, and seconds that it holds the training up."""
    taken = [seconds for one in windows for seconds in one.states]
    if not taken:
        return {}
    held_up = sum(one.held_up for one in windows) / len(taken)
    return {"writing a state s": round(median(taken), 4), "held up by a state s": round(held_up, 4)}


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, int]]:
    """MLflow's server on loopback: its address and its process' id; InputError where MLflow is not installed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", uri.rpartition(":")[2]]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    with (folder / "mlflow.log").open("w") as said:
        process = subprocess.Popen(
            [*command, "--artifacts-destination", str(folder / "artifacts")],
            stdout=said,
            stderr=said,
            cwd=folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # as `arae ui` starts it
        )
    try:
        answered(f"{uri}/health", process, folder / "mlflow.log")
        yield uri, process.pid
    finally:
        process.terminate()
        process.wait(30)


def answered(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the address answers; InputError where the process ends first."""
    end = time.monotonic() + SERVER_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise InputError(f"mlflow server does not start: {log.read_text().strip().splitlines()[-1]}")
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise InputError(f"mlflow server does not answer at {url} after {SERVER_S:.0f} s")


def told(window: Window) -> str:
    """One run in a line."""
    parts = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in sorted(window.cpu.items()))
    return f"{window.steps} steps in {window.wall:.1f} s; CPU s: {parts}; start-up {window.start_up:.1f}"


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)
