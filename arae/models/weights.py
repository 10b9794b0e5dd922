"""Weights from files: safetensors, or tensors in a `.pt`; nothing foreign is unpickled, no key is passed over."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from arae.errors import InputError


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pt` or `.pth` file, by name. Raises InputError where it holds others."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights; give a .safetensors file, or a .pt file with a state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: can't be read as weights ({first}); save its state dict as .safetensors") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        held = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise InputError(f"{path}: holds more than tensors ({held}); save its state dict alone")
    return dict(found)


def load_exactly(model: nn.Module, weights: Mapping[str, Tensor], where: str | Path) -> None:
    """Load weights whose names and shapes are exactly the model's. Raises InputError that lists what is left over."""
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    both = [(key, weights[key].shape, own[key].shape) for key in own if key in weights]
    shapes = [f"{key} {tuple(theirs)} for {tuple(ours)}" for key, theirs, ours in both if theirs != ours]
    found = {"the model lacks weights for": missing, "the file has besides": unknown, "shapes differ": shapes}
    faults = [f"{what}: {_few(keys)}" for what, keys in found.items() if keys]
    if faults:
        raise InputError(f"{where}: not the weights of this {type(model).__name__.lower()}; {'; '.join(faults)}")
    model.load_state_dict(weights)


def _few(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
