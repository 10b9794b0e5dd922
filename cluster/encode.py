"""Encode shards as tasks of a Ray cluster: whatever a worker or a node loses is given to another."""

from __future__ import annotations

import errno
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from arae.data.shards import Job
from arae.data.sources import LostImageError
from arae.errors import AraeError
from arae.launch import Where
from cluster.connect import connect

TRIES = 4  # of one shard
LOOK_S = 0.5  # between two calls of `done`, so that a stop is heard
PROBE_S = 60.0  # for a node to start a worker and answer


class OnCluster:
    """A runner for `arae.data.encode.encode`: `where.workers` shards at a time, one core each."""

    def __init__(self, where: Where) -> None:
        assert where.workers is not None
        self.where = where
        self.workers = where.workers

    def __call__(self, jobs: Sequence[Job], done: Callable[[int], None]) -> None:
        """Run every job somewhere. A shard whose worker, node or storage failed is tried again, up to four times.

        Raises InputError where a node does not see the storage, AraeError where workers keep dying, else what
        `Job.run` and `Job.check_place` raised.
        """
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        connect(self.where)
        import ray  # not before: it reads its settings as it is imported

        for number, handler in handlers.items():  # Ray has put its own in their place
            signal.signal(number, handler)
        _probe(jobs[0])
        task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(encode_shard)
        waiting, running, failures, finished = list(reversed(jobs)), dict[Any, Job](), Counter[tuple[int, int]](), 0
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    job = waiting.pop()
                    running[task.remote(job)] = job
                for ref in ray.wait(list(running), timeout=LOOK_S)[0]:
                    job = running.pop(ref)
                    try:
                        ray.get(ref)
                        finished += len(job.found.labels)
                    except Exception as error:  # noqa: BLE001 -- sorted out there, and raised again where it must be
                        failures[job.span] += 1
                        _judge(error, failures[job.span], job)
                        waiting.append(job)
                done(finished)
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def encode_shard(job: Job) -> None:
    """Body of a task. It may run on a node that was not there when all were asked."""
    job.check_place()
    job.run(threads=1)


def see_storage(job: Job) -> None:
    """Body of the task that every node is asked with."""
    job.check_place()


def _probe(job: Job) -> None:
    """InputError where a node that can take shards does not see the images or the shards' folder."""
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(see_storage)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    asked = [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in nodes]
    refs = [each.remote(job) for each in asked]
    for ref in ray.wait(refs, num_returns=len(refs), timeout=PROBE_S)[0]:
        try:
            ray.get(ref)
        except RayTaskError as error:
            raise error.cause from None
        except RayError:  # the node has gone, or its worker: a task that lands there asks again
            continue


def _judge(error: Exception, failures: int, job: Job) -> None:
    """Raise what ends the whole; return where the shard may be tried again."""
    from ray.exceptions import RayError, RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error
    passing = isinstance(cause, (OSError, LostImageError, RayError)) and not _full(cause)
    if passing and failures < TRIES:
        return
    if isinstance(cause, RayError):
        said = " ".join(str(cause).split())[:200]
        raise AraeError(f"the worker of images {job.span[0]} to {job.span[1] - 1} died {failures} times ({said})")
    raise cause from None


def _full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
