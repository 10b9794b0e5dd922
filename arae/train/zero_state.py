"""What ZeRO has shared out among the workers, as one: an optimiser's state in torch's own form, whole.

Every worker must call each method, for they all send messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ShardedState:
    """An optimiser under ZeRO's stages 1 to 3, which holds pieces of long vectors in place of weights."""

    def __init__(
        self, zero: Any, optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], stage: int
    ) -> None:
        """zero: DeepSpeed's optimiser around `optimizer`, of these weights."""
        self.zero, self.optimizer, self.weights, self.stage = zero, optimizer, weights, stage

    @property
    def pieces(self) -> list[Tensor]:
        """This worker's pieces of the weights."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def state(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`: each weight's by its number; on the CPU."""
        from deepspeed.utils import safe_get_full_optimizer_state

        by_weight: dict[int, dict[str, Any]] = {}
        own = self.optimizer.state.get(self.pieces[0], {})
        if own:
            vectors = [key for key, value in own.items() if _like(value, self.pieces[0])]
            with _thawed(self.weights):
                for i, weight in enumerate(self.weights):
                    found: Any = {key: safe_get_full_optimizer_state(weight, key) for key in vectors}
                    by_weight[i] = {key: found[key].cpu() if key in found else _own(own[key]) for key in own}
        [group] = self.optimizer.param_groups
        options = {key: value for key, value in group.items() if key != "params"}
        return {"state": by_weight, "param_groups": [options | {"params": list(range(len(self.weights)))}]}

    def restore(self, state: dict[str, Any]) -> None:
        """Set `state()`, or that of a plain optimiser of the same weights, back."""
        [group], [saved] = self.optimizer.param_groups, state["param_groups"]
        group.update({key: value for key, value in saved.items() if key != "params"})
        if state["state"] or self.optimizer.state:
            self._prime()
        for piece in self.pieces:
            for key, value in self.optimizer.state.get(piece, {}).items():
                if torch.is_tensor(value):
                    value.zero_() if _like(value, piece) else value.copy_(state["state"].get(0, {}).get(key, 0))
        with _thawed(self.weights):
            for i, entry in state["state"].items():
                for key, value in entry.items():
                    if torch.is_tensor(value) and value.shape == _shape(self.weights[i]) and value.dim():
                        self._set(self.weights[i], key, value)

    def restore_weights(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        """Load a whole state dict."""
        if self.stage < 3:
            module.load_state_dict(weights)
        else:
            from deepspeed import zero

            with zero.GatheredParameters(list(self.weights), modifier_rank=0):
                module.load_state_dict(weights)
        self.zero.refresh_fp32_params()

    def _prime(self) -> None:
        """Let the optimiser make its state's tensors, which it does in its first step; at rate 0 nothing else moves."""
        if self.optimizer.state:
            return
        [group] = self.optimizer.param_groups
        rate, group["lr"] = group["lr"], 0.0
        for i, piece in enumerate(self.pieces):
            before, piece.grad = piece.grad, torch.zeros_like(piece)
            self.zero._optimizer_step(i)
            piece.grad = before
        group["lr"] = rate

    def _set(self, weight: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.contiguous()
        if self.stage < 3:
            safe_set_full_optimizer_state(weight, value.to(weight.device), key)
            return
        size = weight.ds_tensor.numel()  # type: ignore[attr-defined]
        rank = torch.distributed.get_rank()
        piece = torch.zeros(size)
        own = value.flatten()[rank * size : (rank + 1) * size]
        piece[: len(own)] = own
        safe_set_local_optimizer_state(weight, piece.to(weight.device), key)


def _like(value: Any, piece: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == piece.shape


def _own(value: Any) -> Any:
    """Each weight's own count of steps: an optimiser that shared one tensor would count every weight."""
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value


def _shape(weight: nn.Parameter) -> torch.Size:
    return getattr(weight, "ds_shape", weight.shape)


@contextmanager
def _thawed(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """ZeRO says nothing of weights that are frozen, as a discriminator's are in its generator's step."""
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, wanted in zip(weights, before, strict=True):
            weight.requires_grad_(wanted)
