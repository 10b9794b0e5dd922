"""A run whose workers are killed again and again ends bit for bit where an undisturbed one does.

At random moments: while a group is being set up, in the middle of a step, while a state is being written, one worker or
both at once. What each worker draws from the data is traced, so that it can be told which samples stand behind the
final weights: of all that was computed only what no later group computed again.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_tiny_npz
from groups import train_on
from training import BATCH, tiny_recipe, weights
from waiting import PATIENCE_S, until

from arae.config import Recipe, dump_recipe
from arae.runs import RunFolder

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.ray,
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KILLED = 20
IMAGES = 96
STEPS = {"encoder": 24, "decoder": 80}
EVERY = 8

# Runs in every worker before anything else: the ids of each micro-batch that is drawn are written down.
TRACE = """
import importlib.abc, importlib.util, json, os, sys, time

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "arae.train.loop" or "RANK" not in os.environ:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def executed(module):
            execute(module)
            trace(module)
        spec.loader.exec_module = executed
        return spec

def trace(module):
    drawn, augment, micro_batches = [], module.augment, module.micro_batches
    path = os.path.join(os.environ["ARAE_TRACE"], f"{time.time_ns()}-{os.getpid()}.jsonl")

    def noted(images, ids, *rest):
        drawn.append(ids.tolist())
        return augment(images, ids, *rest)

    def traced(stage, run, first):
        own = len(run.engine.share(run.part.batch // run.part.micro, stage))
        for i, micro in enumerate(micro_batches(stage, run, first)):
            line = {"group": os.environ["MASTER_PORT"], "rank": run.engine.rank, "pid": os.getpid(), "stage": stage,
                    "step": first + i // own, "ids": drawn.pop()}
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\\n")
            yield micro

    module.augment, module.micro_batches = noted, traced

sys.meta_path.insert(0, Hook())
"""


def recipe_of(images: Path) -> Recipe:
    """A network large enough that writing its state takes a moment in which it can be killed."""
    return tiny_recipe(
        images,
        encoder__name="resnet18-cifar",
        encoder__width=0.25,
        encoder__lr=0.01,
        encoder__steps=STEPS["encoder"],
        decoder__steps=STEPS["decoder"],
        state__every=EVERY,
    )


@dataclass
class Chaos:
    """The run, and what can be seen of it from outside."""

    folder: RunFolder
    traces: Path

    def drawn(self) -> list[dict]:
        """Every line of every worker, by the time at which the worker began."""
        lines = []
        for path in sorted(self.traces.iterdir()):
            lines += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return lines

    def workers(self, killed: set[int]) -> dict[int, int]:
        """Rank by process id of the workers at work, as far as they have drawn anything."""
        found = {}
        for path in sorted(self.traces.iterdir()):
            with suppress(IndexError, ValueError):
                line = json.loads(path.read_text().splitlines()[0])
                if line["pid"] not in killed and is_alive(line["pid"]):
                    found[line["pid"]] = line["rank"]
        return found

    def has_made(self, steps: int, pid: int) -> bool:
        """Whether a worker has drawn something for so many steps."""
        return len({line["step"] for line in self.drawn() if line["pid"] == pid}) >= steps

    def check_states(self) -> None:
        """What the manifest lists is whole, whatever was going on when somebody was killed."""
        with suppress(FileNotFoundError):  # none yet, or replaced while it is being read
            for entry in json.loads((self.folder.state / "manifest.json").read_text())["states"]:
                content = (self.folder.state / entry["file"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == entry["sha256"], entry

    def half_written(self) -> bool:
        return any(self.folder.state.glob("*.pt.tmp"))


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    return False


def disturb(chaos: Chaos, process: subprocess.Popen[str]) -> Iterator[str]:
    """Kill workers until there were enough; yields how, each time."""
    chance, killed = random.Random(7), set[int]()
    ways = ["both", "saving", "step", "both", "start", "both"]
    for number in range(1000):
        if len(killed) >= KILLED:
            return
        until(lambda: len(chaos.workers(killed)) == 2 or process.poll() is not None, "two workers", pause=0.02)
        assert process.poll() is None, process.communicate()[1]
        ranks = chaos.workers(killed)
        by_rank = {rank: pid for pid, rank in ranks.items()}
        way = ways[number % len(ways)]
        if way in ("step", "both"):
            far = partial(chaos.has_made, chance.randrange(2, 2 * EVERY), by_rank[0])
            # Steps and not seconds: machines differ.
            until(lambda far=far: far() or process.poll() is not None, "steps", pause=0.02)
            time.sleep(chance.uniform(0, 0.05))
        if way == "saving":
            until(lambda: chaos.half_written() or process.poll() is not None, "state half written", pause=0.0005)
        victims = list(ranks) if way == "both" else [by_rank[0 if way == "saving" else chance.randrange(2)]]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(victims)
        half = chaos.half_written()
        chaos.check_states()
        yield f"{way}, half a state left behind" if way == "saving" and half else way


def test_a_run_whose_workers_are_killed_twenty_times_ends_bit_for_bit(tmp_path: Path) -> None:
    recipe = recipe_of(make_tiny_npz(tmp_path))
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(TRACE)
    (tmp_path / "traces").mkdir()
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe))
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{tmp_path / 'hook'}:{REPOSITORY}",
        "ARAE_TRACE": str(tmp_path / "traces"),
        "ARAE_RUNS": str(tmp_path / "runs"),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    }
    command = [sys.executable, "-m", "arae", "train", str(tmp_path / "tiny.yaml"), "--workers", "2"]
    chaos = Chaos(RunFolder(tmp_path / "runs" / "tiny"), tmp_path / "traces")
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stderr=subprocess.PIPE) as process:
        try:
            ways = Counter(disturb(chaos, process))
            error = process.communicate(timeout=PATIENCE_S)[1]
        finally:
            process.kill()
    assert process.returncode == 0, error
    assert ways["saving, half a state left behind"] >= 1, ways
    assert {"step", "both", "start"} <= set(ways)
    events = [json.loads(line) for line in chaos.folder.log.read_text().splitlines()]
    assert len([e for e in events if e["event"] == "restart"]) >= sum(ways.values()) - 2  # two may fall into one

    whole = train_on(2, recipe, tmp_path / "whole")
    assert weights(chaos.folder) == weights(whole)
    groups = {group for stage in STEPS for group in check_lineage(chaos.drawn(), stage)}
    assert len(groups) > 2  # or nothing was disturbed


def check_lineage(drawn: list[dict], stage: str) -> set[str]:
    """Behind the final weights each sample stands once an epoch: ids carry their epoch, so none may come twice.

    Returns the groups whose steps count.
    """
    lines, steps = [line for line in drawn if line["stage"] == stage], STEPS[stage]
    last = {line["step"]: line["group"] for line in lines}  # the lines are in order of time: the last group counts
    assert sorted(last) == list(range(steps))
    seen = Counter(i for line in lines if last[line["step"]] == line["group"] for i in line["ids"])
    assert len(seen) == steps * BATCH
    assert set(seen.values()) == {1}
    epochs = Counter(i // IMAGES for i in seen)
    assert all(epochs[epoch] == IMAGES for epoch in range(steps * BATCH // IMAGES))
    return set(last.values())
