"""One network under training: its forward pass, its gradients over the group, its optimiser.

The trainers are written against `Learner`. Here is the plain one: the whole network on every worker, its gradients
averaged by DistributedDataParallel where there are several. `arae.train.zero` has DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arae.train.schedule import set_rate

if TYPE_CHECKING:
    from arae.train.engine import Engine

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Learner(Protocol):
    """What a trainer asks of a network. Each method that talks to the group is called by all workers alike."""

    module: nn.Module
    """The network itself, for passes in which no gradient of its weights counts: attacks, another network's step."""

    def __call__(self, *inputs: Any) -> Tensor:
        """A forward pass whose weights' gradients count."""
        ...

    def start(self, rate: float) -> None:
        """Begin an optimiser step: no gradients yet; `rate` is the learning rate of its update."""
        ...

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Around a micro-batch's forward and backward pass; `last`: of this worker in this step."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch's share of the loss; the last one averages them over the group.

        Shares are such that the mean over the workers of their sums is the mean over the global batch.
        """
        ...

    def update(self) -> None:
        """The optimiser's step."""
        ...

    def whole(self) -> AbstractContextManager[object]:
        """Within it every worker holds all weights, to read them by name (ZeRO's stage 3 has them in pieces)."""
        ...

    def state(self) -> dict[str, Any]:
        """`weights` (the state dict, whole), `optimizer` (torch's form, by parameter), `scaler`; of one form under
        every engine and at every world size."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Set `state()` back, whichever engine and world size it is of."""
        ...


class Plain:
    """The whole network and its optimiser on every worker."""

    def __init__(self, module: nn.Module, make_optimizer: MakeOptimizer, engine: Engine) -> None:
        self.module, self.engine = engine.place(module), engine
        self.wrapped = engine.wrap(self.module)
        self.optimizer = make_optimizer(self.module.parameters())
        self.scaler = engine.scaler()

    def __call__(self, *inputs: Any) -> Tensor:
        """See `Learner`."""
        return self.wrapped(*inputs)

    def start(self, rate: float) -> None:
        """See `Learner`."""
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """See `Learner`: the group talks only for the last micro-batch of a step."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Learner`."""
        if last:
            self.engine.meet()
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """See `Learner`."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def whole(self) -> AbstractContextManager[object]:
        """See `Learner`."""
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """See `Learner`."""
        return {
            "weights": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
