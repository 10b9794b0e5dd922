"""Share the batches of an evaluation out over workers of a Ray cluster: what one loses is measured by another."""

from __future__ import annotations

import copy
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from arae.errors import AraeError, Stopped, last_line
from arae.evaluate import Batches, Do
from arae.launch import Where
from cluster.connect import address_of, connect
from cluster.launch import room_for, wants_gpu

LOOK_S = 0.5  # between two looks, so that a stop is heard
AHEAD = 2  # batches that a worker holds: one at work, one that waits


class OnCluster:
    """Workers for `arae.evaluate.evaluate`: `where.workers` of them, or as many up to `where.most` as find room."""

    def __init__(self, where: Where) -> None:
        assert where.workers is not None
        self.where = where

    @contextmanager
    def __call__(self, batches: Batches) -> Iterator[Do]:
        """Start the workers, and let them go in the end. The networks go to them through Ray, the images by the batch.

        A worker that dies is started anew, up to `where.restarts` times, and its batches are measured again. Calls
        raise what the measuring raised; Stopped where no worker finds room within `where.wait` minutes; AraeError
        where one dies too often.
        """
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        connect(self.where)
        import ray  # not before: it reads its settings as it is imported

        for number, handler in handlers.items():  # Ray has put its own in their place
            signal.signal(number, handler)
        gpu = wants_gpu(self.where, ray.cluster_resources(), alone=address_of(self.where) is None)
        made = ray.remote(
            num_cpus=self.where.cpus or 1,
            num_gpus=int(gpu),
            max_restarts=self.where.restarts,
            max_task_retries=self.where.restarts,
            scheduling_strategy="SPREAD",
        )(Measurer)
        networks = ray.put(_bare(batches))
        count = self.where.most or self.where.workers or 1
        workers: list[Any] = [made.remote(networks, "cuda" if gpu else "cpu") for _ in range(count)]
        try:
            yield _Crew(workers, self.where).do
        finally:
            for worker in workers:
                ray.kill(worker)


class Measurer:
    """One worker."""

    def __init__(self, batches: Batches, device: str) -> None:
        batches.model.to(torch.device(device))
        self.batches = batches

    def ready(self) -> None:
        """Return once there is a worker."""

    def do(self, method: str, call: tuple[Any, ...]) -> Any:
        """Measure one batch."""
        return getattr(self.batches, method)(*call)


class _Crew:
    """Who of the workers is free; those that find no room yet are not waited for while others are there."""

    def __init__(self, workers: list[Any], where: Where) -> None:
        self.where, self.free = where, deque[Any]()
        self.coming = {worker.ready.remote(): worker for worker in workers}

    def do(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """As `Do`; several calls at a time, and no more than the workers can hold."""
        left, running, found, sent, given = iter(calls), dict[Any, tuple[int, Any]](), dict[int, Any](), 0, 0
        more = True
        while more or running or found:
            while more and self.free and len(found) < AHEAD * len(self.free) + len(running) + 1:
                call = next(left, None)
                if call is None:
                    more = False
                    break
                worker = self.free.popleft()
                running[worker.do.remote(method, tuple(map(_shipped, call)))] = sent, worker
                sent += 1
            while given in found:
                yield found.pop(given)
                given += 1
            if more and not self.free and not running:
                self._await_one()
            self._collect(running, found)

    def _collect(self, running: dict[Any, tuple[int, Any]], found: dict[int, Any]) -> None:
        """What has come in by now, or comes within a moment."""
        import ray

        if not running and not self.coming:
            return
        for ref in ray.wait([*running, *self.coming], timeout=LOOK_S if running else 0)[0]:
            if ref in self.coming:
                self.free.extend([self.coming.pop(ref)] * AHEAD)
                continue
            index, worker = running.pop(ref)
            found[index] = _value(ref)
            self.free.append(worker)

    def _await_one(self) -> None:
        """Return when there is a worker."""
        import ray

        until = time.monotonic() + 60 * self.where.wait
        while not ray.wait(list(self.coming), timeout=LOOK_S)[0]:
            if time.monotonic() > until:
                said = room_for(self.where)[1]
                raise Stopped(f"gave up after {self.where.wait:g} min: {said}; the same command goes on")


def _value(ref: Any) -> Any:
    """What a call returned; what it raised, raised here."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise AraeError(f"a worker of the evaluation died too often ({last_line(error)}); see Ray's logs") from None


def _bare(batches: Batches) -> Batches:
    """As it goes to the workers: on the CPU, and with nobody who listens."""
    sent = copy.copy(batches)
    sent.told = None
    sent.model = copy.deepcopy(batches.model).to(torch.device("cpu"))
    return sent


def _shipped(value: Any) -> Any:
    """A tensor of its own on the CPU: of a part of a larger one all would be sent."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
