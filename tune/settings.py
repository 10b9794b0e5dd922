"""How a sweep searches its space: in which order, for how long, by what it judges, what it cuts short."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from arae.config.base import Count, Part, Positive

Objective = Literal["clean_accuracy", "robust_accuracy", "psnr", "ssim", "lpips", "gpu_hours"]
SIGNS: dict[str, int] = {
    "clean_accuracy": 1,
    "robust_accuracy": 1,
    "psnr": 1,
    "ssim": 1,
    "lpips": -1,
    "gpu_hours": -1,
}
"""Of each objective: +1 where more is better."""


class EarlyStop(Part):
    """Asynchronous successive halving (ASHA; Li et al. 2020), stage by stage.

    An encoder is compared with others of the same radius, norm and seed, by its held-out accuracy (the robust one where
    training attacks); a decoder with others on the same layer of the same encoder, by its PSNR: reconstructions are all
    that a decoder is looked at for while it is trained, whatever the objectives are. Nothing is compared across stages.
    """

    reduction: Annotated[float, Field(gt=1)] = 3.0
    """One in so many goes on at each rung; the rungs' steps grow by the same factor."""
    first: Annotated[float, Field(gt=0, lt=1)] = 1 / 9
    """Share of a stage after which it is compared for the first time."""

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of a stage at which it is compared; its end is none of them."""
        found, share = list[float](), self.first
        while share < 0.99:  # a rung just before the end would save nothing
            found.append(share)
            share *= self.reduction
        return tuple(found)

    @property
    def looks(self) -> int:
        """How often a stage has to be looked at for each rung to be met."""
        return round(1 / self.first)


class Search(Part):
    """The search."""

    kind: Literal["grid", "random", "tpe", "nsga2"] = "grid"
    """`grid`: every combination of the grid axes, drawn axes drawn anew for each. `random`: every axis drawn. `tpe`
    (Bergstra et al. 2011) and `nsga2` (Deb et al. 2002): Optuna's, which learn from what was tried."""
    samples: Count = 1
    """For `grid` with drawn axes: points for each combination."""
    trials: Count | None = None
    """At most so many trials."""
    hours: Positive | None = None
    """No new trial, and none that waits on a rung goes on, once so many hours were worked on the sweep, over all
    commands."""
    gpu_hours: Positive | None = None
    """The same once its stages took so many hours of a device (a GPU; on a CPU, a worker); those that it found in the
    store cost nothing."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of what is drawn; not the recipe's, which is an axis like any other."""
    objectives: tuple[Objective, ...] = ("robust_accuracy", "psnr")
    """What the front is of. `robust_accuracy` is that under the strongest attack of the recipe."""
    early_stop: EarlyStop | None = None
    """Stages that lag behind are cut short; null trains all to the end."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a trial that fails is tried again, in one command."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.kind != "grid" and self.trials is None and self.hours is None and self.gpu_hours is None:
            raise ValueError(f"kind = {self.kind} has no end of its own: give trials, hours or gpu_hours")
        if len(set(self.objectives)) != len(self.objectives) or not self.objectives:
            raise ValueError(f"objectives must be one or more distinct names, not {list(self.objectives)}")
        if self.kind != "grid" and self.samples != 1:
            raise ValueError(f"samples = {self.samples} is for kind = grid; of {self.kind}, give trials")
        return self
