"""The run folder: one place that knows its files."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from arae.config import Recipe, dump_recipe
from arae.errors import Busy
from arae.files import write_text
from arae.storage.place import runs_root

__all__ = ["SHARED", "RunFolder", "runs_root"]

SHARED = "stages"
"""Folder, among the runs, of the stages that sweeps share."""

LOOKED_AT_S = 1.0  # `arae status` holds a lock for an instant, to see whether there is one


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; `<runs>/<recipe name>`."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe, root: Path | None = None) -> RunFolder:
        """The folder of a recipe's run."""
        return cls((root or runs_root()) / recipe.name)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def state(self) -> Path:
        """Newest states and their manifest."""
        return self.path / "state"

    @property
    def model(self) -> Path:
        """Exported weights and config."""
        return self.path / "model"

    @property
    def images(self) -> Path:
        """Pictures made on the way."""
        return self.path / "images"

    @property
    def records(self) -> Path:
        """One record a line."""
        return self.path / "records.jsonl"

    @property
    def evaluation(self) -> Path:
        """Finished parts of an evaluation that is not finished; gone once its records are written."""
        return self.path / "evaluation"

    @property
    def log(self) -> Path:
        """One JSON object a step interval."""
        return self.path / "log.jsonl"

    @property
    def text(self) -> Path:
        """The same for people."""
        return self.path / "log.txt"

    @property
    def space(self) -> Path:
        """Of a sweep: what it varies."""
        return self.path / "space.yaml"

    @property
    def trials(self) -> Path:
        """Of a sweep: its book, one event a line."""
        return self.path / "trials.jsonl"

    @property
    def is_sweep(self) -> bool:
        """Whether it holds a sweep, with its trials in folders inside."""
        return self.space.is_file() and self.trials.is_file()

    def create(self, recipe: Recipe) -> None:
        """Make the folder and write the resolved recipe, all or nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe, dump_recipe(recipe))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against a second command; Busy where another holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            until = time.monotonic() + LOOKED_AT_S
            while not _is_taken(file):
                if time.monotonic() > until:
                    raise Busy(f"{self.path}: another command is at work on this run; wait for it or stop it")
                time.sleep(0.02)
            yield


def _is_taken(file: IO[str]) -> bool:
    """Lock the file, and tell whether that worked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
