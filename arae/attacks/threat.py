"""The threat model: which perturbations count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arae.config import Norm, check_radius, parse_radius


@dataclass(frozen=True)
class Threat:
    """All perturbations whose norm, over the values of one image, is at most `eps` (images in [0, 1]).

    `eps` may be a fraction as text, such as "8/255". Raises ValueError for an unknown norm, a negative or infinite
    radius, or an l-inf radius above 1.
    """

    norm: Norm
    eps: float

    def __init__(self, norm: Norm, eps: float | str) -> None:
        if norm not in ("l2", "linf"):
            raise ValueError(f"norm {norm!r}: write 'l2' or 'linf'")
        radius = parse_radius(eps)
        check_radius(norm, radius)
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "eps", radius)

    def length(self, delta: Tensor) -> Tensor:
        """Norm [N] of each perturbation in delta [N, ...]."""
        return torch.linalg.vector_norm(delta.flatten(1), ord=2 if self.norm == "l2" else torch.inf, dim=1)

    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbations to delta [N, ...] inside the ball (nearest in l2, for both norms)."""
        if self.norm == "linf":
            return delta.clamp(-self.eps, self.eps)
        tiny = torch.finfo(delta.dtype).tiny
        return delta * per_sample(self.eps / self.length(delta).clamp_min(tiny), delta).clamp_max(1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit step [N, ...] along which a function with this gradient rises most; zero for a zero gradient."""
        if self.norm == "linf":
            return gradient.sign()
        tiny = torch.finfo(gradient.dtype).tiny
        # Scaled to 1 before it is squared: the gradient of a confident sample may be so small that its square is zero.
        scaled = gradient / per_sample(gradient.flatten(1).abs().amax(1).clamp_min(tiny), gradient)
        return scaled / per_sample(self.length(scaled).clamp_min(tiny), gradient)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A perturbation for each image of x [N, ...], uniform in the ball."""
        device = generator.device if generator is not None else x.device
        if self.norm == "linf":
            noise = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype)
            return (2 * noise.to(x.device) - 1) * self.eps
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        volume = torch.rand(len(x), generator=generator, device=device, dtype=x.dtype).to(x.device)
        radius = self.eps * volume ** (1 / x[0].numel())
        return noise * per_sample(radius / self.length(noise), x)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values [N], shaped to broadcast over like [N, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))
