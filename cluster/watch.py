"""What Ray Train's controller does when workers fail: tell the desk, and end the launch where it says so."""

from __future__ import annotations

import re
import time
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import UserCallback

from cluster.desk import Failure, Verdict

PATIENCE_S = 4.0  # for the one that went first to be told from those that it took along
ANSWER_S = 30.0
BROKEN = re.compile(r"gloo|nccl|connection|timed? ?out|socket|closed by peer|aborted|barrier|collective|store", re.I)


class Ended(Exception):  # noqa: N818 -- the desk has the verdict
    """No group is to be started again."""


class Watch(UserCallback):
    """Runs in the controller; an error raised here is one that Ray Train does not try again after."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train saw workers fail, and is about to start the group again."""
        failures = {rank: failure_of(error) for rank, error in worker_exceptions.items()}
        until = time.monotonic() + PATIENCE_S
        # The one that was killed may be the last of which Ray hears: by then the others show longer that they live.
        while not ray.get(self.desk.failed.remote(failures), timeout=ANSWER_S) and time.monotonic() < until:
            time.sleep(0.5)
        verdict: Verdict | None = ray.get(self.desk.judge.remote(), timeout=ANSWER_S)
        if verdict is not None:
            raise Ended(verdict.line)


def failure_of(error: Exception) -> Failure:
    """What an error that Ray Train hands on says of its worker."""
    inner = getattr(error, "health_check_failure", error)  # of Ray's own WorkerHealthCheckFailedError
    if isinstance(inner, OutOfMemoryError):
        return Failure("memory")
    if isinstance(inner, RayActorError):
        return Failure("died")
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return Failure("silent")
    said = f"{type(inner).__name__}: {last_line(inner)}"
    broken = isinstance(inner, RuntimeError) and BROKEN.search(str(inner))
    return Failure("lost" if broken else "raised", said)


def last_line(error: BaseException) -> str:
    """The last line of what an error says: of a traceback, the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no more is known"
