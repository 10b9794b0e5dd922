"""Weights from files: safetensors, or tensors in a `.pt`; nothing foreign is unpickled, no key is passed over."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from arae.errors import InputError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a `.safetensors` file, or a file of `torch.save` with a dict of tensors and plain containers, holds by name.

    Raises InputError where it is missing or damaged, and where it holds more, with the names of the classes: reading
    those would run whatever code the file brings, so nothing of such a file is read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights; give a .safetensors file, or a .pt file with a state dict")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():  # of newer pickle protocols, which the safe unpickler reads or refuses
            warnings.simplefilter("ignore", UserWarning)
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: can't be read as weights ({_refused(path, error)})") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0].split('. ')[0]}" if str(error) else "it breaks off"
        raise InputError(
            f"{path}: can't be read as weights ({why}); get the file anew, or save its state dict as .safetensors"
        ) from None
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: holds a {type(found).__name__}, not tensors by name; save its state dict alone")
    return {str(key): value for key, value in found.items()}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; InputError as `read_checkpoint`, and where it holds anything beside them."""
    found = read_checkpoint(path)
    if not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(
            f"{path}: holds more than tensors ({_few(list(found))}); save its state dict alone, or make a model folder "
            "of it with `arae import`"
        )
    return found


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


def _refused(path: Path, error: pickle.UnpicklingError) -> str:
    """What the file holds that is no tensor or plain container, and the mend."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):  # not a zip file, or a damaged one
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    if not names:
        why = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
        return f"{why[1] if why else 'not a file of torch.save'}; get the file anew, or save its state dict alone"
    return (
        f"it holds {_few(names)}, which only running its code would make; where you trust its author, open it yourself "
        "with torch.load(…, weights_only=False) and torch.save its state dicts alone"
    )


def _few(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
