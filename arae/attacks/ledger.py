"""The finished units of a long attack on disk, so that a kill costs no more than one unit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from arae import __version__
from arae.attacks.threat import Threat
from arae.files import write_bytes, write_text

MANIFEST = "job.json"
Unit = tuple[Tensor, Tensor]


class Ledger:
    """A folder with a job's finished units, or nothing at all (`Ledger(None)`)."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def open(cls, state: Path, job: Mapping[str, Any], log: Callable[[str], None]) -> Ledger:
        """The job's folder inside `state`, made where it is missing; `log` hears what was found.

        Work of other jobs is left alone. Raises OSError where the folder can't be written.
        """
        name = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
        folder = state / name
        if (folder / MANIFEST).is_file():
            done = len(list(folder.glob("*.safetensors")))
            log(f"{folder}: going on after {done} finished batches")
            return cls(folder)
        for other in sorted(state.glob(f"*/{MANIFEST}")):
            log(f"{other.parent}: the work of another job ({_differences(other, job)}) is left alone; starting anew")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / MANIFEST, json.dumps(job, indent=2, sort_keys=True) + "\n")
        return cls(folder)

    def read(self, attack: str, index: int) -> Unit | None:
        """A finished unit's outcome, bool [rows] and images [broken, C, H, W]; None where there is none yet."""
        path = self._path(attack, index)
        if path is None or not path.is_file():
            return None
        try:
            tensors = load(path.read_bytes())
            return tensors["broken"], tensors["images"]
        except (SafetensorError, KeyError):
            path.unlink()  # damaged: computed anew
            return None

    def keep(self, attack: str, index: int, unit: Unit) -> Unit:
        """Write a unit's outcome; returns it."""
        broken, images = unit
        if path := self._path(attack, index):
            write_bytes(path, save({"broken": broken, "images": images.contiguous()}))
        return unit

    def _path(self, attack: str, index: int) -> Path | None:
        return self.folder / f"{attack}-{index:05d}.safetensors" if self.folder else None


def describe(model: object, x: Tensor, y: Tensor, threat: Threat, budget: Mapping[str, Any]) -> dict[str, Any]:
    """All that a job's outcome depends on, as a JSON document. Raises ValueError for a model that is no `nn.Module`."""
    if not isinstance(model, nn.Module):
        raise ValueError("a state needs a model whose weights identify it: give an nn.Module, not a function")
    return {
        "model": hashlib.sha256(str(model).encode()).hexdigest(),
        "weights": digest({**dict(model.named_parameters()), **dict(model.named_buffers())}),
        "images": digest({"x": x}),
        "labels": digest({"y": y}),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "versions": {"arae": __version__, "pyautoattack": version("pyautoattack"), "torch": torch.__version__},
        **budget,
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _differences(manifest: Path, job: Mapping[str, Any]) -> str:
    """Which parts of a job another folder's manifest says otherwise."""
    try:
        other = json.loads(manifest.read_text())
        parts = [key for key in sorted(job.keys() | other.keys()) if job.get(key) != other.get(key)]
    except (OSError, ValueError, AttributeError):
        return "its manifest is unreadable"
    return "other " + ", ".join(parts)
