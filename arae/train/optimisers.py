"""PyTorch's SGD and Adam, with large weights on a CPU taken through the cache piece by piece.

An update goes over weights, gradients and moments four to seven times, and of tensors larger than the cache every pass
is paid for in memory traffic. Updates are elementwise, so a piece at a time gives the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

LARGE = 1 << 18
"""Numbers in a tensor from which pieces win."""
PIECE = 1 << 16
"""Numbers in a piece: its weights, gradients, moments and what lies between take about a megabyte."""


class SGD(torch.optim.SGD):
    """`torch.optim.SGD`; state dicts are the same."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """See `torch.optim.SGD`."""
        assert closure is None
        done: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            how = {key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")}
            for weight in group["params"]:
                if not _in_pieces(weight) or (group["momentum"] and group["dampening"]):
                    continue
                tensors = [weight, weight.grad]
                if group["momentum"]:
                    state = self.state[weight]
                    if state.get("momentum_buffer") is None:  # zeros, times the momentum, and the gradient: itself
                        state["momentum_buffer"] = torch.zeros_like(weight)
                    tensors.append(state["momentum_buffer"])
                if not _alike(tensors):
                    continue
                for one, gradient, *moment in _pieces(tensors):
                    sgd([one], [gradient], [moment[0] if moment else None], foreach=False, **how)
                done.append((weight, weight.grad))
        return _the_rest(super().step, done)


class Adam(torch.optim.Adam):
    """`torch.optim.Adam`; state dicts are the same."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """See `torch.optim.Adam`."""
        assert closure is None
        done: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            how: dict[str, Any] = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
            how["beta1"], how["beta2"] = group["betas"]
            for weight in group["params"]:
                state = self.state.get(weight)
                # The first update is PyTorch's: it makes the state.
                if not _in_pieces(weight) or not state or group["amsgrad"]:
                    continue
                tensors = [weight, weight.grad, state["exp_avg"], state["exp_avg_sq"]]
                if not _alike(tensors):
                    continue
                count = state["step"].clone()
                for one, gradient, first, second in _pieces(tensors):
                    state["step"].copy_(count)  # every piece counts it up
                    steps = [state["step"]]
                    adam([one], [gradient], [first], [second], [], steps, foreach=False, amsgrad=False, **how)
                done.append((weight, weight.grad))
        return _the_rest(super().step, done)


def _in_pieces(weight: Tensor) -> bool:
    gradient = weight.grad
    large = weight.device.type == "cpu" and weight.numel() >= LARGE
    return large and gradient is not None and not gradient.is_sparse


def _alike(tensors: list[Tensor]) -> bool:
    """Whether all lie in memory in the same order, without gaps."""
    return all(t.is_contiguous() for t in tensors) or (
        tensors[0].dim() == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    )


def _pieces(tensors: list[Tensor]) -> zip[tuple[Tensor, ...]]:
    """Views of the tensors, so many numbers each."""
    flat = [t.detach().as_strided((t.numel(),), (1,), t.storage_offset()) for t in tensors]
    return zip(*(t.split(PIECE) for t in flat), strict=True)


def _the_rest(step: Callable[[], float | None], done: list[tuple[Tensor, Tensor]]) -> float | None:
    """PyTorch's own step for whatever has a gradient still."""
    for weight, _ in done:
        weight.grad = None
    try:
        return step()
    finally:
        for weight, gradient in done:
            weight.grad = gradient
