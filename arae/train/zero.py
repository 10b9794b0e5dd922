"""A network under training by DeepSpeed's ZeRO, as a `Learner`: stage 0 shares nothing out among the workers, stage 1
the optimiser's states, 2 gradients too, 3 weights too.

Weights, gradients and their sums are float32, as with the plain learner: low precision is autocast around the forward
pass, and float16 losses are scaled here. DeepSpeed's own mixed precision would train other weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from arae.train.learner import MakeOptimizer
from arae.train.schedule import set_rate
from arae.train.zero_setup import configuration, join_group, load_deepspeed, name_device, refuse_unfit
from arae.train.zero_state import ShardedState

if TYPE_CHECKING:
    from arae.train.engine import Engine

Hooks = Mapping[nn.Module, tuple[list[int], list[int]]]


class Autocast(nn.Module):
    """The network in the engine's precision: DeepSpeed ends any autocast that it is called in."""

    def __init__(self, inner: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.inner, self.engine = inner, engine

    def forward(self, *inputs: Any) -> Tensor:
        """The network's output."""
        with self.engine.autocast():
            return self.inner(*inputs)


class Zero:
    """One network and its optimiser, shared out among the workers; see `Learner` for what each method does."""

    def __init__(self, module: nn.Module, make_optimizer: MakeOptimizer, engine: Engine) -> None:
        """InputError where DeepSpeed is missing, and for float64."""
        refuse_unfit(engine)
        deepspeed = load_deepspeed(engine.device.type)
        name_device(engine.device)
        join_group(engine.device)
        self.engine, self.stage, self.module = engine, engine.choice.stage, engine.place(module)
        self.weights = list(self.module.parameters())
        for weight in self.weights:  # DeepSpeed sends them as they lie in memory
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self.optimizer = make_optimizer(self.weights)
        self.scaler = LossScale(engine, self.weights)
        self._own_hooks = hooks_of(self.module)
        self.zero = deepspeed.initialize(
            model=Autocast(self.module, engine),
            optimizer=self.optimizer,
            config=configuration(engine.choice),
            dist_init_required=False,
        )[0]
        self._gathered = self._void = False

    def __call__(self, *inputs: Any) -> Tensor:
        """See `Learner`."""
        output = self.zero(*inputs)
        return output * torch.nan if self._void else output

    def start(self, rate: float) -> None:
        """See `Learner`; each update has dropped its gradients."""
        set_rate(self.optimizer, rate)
        if self.stage == 3:
            self.engine.meet()  # no pass without the others' weights

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """See `Learner`: it is told of a step's end in `backward`."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Learner`."""
        if last or self.stage == 2:
            self.engine.meet()
        self.zero.set_gradient_accumulation_boundary(last)
        self.zero.backward(self.scaler.scaled(loss), scale_wrt_gas=False)

    def update(self) -> None:
        """See `Learner`.

        From stage 1 on ZeRO leaves a step out where a gradient is not finite, on all workers. That is what float16
        needs; otherwise the plain learner's weights would be NaN from here on, and whoever watches the loss is to see
        the same.
        """
        if self.stage == 0 and self.scaler.enabled and not self._finite():
            self.zero.zero_grad()
            applied = False
        else:
            self.zero.step()
            applied = self.zero.was_step_applied()
        if self.scaler.enabled:
            self.scaler.update(applied=applied)
        elif not applied:
            self._void = True

    def _finite(self) -> bool:
        return all(bool(w.grad.isfinite().all()) for w in self.weights if w.grad is not None)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See `Learner`. The network is as any other within it: one worker alone may run it."""
        if self.stage < 3 or self._gathered:
            yield
            return
        from deepspeed import zero

        self._gathered = True
        try:
            with zero.GatheredParameters(self.weights), only_hooks(self._own_hooks):
                yield
        finally:
            self._gathered = False

    def state(self) -> dict[str, Any]:
        """See `Learner`: a copy."""
        with self.whole():
            weights = {key: value.detach().to("cpu", copy=True) for key, value in self.module.state_dict().items()}
        if self._void:  # no state to go on from
            weights = {key: value * torch.nan if value.is_floating_point() else value for key, value in weights.items()}
        optimizer = deepcopy(self.optimizer.state_dict()) if self.stage == 0 else self._sharded().state()
        return {"weights": weights, "optimizer": optimizer, "scaler": self.scaler.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        if self.stage == 0:
            self.module.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self._sharded().restore_weights(self.module, state["weights"])
            self._sharded().restore(state["optimizer"])
        self.scaler.restore(state["scaler"])
        self._void = False

    def _sharded(self) -> ShardedState:
        return ShardedState(self.zero.optimizer, self.optimizer, self.weights, self.stage)


class LossScale:
    """Float16's loss scaling, by torch's rule, with gradients set right before ZeRO sees them.

    ZeRO moves a gradient away as soon as it is there, where torch's scaler would not find it.
    """

    def __init__(self, engine: Engine, weights: list[nn.Parameter]) -> None:
        self._scaler = engine.scaler()
        self.enabled = self._scaler.is_enabled()
        self._inverse = torch.ones((), device=engine.device)
        self._witness = torch.zeros((), device=engine.device)
        self._step = torch.optim.SGD([self._witness], lr=0.0)
        for weight in weights if self.enabled else ():
            weight.register_hook(lambda gradient: gradient * self._inverse)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` of."""
        if not self.enabled:
            return loss
        scale = self._scaler.scale(torch.ones_like(self._witness))
        self._inverse = 1 / scale  # exact: the scale is a power of two
        return loss * scale

    def update(self, *, applied: bool) -> None:
        """After a step: grow the scale in time, or halve it where gradients were infinite and nothing was applied."""
        self._witness.grad = torch.full_like(self._witness, 0.0 if applied else torch.inf)
        self._scaler.step(self._step)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """As `torch.amp.GradScaler.state_dict`."""
        return self._scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Set `state()` back."""
        self._scaler.load_state_dict(state)


def hooks_of(network: nn.Module) -> Hooks:
    """The keys of the forward hooks that each part of a network has."""
    return {part: (list(part._forward_pre_hooks), list(part._forward_hooks)) for part in network.modules()}


@contextmanager
def only_hooks(hooks: Hooks) -> Iterator[None]:
    """Leave each part with the hooks named: ZeRO's would send messages, and let go of weights that are in use."""
    before = [(part, part._forward_pre_hooks, part._forward_hooks) for part in hooks]
    for part, (first, last) in hooks.items():
        part._forward_pre_hooks = OrderedDict((key, part._forward_pre_hooks[key]) for key in first)
        part._forward_hooks = OrderedDict((key, part._forward_hooks[key]) for key in last)
    try:
        yield
    finally:
        for part, first, last in before:
            part._forward_pre_hooks, part._forward_hooks = first, last
