"""Other people's code that a benchmark is paired with. None of it is part of arae, and what is not there is left out.

`make bench` puts the packages of `peers.txt` into `.peers/`, each without its dependencies, for they would pull in
much that is neither run nor measured here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

PEERS = Path(__file__).resolve().parent.parent / ".peers"
MISSING = "its code is not there: `make bench` fetches it"


def robustness() -> ModuleType | None:
    """The reference library of adversarial training (MadryLab/robustness 1.2.1), or None."""
    if not (PEERS / "robustness").is_dir():
        return None
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    # Its logger, and a module of torchvision's that is gone: neither is run in a step of training.
    for name in ("cox", "torchvision.models.utils"):
        sys.modules.setdefault(name, _Nothing(name))
    import robustness  # type: ignore[import-not-found]
    import robustness.attacker  # type: ignore[import-not-found]
    import robustness.cifar_models  # type: ignore[import-not-found]
    import robustness.imagenet_models  # type: ignore[import-not-found]

    return robustness


def reference_step(
    library: Any,
    net: nn.Module,
    statistics: tuple[Sequence[float], Sequence[float]],
    attack: dict[str, Any],
    images: Tensor,
    labels: Tensor,
    autocast: Callable[[], Any],
) -> Callable[[], object]:
    """One step as `robustness.train` makes it: attack, loss, SGD; `net` is of the library's own networks."""
    mean, std = (torch.tensor(values) for values in statistics)
    model = library.attacker.AttackerModel(net, SimpleNamespace(mean=mean, std=std)).to(images.device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    # The library's default keeps the best of the steps, which costs one more look at the images.
    how = {"random_start": False, "use_best": True, **attack}

    def step() -> None:
        with autocast(), staying(images.device):
            logits, _ = model(images, target=labels, make_adv=True, **how)
            loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def staying(device: torch.device) -> AbstractContextManager[object]:
    """The library calls `.cuda()` whatever the device is: on a CPU that leaves tensors where they are."""
    if device.type == "cuda":
        return nullcontext()
    return mock.patch.object(Tensor, "cuda", lambda tensor, *_: tensor)


class _Nothing(ModuleType):
    """A module in which every name is None."""

    def __getattr__(self, name: str) -> None:
        return None
