"""Train and benchmark adversarially robust autoencoders on one machine or on many."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arae.config import Recipe, load_recipe
    from arae.models.autoencoder import Autoencoder, load_autoencoder

__version__ = "0.1.0"
__all__ = ["Autoencoder", "Recipe", "load_autoencoder", "load_recipe"]

_HOME = {
    "Recipe": "arae.config",
    "load_recipe": "arae.config",
    "Autoencoder": "arae.models.autoencoder",
    "load_autoencoder": "arae.models.autoencoder",
}
_PARTS = ("apps", "attacks", "data", "evaluate", "metrics", "models", "train")


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that `arae --help` and the drivers do not wait for torch.
    from importlib import import_module

    if name in _PARTS:
        return import_module(f"arae.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'arae' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
