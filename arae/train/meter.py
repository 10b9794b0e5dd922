"""What a stage's steps reported, kept on the device: numbers are fetched once an interval, not once a step."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from arae.train.engine import Engine


class Meter:
    """Sums over an interval of steps, and the seconds that went into them."""

    def __init__(self, engine: Engine, seconds: float, hosts: list[str]) -> None:
        """`seconds`: of the stage's steps before this process; `hosts`: of the workers, by rank."""
        self.engine, self.seconds, self.hosts = engine, seconds, hosts
        self._sums: dict[str, Tensor] = {}
        self._losses: list[tuple[int, Tensor]] = []
        self._images = 0
        self._epoch: dict[str, list[float]] = {}
        self._busy = self._waiting = self._saving = 0.0  # seconds of this interval
        self.step_s = 0.0
        """Seconds of a step in the interval before, the same on every worker."""
        self._since = time.perf_counter()

    def add(self, step: int, values: dict[str, Tensor], images: int) -> None:
        """Count one step, in which `images` were this worker's."""
        for key, value in values.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
        self._losses.append((step, values["loss"]))
        self._images += images

    @property
    def steps(self) -> int:
        """Steps since the interval began."""
        return len(self._losses)

    def losses(self) -> list[tuple[int, float]]:
        """Each step since the interval began, with the group's mean loss in it; every worker must call it."""
        if not self._losses:
            return []
        means = self.engine.mean(torch.stack([loss for _, loss in self._losses]).double())
        return [(step, mean) for (step, _), mean in zip(self._losses, means.tolist(), strict=True)]

    def interval(self) -> dict[str, Any]:
        """The interval's `metrics` (means over steps and group), `images_per_s` and `workers`; starts the next one.

        Of each worker: `images_per_s` of its own images, `work_s` of its own in a step before the workers first meet,
        `wait_s` in a step for the loader; `saving_s` is what saving held the loop up, in all. Every worker must call
        it.
        """
        steps, names = len(self._losses), sorted(self._sums)
        means = self.engine.mean(torch.stack([self._sums[k].double() for k in names]) / steps)
        metrics = dict(zip(names, means.tolist(), strict=True))
        for key, value in metrics.items():
            self._epoch.setdefault(key, []).append(value)
        self.book()
        own = [self._images / self._busy, self.engine.work() / steps, self._waiting / steps, self._busy / steps]
        found = self.engine.gather(torch.tensor(own, dtype=torch.float64, device=self.engine.device)).tolist()
        workers = [
            {"rank": rank, "host": host, "images_per_s": rate, "work_s": work, "wait_s": wait}
            for rank, (host, (rate, work, wait, _)) in enumerate(zip(self.hosts, found, strict=True))
        ]
        self.step_s = max(step for *_, step in found)
        told = {
            "metrics": metrics,
            "images_per_s": sum(rate for rate, *_ in found),
            "workers": workers,
            "saving_s": round(self._saving, 4),
            "step_s": round(self.step_s, 6),
        }
        self._sums, self._losses, self._images = {}, [], 0
        self._busy = self._waiting = self._saving = 0.0
        return told

    def restart(self) -> None:
        """Forget the interval: its steps are made again."""
        self._sums, self._losses, self._images = {}, [], 0
        self._busy = self._waiting = self._saving = 0.0
        self.engine.work()
        self._since = time.perf_counter()

    def epoch(self) -> dict[str, float]:
        """Means over the intervals since the last call."""
        means = {key: sum(values) / len(values) for key, values in self._epoch.items()}
        self._epoch = {}
        return means

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for the loader."""
        begun = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - begun

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside (validating) out of the rate and of the seconds."""
        self.book()
        yield
        self._since = time.perf_counter()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """`paused`, and counted as held up by saving."""
        begun = time.perf_counter()
        with self.paused():
            yield
        self._saving += time.perf_counter() - begun

    def book(self) -> None:
        """Count the time up to now."""
        now = time.perf_counter()
        self._busy += now - self._since
        self.seconds += now - self._since
        self._since = now


def hosts_of(engine: Engine) -> list[str]:
    """The name of each worker's host, by rank; every worker must call it."""
    own = torch.zeros(64, dtype=torch.uint8, device=engine.device)
    name = socket.gethostname().encode()[:64]
    own[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in engine.gather(own).tolist()]
