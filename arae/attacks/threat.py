"""The threat model: which perturbations count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arae.by_image import image_by_image
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
        return _largest(delta) if self.norm == "linf" else torch.linalg.vector_norm(delta, dim=_of_image(delta))

    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbations to delta [N, ...] inside the ball (nearest in l2, for both norms)."""
        if self.norm == "linf":
            return delta.clamp(-self.eps, self.eps)
        return delta * self._shrink(delta)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit step [N, ...] along which a function with this gradient rises most; zero for a zero gradient."""
        if self.norm == "linf":
            return gradient.sign()
        scaled, length = self._scaled(gradient)
        return scaled / length

    @torch.no_grad()
    def move(self, images: Tensor, x: Tensor, gradient: Tensor, size: float) -> Tensor:
        """A step of projected gradient ascent: images [N, ...] of the ball around x, moved by `size` along `steepest`
        of the gradient, then projected onto the ball, then onto [0, 1]."""

        def work(images: Tensor, x: Tensor, gradient: Tensor, out: Tensor) -> None:
            delta = images - x
            if self.norm == "linf":
                delta.add_(gradient.sign(), alpha=size).clamp_(-self.eps, self.eps)
            else:
                scaled, length = self._scaled(gradient)
                delta.addcmul_(scaled, size / length).mul_(self._shrink(delta))
            torch.clamp(delta.add_(x), 0, 1, out=out)

        return image_by_image(work, images, x, gradient)

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

    def _shrink(self, delta: Tensor) -> Tensor:
        """What brings each perturbation [N, ...] into the l2 ball: [N, 1, ...], at most 1."""
        tiny = torch.finfo(delta.dtype).tiny
        return per_sample(self.eps / self.length(delta).clamp_min(tiny), delta).clamp_max(1)

    def _scaled(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients [N, ...] divided by their largest value, and the l2 norms of that, [N, 1, ...].

        The gradient of a confident sample may be so small that its square is zero.
        """
        tiny = torch.finfo(gradient.dtype).tiny
        scaled = gradient / per_sample(_largest(gradient).clamp_min(tiny), gradient)
        length = self.length(scaled)
        return scaled, per_sample(length.masked_fill(length == 0, 1), gradient)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values [N], shaped to broadcast over like [N, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _of_image(images: Tensor) -> tuple[int, ...]:
    """All dimensions but the first: to flatten images with the channels last would be to transpose them."""
    return tuple(range(1, images.dim()))


def _largest(images: Tensor) -> Tensor:
    """The largest absolute value [N] of each: `vector_norm` takes ten times as long on a CPU."""
    dim = _of_image(images)
    return torch.maximum(images.amax(dim), -images.amin(dim))
