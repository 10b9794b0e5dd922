"""The whole state of a run on disk: written whole or not at all, checked before it is believed.

`state/manifest.json` lists the newest states, and the one that was best on the held-out images, with their sha256; it
is authoritative. A state holds tensors, numbers and text, and is read back with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from arae.errors import InputError
from arae.files import write_text, write_with


@dataclass(frozen=True)
class Saved:
    """One state in the manifest."""

    file: str
    sha256: str
    bytes: int
    stage: str
    step: int
    digest: str
    precision: str | None = None
    score: float | None = None
    """What the held-out images gave at this step; higher is better. None where they were not looked at."""


def save_state(
    folder: Path, payload: dict[str, Any], *, stage: str, step: int, digest: str, keep: int, score: float | None = None
) -> Saved:
    """Write a state and list it; the stage's last `keep` stay, and the best one.

    OSError where the disk is full or the run's folder is gone, with nothing half-written.
    """
    # Not its parents: where the run's folder is gone, so is the disk it was on, and another must not take its place.
    folder.mkdir(exist_ok=True)
    listed = list_states(folder)
    # Not over a file that is listed: a kill before the new list would leave it damaged.
    names = (f"{stage}-{step:08d}{'-' * bool(i)}{i or ''}.pt" for i in itertools.count())
    name = next(name for name in names if name not in {s.file for s in listed})
    written = write_with(folder / name, lambda file: torch.save(payload, cast(IO[bytes], file)))
    saved = Saved(name, written.sha256, written.bytes, stage, step, digest, payload.get("precision"), score)
    kept = retained([*(s for s in listed if (s.stage, s.step) != (stage, step) and s.stage == stage), saved], keep)
    _write_list(folder, kept)
    files = {s.file for s in kept}
    for path in folder.glob("*.pt*"):
        if path.name not in files:
            path.unlink(missing_ok=True)
    return saved


def retained(states: Sequence[Saved], keep: int) -> list[Saved]:
    """Of one stage's states, oldest first: the last `keep`, and before them the best."""
    best = best_of(states)
    return [s for i, s in enumerate(states) if i >= len(states) - keep or s is best]


def best_of(states: Sequence[Saved]) -> Saved | None:
    """The state with the highest score, the earlier of two equal ones; None where none has one."""
    return max((s for s in states if s.score is not None), key=lambda s: (s.score or 0.0, -s.step), default=None)


def list_states(folder: Path) -> list[Saved]:
    """The manifest's states, oldest first; none where there is no manifest.

    InputError for a manifest that is damaged, OSError for one that can't be read: neither may be taken for a run that
    has no states, which would begin anew and remove them.
    """
    path = folder / "manifest.json"
    try:
        return [Saved(**entry) for entry in json.loads(path.read_text())["states"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged ({error}); put a good copy of it back, or remove {folder} to begin the stage anew"
        ) from None


def newest_state(
    folder: Path, stage: str, note: Callable[[str], None], before: int | None = None
) -> tuple[Saved, dict[str, Any]] | None:
    """The newest undamaged state of a stage; a damaged one is noted and the one before it taken.

    before: only states of at most this step.
    """
    listed = [s for s in list_states(folder) if s.stage == stage and (before is None or s.step <= before)]
    for saved in sorted(listed, key=lambda s: s.step, reverse=True):
        payload = read_state(folder, saved, note)
        if payload is not None:
            return saved, payload
    return None


def read_state(folder: Path, saved: Saved, note: Callable[[str], None]) -> dict[str, Any] | None:
    """A listed state; None, with a note, where its file is missing or damaged."""
    path = folder / saved.file
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != saved.sha256:
                note(f"state {saved.file} is damaged (sha256 differs from the manifest's); trying the one before")
                return None
            file.seek(0)
            return torch.load(file, weights_only=True, map_location="cpu")
    except OSError as error:
        note(f"state {saved.file} can't be read ({error.strerror}); trying the one before")
        return None


def drop_states_after(folder: Path, stage: str, step: int) -> None:
    """Remove the states of a stage that are of later steps."""
    states = list_states(folder)
    kept = [s for s in states if s.stage != stage or s.step <= step]
    _write_list(folder, kept)
    for gone in set(states) - set(kept):
        (folder / gone.file).unlink(missing_ok=True)


def _write_list(folder: Path, states: Sequence[Saved]) -> None:
    write_text(folder / "manifest.json", json.dumps({"states": [asdict(s) for s in states]}, indent=1))


def drop_states(folder: Path) -> None:
    """Remove all states: their stage is finished and exported."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in folder.glob("*.pt*"):
        path.unlink(missing_ok=True)
