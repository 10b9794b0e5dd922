"""How fast a group of workers is: the time left, who is slow, how long is waited for the loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 20  # points that the time left is estimated from
SLOW = 1.25  # times the group's median work, from which on a worker is a straggler
MOST_NAMED = 3  # stragglers in one line


class Pace:
    """The time that is left, from the newest points of a count that grows."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def left(self, done: float, total: float, now: float) -> float | None:
        """Seconds until `done` reaches `total`; None before there are two points to tell from."""
        if self._points and (done < self._points[-1][0] or now < self._points[-1][1]):
            self._points.clear()  # resumed from an earlier step
        self._points.append((done, now))
        (first, start), (last, end) = self._points[0], self._points[-1]
        return (total - last) * (end - start) / (last - first) if last > first else None


@dataclass(frozen=True)
class Worker:
    """One worker over an interval; the seconds are means a step."""

    rank: int
    host: str
    images_per_s: float
    """Of its own images."""
    work_s: float
    """Of its own work, before the workers first meet in a step."""
    wait_s: float
    """For the loader."""
    slowness: float
    """Its work on an image over the group's median: 1 is like the others. Shares of a batch may be uneven."""

    @property
    def is_straggler(self) -> bool:
        """Whether the group waits for it."""
        return self.slowness > SLOW

    def named(self) -> str:
        """`worker 1 on b (1.8×)`."""
        return f"worker {self.rank} on {self.host} ({self.slowness:.1f}×)"


@dataclass(frozen=True)
class Group:
    """What an `interval` event says of the workers; of logs that are older than these keys, nothing."""

    images_per_s: float | None
    """Of all workers together."""
    workers: tuple[Worker, ...]
    """By rank."""
    loader_wait: float | None
    """Share of the steps' time that a worker waits for the loader, the mean over the workers."""

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Group:
        """Read an event. Raises KeyError, TypeError or ValueError where it is not one of the loop's."""
        total = event.get("images_per_s")
        workers = _workers(event.get("workers") or ())
        step_s = event.get("step_s")
        waits = [worker.wait_s for worker in workers]
        share = min(1.0, sum(waits) / len(waits) / float(step_s)) if waits and step_s else None
        return cls(None if total is None else float(total), workers, share)

    @property
    def stragglers(self) -> list[Worker]:
        """The slowest first."""
        return sorted((w for w in self.workers if w.is_straggler), key=lambda w: -w.slowness)

    @property
    def rates(self) -> list[float]:
        """Each worker's images a second."""
        return [worker.images_per_s for worker in self.workers]

    def words(self) -> list[str]:
        """`["840 images/s by 2 workers (410–430 each)", "loader wait 3 %", "slow: worker 1 on b (1.8×)"]`."""
        words = []
        if self.images_per_s is not None:
            words.append(f"{self.images_per_s:.0f} images/s" + self._shared())
        if self.loader_wait is not None and round(100 * self.loader_wait) >= 1:
            words.append(f"loader wait {100 * self.loader_wait:.0f} %")
        if slow := self.stragglers:
            more = f" and {len(slow) - MOST_NAMED} more" if len(slow) > MOST_NAMED else ""
            words.append("slow: " + ", ".join(worker.named() for worker in slow[:MOST_NAMED]) + more)
        return words

    def _shared(self) -> str:
        if len(self.workers) < 2:
            return ""
        low, high = f"{min(self.rates):.0f}", f"{max(self.rates):.0f}"
        return f" by {len(self.workers)} workers ({low if low == high else f'{low}–{high}'} each)"


def _workers(told: Sequence[Mapping[str, Any]]) -> tuple[Worker, ...]:
    costs = [float(one["work_s"]) / float(one["images_per_s"]) if one["images_per_s"] else 0.0 for one in told]
    middle = median(costs) if costs else 0.0
    workers = [
        Worker(
            int(one["rank"]),
            str(one["host"]),
            float(one["images_per_s"]),
            float(one["work_s"]),
            float(one["wait_s"]),
            cost / middle if middle else 1.0,
        )
        for one, cost in zip(told, costs, strict=True)
    ]
    return tuple(sorted(workers, key=lambda worker: worker.rank))


def clock(seconds: float) -> str:
    """`2:10`, or `1:02:10` from an hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def restart_words(event: Mapping[str, Any]) -> str:
    """A `restart` event in one line: what happened, from where on, by how many workers."""
    reason = " ".join(str(event["reason"]).split())
    workers = event.get("world_size")
    by = f" by {workers} worker{'s' * (workers != 1)}" if workers else ""
    onward = f"; goes on from step {event['step']}{by}" if event.get("step") is not None else by and f"; goes on{by}"
    return f"{reason}{onward}"


def group_words(event: Mapping[str, Any]) -> str:
    """A `group` event in one line: `2 workers on a, b: cpu, fp32, ddp`."""
    n, hosts = int(event["world_size"]), [str(host) for host in event.get("hosts") or ()]
    distinct = list(dict.fromkeys(hosts))
    named = ", ".join(distinct[:8]) + (f" and {len(distinct) - 8} more hosts" if len(distinct) > 8 else "")
    kind = ", ".join(str(event[key]) for key in ("device", "precision", "engine") if event.get(key))
    return f"{n} worker{'s' * (n != 1)}" + (f" on {named}" if named else "") + (f": {kind}" if kind else "")
