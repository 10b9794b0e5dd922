"""Evaluation mode for a block of code, with every module's own mode put back after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put the models in evaluation mode; afterwards, also after an exception, each submodule is in the mode it was in.

    `model.train(was_training)` would not do: it would wake submodules that are frozen in evaluation mode inside a
    model that trains (an encoder's batch norm inside an autoencoder, for one).
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
