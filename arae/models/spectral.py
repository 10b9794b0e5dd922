"""Spectral normalisation (Miyato et al. 2018) as PyTorch parametrises it, in fewer passes over the weights.

The weight W is divided by σ = uᵀ W v, u and v fixed. Autograd's gradient of that runs over a large weight seven times;
written out it is (G - <G, W / σ> u vᵀ) / σ, which takes four. Under autocast the quotient is rounded to the lower
precision as it is made, not in a pass of its own: the same numbers as dividing first and casting then.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm


def normalise_spectrum(layer: nn.Module) -> None:
    """Divide the layer's weight by its largest singular value from now on (spectral norm; Miyato et al. 2018).

    Call it once the weight is initialised: wrapping runs 15 power iterations on the weight as it is, so the first
    forward pass already sees a singular value near 1 (from random vectors, as in PyTorch's older `spectral_norm`, it
    would be far above). Each later pass in training mode adds one iteration; evaluation mode adds none. The matrix has
    the output channels as its rows, for transposed convolutions too.
    """
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    parametrize.register_parametrization(layer, "weight", SpectralNorm(weight, 1, dim=int(transposed)))


class SpectralNorm(_SpectralNorm):
    """PyTorch's parametrisation (its buffers, its names in a state dict) with a quicker division."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight divided by its largest singular value, as far as the iterations have come."""
        matrix = self._reshape_weight_to_matrix(weight)
        if self.training:
            self._power_method(matrix, self.n_power_iterations)
        # Copies: the next pass moves the vectors, and this one's backward pass may still be to come.
        return _Divided.apply(weight, matrix.detach(), self._u.clone(), self._v.clone(), self.dim)  # type: ignore[no-any-return]


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, matrix: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:  # type: ignore[override]
        kind = weight.device.type
        # Of some devices (meta, where shapes are worked out) PyTorch will not even be asked.
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if cast else nullcontext():
            sigma = torch.vdot(u, torch.mv(matrix, v))
        low = cast and weight.dtype == torch.float32
        quotient = torch.empty_like(weight, dtype=torch.get_autocast_dtype(kind) if low else None)
        torch.div(weight, sigma, out=quotient)
        ctx.save_for_backward(weight, sigma, u, v)
        ctx.dim = dim
        return quotient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, sigma, u, v = ctx.saved_tensors
        found = gradient.to(weight.dtype)
        # <G, W / σ> u, with u for the rows of the matrix: each entry's share of σ's gradient is u vᵀ there.
        share = (found * weight).sum() / (sigma * sigma)
        if found.dim() == 2:
            return torch.addr(found / sigma, share * u, v, alpha=-1), None, None, None, None
        rows = (share * u).view(*(-1 if i == ctx.dim else 1 for i in range(found.dim())))
        others = [size for i, size in enumerate(found.shape) if i != ctx.dim]
        return torch.addcmul(found / sigma, rows, v.view(others).unsqueeze(ctx.dim), value=-1), None, None, None, None
