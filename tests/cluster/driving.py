"""A command that trains through Ray, watched from outside: what its log tells, which processes are its workers."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from conftest import make_tiny_npz
from training import tiny_recipe
from waiting import PATIENCE_S

from arae.config import dump_recipe
from arae.runs import RunFolder

STEPS, EVERY = 60, 10
ARAE = [sys.executable, "-m", "arae"]


@dataclass
class Run:
    """A command that trains, in a folder of its own by which its workers are known."""

    home: Path
    env: Mapping[str, str]
    recipe: Path = field(init=False)
    folder: RunFolder = field(init=False)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.folder = RunFolder(self.home / "runs" / "tiny")
        self.recipe = self.home / "tiny.yaml"
        recipe = tiny_recipe(make_tiny_npz(self.home), encoder__steps=STEPS, decoder__steps=6, state__every=EVERY)
        self.recipe.write_text(dump_recipe(recipe))

    @contextmanager
    def start(self, *flags: object) -> Iterator[subprocess.Popen[str]]:
        """The command at work; killed where the test fails meanwhile."""
        command = [*ARAE, "train", str(self.recipe), *map(str, flags)]
        env = {**self.env, "ARAE_RUNS": str(self.home / "runs")}
        with subprocess.Popen(command, cwd=self.home, env=env, text=True, stderr=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                process.kill()

    def finish(self, *flags: object) -> subprocess.CompletedProcess[str]:
        """The command from its start to its end."""
        with self.start(*flags) as process:
            return end_of(process)

    def told(self, event: str) -> list[dict]:
        """The log's events of a kind."""
        with suppress(OSError):
            lines = self.folder.log.read_text().splitlines()
            return [e for e in (json.loads(line) for line in lines if line.endswith("}")) if e["event"] == event]
        return []

    def at_step(self, step: int) -> bool:
        """Whether the log has told this step of the encoder, and that the last state before it is safe.

        A state is written while training goes on: at its step it is not on disk yet.
        """
        due = step - step % EVERY
        safe = due == 0 or any(e["step"] >= due for e in self.told("state"))
        return safe and any(e["step"] >= step for e in self.told("interval"))

    def workers(self) -> list[int]:
        """Process ids of the workers at work on this run, in order."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                ray = (entry / "cmdline").read_bytes().startswith(b"ray::")
                if ray and (entry / "cwd").resolve() == self.home.resolve():
                    found.append(int(entry.name))
        return sorted(found)

    def states(self) -> list[int]:
        """Steps of the states that the manifest lists; each is whole."""
        listed = json.loads((self.folder.state / "manifest.json").read_text())["states"]
        assert all((self.folder.state / s["file"]).stat().st_size == s["bytes"] for s in listed)
        return [s["step"] for s in listed]


def end_of(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command ends with."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("arae: ")]
    return line
