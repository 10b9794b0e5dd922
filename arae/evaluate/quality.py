"""Per-image reconstruction metrics, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from arae import metrics
from arae.config import Evaluate
from arae.errors import InputError


class Quality:
    """PSNR, SSIM and LPIPS of each image; what can't be measured is kept with its reason."""

    def __init__(self, settings: Evaluate) -> None:
        """`settings`: whose `lpips` and `lpips_weights` count."""
        self.net: metrics.Backbone | None = settings.lpips
        self.weights = settings.lpips_weights
        self.values: dict[str, list[Tensor]] = {"psnr": []}
        self.missing: dict[str, str] = {}

    @torch.no_grad()
    def add(self, again: Tensor, x: Tensor) -> None:
        """Compare reconstructions with images, both [N, C, H, W] in [0, 1]."""
        self.values["psnr"].append(metrics.psnr(again, x))
        if min(x.shape[2:]) >= metrics.SSIM_WINDOW:
            self.values.setdefault("ssim", []).append(metrics.ssim(again, x))
        else:
            self.missing["ssim"] = f"images of {min(x.shape[2:])} px are smaller than SSIM's window"
        if self.net is None or "lpips" in self.missing:
            return
        try:
            self.values.setdefault("lpips", []).append(metrics.lpips(again, x, net=self.net, weights=self.weights))
        except metrics.MetricUnavailable as error:
            self.missing["lpips"] = str(error)

    def take(self, measured: Mapping[str, Tensor], missing: Mapping[str, str]) -> None:
        """Add what another has measured, of other images. InputError: a metric that one could measure, another not."""
        for name, values in measured.items():
            self.values.setdefault(name, []).append(values)
        self.missing |= missing
        for name in self.missing:
            if self.values.get(name):
                raise InputError(
                    f"{name}: measured of some images and not of others ({self.missing[name]}): see that every worker "
                    "has what it needs, or leave it out"
                )

    @property
    def measured(self) -> dict[str, Tensor]:
        """Metric -> its values [N], of the metrics that all images have."""
        return {name: torch.cat(parts) for name, parts in self.values.items() if parts and name not in self.missing}
