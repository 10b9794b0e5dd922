"""The whole state of a run on disk: written whole or not at all, checked before it is believed.

`state/manifest.json` lists the newest states with their sha256; it is authoritative. A state holds tensors, numbers and
text, and is read back with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from arae.files import write_bytes, write_text


@dataclass(frozen=True)
class Saved:
    """One state in the manifest."""

    file: str
    sha256: str
    bytes: int
    stage: str
    step: int
    digest: str


def save_state(folder: Path, payload: dict[str, Any], *, stage: str, step: int, digest: str, keep: int) -> None:
    """Write a state and list it; the stage's last `keep` stay. OSError where the disk is full, nothing half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    data = buffer.getbuffer()
    name = f"{stage}-{step:08d}.pt"
    write_bytes(folder / name, data)
    saved = Saved(name, hashlib.sha256(data).hexdigest(), len(data), stage, step, digest)
    listed = [s for s in list_states(folder) if s.file != name and s.stage == stage][-(keep - 1) :] if keep > 1 else []
    write_text(folder / "manifest.json", json.dumps({"states": [asdict(s) for s in (*listed, saved)]}, indent=1))
    kept = {s.file for s in (*listed, saved)}
    for path in folder.glob("*.pt*"):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def list_states(folder: Path) -> list[Saved]:
    """The manifest's states, oldest first; none where there is no readable manifest."""
    try:
        return [Saved(**entry) for entry in json.loads((folder / "manifest.json").read_text())["states"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def newest_state(folder: Path, stage: str, note: Callable[[str], None]) -> tuple[Saved, dict[str, Any]] | None:
    """The newest undamaged state of a stage; a damaged one is noted and the one before it taken."""
    for saved in reversed([s for s in list_states(folder) if s.stage == stage]):
        try:
            data = (folder / saved.file).read_bytes()
        except OSError as error:
            note(f"state {saved.file} can't be read ({error.strerror}); trying the one before")
            continue
        if hashlib.sha256(data).hexdigest() != saved.sha256:
            note(f"state {saved.file} is damaged (sha256 differs from the manifest's); trying the one before")
            continue
        return saved, torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return None


def drop_states(folder: Path) -> None:
    """Remove all states: their stage is finished and exported."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in folder.glob("*.pt*"):
        path.unlink(missing_ok=True)
