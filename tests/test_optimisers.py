"""The optimisers that go piece by piece give PyTorch's numbers, bit for bit, and its state dicts."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from arae.train import optimisers
from arae.train.optimisers import LARGE, PIECE

KINDS: list[tuple[Any, Any, dict[str, Any]]] = [
    (optimisers.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
    (optimisers.SGD, torch.optim.SGD, {"lr": 0.1}),
    (optimisers.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (optimisers.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (optimisers.Adam, torch.optim.Adam, {"lr": 1e-3, "betas": (0.5, 0.999)}),
    (optimisers.Adam, torch.optim.Adam, {"lr": 1e-3, "betas": (0.0, 0.99), "weight_decay": 1e-2}),
    (optimisers.Adam, torch.optim.Adam, {"lr": 1e-3, "amsgrad": True}),
]


def network(dtype: torch.dtype) -> nn.Sequential:
    """Weights above and below what goes in pieces, the largest of no whole number of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(256, 129, 3), nn.Flatten(), nn.Linear(129, 2053), nn.Linear(2053, 3)).to(dtype)
    sizes = [p.numel() for p in net.parameters()]
    assert min(sizes) < LARGE < sorted(sizes)[-2]
    assert all(size % PIECE for size in sizes)
    return net


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 256, 3, 3, generator=generator).to(next(net.parameters()).dtype)
    optimizer.zero_grad(set_to_none=True)
    net(x).square().mean().backward()
    optimizer.step()


def same(one: Any, other: Any) -> bool:
    """Of state dicts: every number."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(("ours", "theirs", "settings"), KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bit_is_pytorchs(
    ours: Any, theirs: Any, settings: dict[str, Any], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """Also where a state goes from one to the other, and where a weight has no gradient for once."""
    nets = [network(dtype).to(memory_format=layout) for _ in range(2)]
    optimizers = [ours(nets[0].parameters(), **settings), theirs(nets[1].parameters(), **settings)]
    for seed in range(4):
        for i, net in enumerate(nets):
            net[3].requires_grad_(seed != 1)
            step(net, optimizers[i], seed)
            assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
        assert same(nets[0].state_dict(), nets[1].state_dict())
        assert same(optimizers[0].state_dict(), optimizers[1].state_dict())
        if seed == 2:
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(state)


def test_gradients_that_lie_otherwise_are_pytorchs_work() -> None:
    nets = [nn.Sequential(nn.Linear(1024, 512, bias=False)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [optimisers.SGD(nets[0].parameters(), 0.1), torch.optim.SGD(nets[1].parameters(), 0.1)]
    torch.manual_seed(0)
    gradient = torch.randn(1024, 512).T
    for net, optimizer in zip(nets, optimizers, strict=True):
        net[0].weight.grad = gradient.clone(memory_format=torch.preserve_format)
        assert not net[0].weight.grad.is_contiguous()
        optimizer.step()
    assert same(nets[0].state_dict(), nets[1].state_dict())
