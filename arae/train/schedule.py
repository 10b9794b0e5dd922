"""The learning rate as a function of the step alone, so that a resumed run has nothing to replay."""

import math

from torch.optim import Optimizer

from arae.config import Schedule


def factor(schedule: Schedule, step: int, total: int) -> float:
    """The factor on `lr` for step `step` (from 0) of `total`."""
    done = step / max(1, total)
    if schedule.warmup and done < schedule.warmup:
        return min(1.0, (step + 1) / max(1.0, schedule.warmup * total))
    if schedule.kind == "step":
        # The tolerance keeps 30/90 of an epoch count from falling a step short of 1/3.
        return schedule.gamma ** math.floor(done / schedule.every + 1e-9)
    rest = (done - schedule.warmup) / (1 - schedule.warmup)
    if schedule.kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    return 1 - rest if schedule.kind == "linear" else 1.0


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
