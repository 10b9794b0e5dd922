"""`arae sweep` in a folder of its own, and what can be seen of it from outside."""

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from conftest import make_tiny_npz
from training import tiny_recipe
from waiting import PATIENCE_S

from arae.config import dump_recipe
from arae.monitor.events import read_events
from arae.records import read_records
from arae.runs import RunFolder
from tune.journal import Entry, Journal
from tune.store import times_trained

EPS, FEATURE = "encoder.attack.eps", "decoder.losses.feature"
GRID = {EPS: {"grid": [0, 0.5]}, FEATURE: {"grid": [0, 0.1]}}


class Sweeping:
    """The command in a folder of its own."""

    def __init__(self, home: Path, axes: Mapping[str, Any], **overrides: object) -> None:
        self.home, self.runs = home, home / "runs"
        home.mkdir(exist_ok=True)
        (home / "tiny.yaml").write_text(dump_recipe(tiny_recipe(make_tiny_npz(home.parent), **overrides)))
        (home / "space.yaml").write_text(yaml.safe_dump({"axes": dict(axes)}, sort_keys=False))
        self.folder = self.runs / "s"
        self.env = {**os.environ, "ARAE_RUNS": str(self.runs)}
        self.command = [sys.executable, "-m", "arae", "sweep", "tiny.yaml", "space.yaml", "name=s", "--jobs", "2"]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *more],
            cwd=self.home,
            env=self.env,
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, *more: str) -> tuple[int, str]:
        """Exit code, and what was said."""
        with self.start(*more) as process:
            out, error = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out + error

    def entries(self) -> dict[str, Entry]:
        return Journal(self.folder).entries()

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return list(Journal(self.folder).events(*kinds))

    def table(self) -> dict[str, list[tuple[str, float | None]]]:
        """Every trial's values, of those that finished."""
        done = [entry for entry in self.entries().values() if entry.state == "finished"]
        return {e.id: [(r.metric, r.value) for r in read_records(self.folder / e.id)] for e in done}

    def repeated(self) -> int:
        """Steps that were taken more than once, of all stages together, to the length of an interval."""
        found = 0
        for path in (self.runs / "stages").iterdir():
            steps = [event["step"] for event in read_events(RunFolder(path).log) if event["event"] == "interval"]
            found += sum(max(0, before - after) for before, after in itertools.pairwise(steps))
        return found

    def trained(self) -> dict[str, int]:
        """How often each stage's training came to its end."""
        stages = sorted((self.runs / "stages").iterdir())
        return {
            path.name: times_trained(RunFolder(path), "encoder" if path.name.startswith("encoder") else "decoder")
            for path in stages
        }
