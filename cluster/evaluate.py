"""Share the batches of an evaluation out over workers of a Ray cluster: what one loses is measured by another."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arae.config import Recipe
from arae.errors import AraeError, Stopped, last_line
from arae.evaluate import Batches, Team
from arae.evaluate.measure import device_name
from arae.launch import Where
from arae.models.autoencoder import Packed, unpacked
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
    def __call__(self, batches: Batches) -> Iterator[Team]:
        """Start the workers, and let them go in the end. The networks go to them through Ray, the images by the batch.

        The batches of a worker that dies are given to others, and another worker is started, up to `where.restarts`
        times. Calls raise what the measuring raised; Stopped where there has been no worker for `where.wait` minutes;
        AraeError where workers die too often, or the cluster is lost.
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
            scheduling_strategy="SPREAD" if self.where.placement == "spread" else "DEFAULT",
        )(Measurer)
        sent = ray.put((batches.recipe, batches.model.packed(), batches.mean))
        crew = _Crew(lambda: made.remote(sent, "cuda" if gpu else "cpu", str(Path.cwd())), self.where)
        try:
            yield crew
        finally:
            crew.let_go()


class Measurer:
    """One worker."""

    def __init__(self, sent: tuple[Recipe, Packed, Tensor | None], device: str, cwd: str) -> None:
        if os.path.isdir(cwd):
            os.chdir(cwd)  # Ray starts workers elsewhere, and a recipe's paths may be relative
        recipe, packed, mean = sent
        self.batches = Batches(recipe, unpacked(packed).to(torch.device(device)), mean)

    def ready(self) -> str:
        """What it measures on."""
        return device_name(self.batches.model.device)

    def do(self, method: str, call: tuple[Any, ...]) -> Any:
        """Measure one batch."""
        return getattr(self.batches, method)(*call)


class _Crew:
    """The workers, and who of them is free."""

    def __init__(self, start: Any, where: Where) -> None:
        self.start, self.where, self.deaths = start, where, 0
        self.free, self.devices = deque[Any](), set[str]()
        self.coming: dict[Any, Any] = {}
        self.there: list[Any] = []
        self.gone: list[Any] = []
        self.seen = time.monotonic()
        """When there was a worker last."""
        for _ in range(where.most or where.workers or 1):
            self._add()

    def device(self) -> str:
        """See `Team`."""
        return ", ".join(sorted(self.devices))

    def do(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """See `Team`: several calls at a time, and no more than the workers can hold."""
        left, running = enumerate(calls), dict[Any, tuple[int, tuple[Any, ...], Any]]()
        again = deque[tuple[int, tuple[Any, ...]]]()
        more = True
        while True:
            while self.free and (more or again):
                one = again.popleft() if again else next(left, None)
                if one is None:
                    more = False
                    break
                place, call = one
                worker = self.free.popleft()
                running[worker.do.remote(method, tuple(map(_shipped, call)))] = place, call, worker
            if not (running or again or more):
                return
            for ref in self._looked(running):
                place, call, worker = running.pop(ref)
                try:
                    value = _value(ref)
                except _LostError as lost:
                    again.append((place, call))
                    self._mourn(worker, lost)
                    continue
                self.free.append(worker)
                yield place, value

    def let_go(self) -> None:
        """End all workers."""
        import ray

        for worker in (*self.there, *self.coming.values()):
            with suppress(Exception):  # whatever Ray lacks by now, what ends the evaluation is said elsewhere
                ray.kill(worker)

    def _looked(self, running: Iterable[Any]) -> list[Any]:
        """Which calls have ended by now, or end within a moment; newcomers are made free on the way."""
        import ray
        from ray.exceptions import RayError

        refs = [*self.coming, *running]
        try:
            ended = ray.wait(refs, num_returns=len(refs), timeout=0)[0] or ray.wait(refs, timeout=LOOK_S)[0]
        except RayError as error:
            raise AraeError(f"the Ray cluster does not answer any more ({last_line(error)})") from None
        for ref in [ref for ref in ended if ref in self.coming]:
            worker = self.coming.pop(ref)
            try:
                self.devices.add(_value(ref))
            except _LostError as lost:
                self._mourn(worker, lost)
                continue
            self.there.append(worker)
            self.free.extend([worker] * AHEAD)
        self._bear()
        return [ref for ref in ended if ref not in self.coming and ref in running]

    def _bear(self) -> None:
        """Stopped where there has been no worker for too long."""
        if self.there:
            self.seen = time.monotonic()
        elif time.monotonic() - self.seen > 60 * self.where.wait:
            said = room_for(self.where)[1]
            raise Stopped(f"gave up after {self.where.wait:g} min: {said}; the same command goes on")

    def _mourn(self, worker: Any, lost: _LostError) -> None:
        """A worker has died: another in its place, once, however many of its calls are lost."""
        self.free = deque(one for one in self.free if one is not worker)
        if any(one is worker for one in self.gone):
            return
        self.gone.append(worker)
        self.there = [one for one in self.there if one is not worker]
        self.deaths += 1
        if self.deaths > self.where.restarts:
            raise AraeError(
                f"workers of the evaluation died {self.deaths} times ({lost}); Ray's logs have the whole of it"
            )
        self._add()

    def _add(self) -> None:
        worker = self.start()
        self.coming[worker.ready.remote()] = worker


class _LostError(Exception):
    """A call whose worker is gone."""


def _value(ref: Any) -> Any:
    """What a call returned; what it raised, raised here."""
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError

    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise _LostError(last_line(error)) from None
    except RayError as error:
        raise AraeError(
            f"a worker of the evaluation failed ({last_line(error)}); Ray's logs have the whole of it"
        ) from None


def _shipped(value: Any) -> Any:
    """A tensor of its own on the CPU: of a part of a larger one all would be sent."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
