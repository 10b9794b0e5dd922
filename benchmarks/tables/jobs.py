"""Runs side by side: processes of one machine that share out its cores, and an encoder that is trained once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from arae.adopt import has_encoder
from arae.errors import AraeError, InputError, Stopped
from arae.launch import Where, stop_requested
from arae.runs import RunFolder
from arae.storage import runs_place
from arae.train.networks import RUN
from benchmarks.tables.definition import ScaleName, Trip
from benchmarks.tables.run import ROOT, done, run_trip

_POLL = 0.2  # seconds between looks at the processes
_EXITS: dict[int, type[AraeError]] = {InputError.exit_code: InputError, Stopped.exit_code: Stopped}


@dataclass(frozen=True)
class Plan:
    """What the processes are told: which table, at which scale, with which overrides."""

    table: str
    scale: ScaleName
    overrides: tuple[str, ...]
    where: Where

    def command(self, trip: Trip) -> list[str]:
        """The command line of one run's process."""
        device = ["--device", self.where.device] if self.where.device else []
        words = [self.table, self.scale, trip.key, *self.overrides, *device]
        return [sys.executable, "-m", "benchmarks.tables", "run", *words]


def default_jobs(where: Where) -> int:
    """Two on a CPU with two cores or more: two processes of one thread are faster than one of two; else one."""
    alone = where.workers is not None or where.torch_device().type == "cuda"
    return 1 if alone else min(2, len(os.sched_getaffinity(0)))


def run_all(trips: Sequence[Trip], plan: Plan, jobs: int) -> None:
    """Train and measure every run, `jobs` at a time; raises what the first that fails raises, when all have ended."""
    waiting = [trip for trip in trips if not done(trip)]
    if jobs == 1 or len(waiting) == 1:
        for trip in waiting:
            run_trip(trip, plan.where)
        return
    if plan.where.workers is not None:
        raise InputError(f"--jobs {jobs}: runs share out the cores of this machine; leave it out with --workers")
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    with stop_requested() as stop:
        pool = _Pool(plan, threads)
        while waiting or pool.running:
            if stop() or pool.failed:
                waiting.clear()
                pool.stop()
            while len(pool.running) < jobs and (ready := next_ready(waiting, pool.trips)):
                waiting.remove(ready)
                pool.start(ready)
            time.sleep(_POLL)
            pool.look()
        if stop():
            raise Stopped("stopped; the same command goes on from there")
    if pool.failed:
        raise pool.failed[0]


def next_ready(waiting: Sequence[Trip], running: Sequence[Trip]) -> Trip | None:
    """A run that need not wait: nobody is training its encoder just now, and what it starts from is there."""
    at_work = {trip.recipe.stage_digest("encoder") for trip in running if not _trained(trip)}
    to_come = {RUN + trip.recipe.name for trip in (*waiting, *running) if not _trained(trip)}
    for trip in waiting:
        start = trip.recipe.encoder.weights
        if trip.recipe.stage_digest("encoder") not in at_work and start not in to_come:
            return trip
    return None


def _trained(trip: Trip) -> bool:
    return has_encoder(trip.recipe, RunFolder.of(trip.recipe))


@dataclass
class _Pool:
    """The processes at work, what they say, and how they ended."""

    plan: Plan
    threads: int
    running: dict[subprocess.Popen[str], Trip] = field(default_factory=dict)
    failed: list[AraeError] = field(default_factory=list)
    last: dict[str, str] = field(default_factory=dict)
    asked: bool = False

    @property
    def trips(self) -> list[Trip]:
        return list(self.running.values())

    def start(self, trip: Trip) -> None:
        """A process of its own, which ends with this one: its standard input is closed then."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "ARAE_RUNS": runs_place(), "PYTHONPATH": path}
        process = subprocess.Popen(
            self.plan.command(trip),
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.running[process] = trip
        assert process.stdout is not None
        threading.Thread(target=self._relay, args=(trip.name, process.stdout), daemon=True).start()

    def look(self) -> None:
        """Take note of those that have ended."""
        for process, trip in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[process]
            assert process.stdin is not None
            process.stdin.close()
            if code and not self.asked:
                said = self.last.get(trip.name, "").removeprefix("arae: ") or "it said nothing"
                made = _EXITS.get(code, AraeError)
                self.failed.append(made(said if made is not AraeError else f"{trip.name} ended with {code}: {said}"))

    def stop(self) -> None:
        """Ask all that run to save and end; once."""
        if not self.asked:
            self.asked = True
            for process in self.running:
                process.send_signal(signal.SIGTERM)

    def _relay(self, name: str, stream: IO[str]) -> None:
        """What a process says, each line under its run's name."""
        with stream:
            for line in stream:
                if text := line.rstrip():
                    self.last[name] = text
                    print(f"[{name}] {text}", file=sys.stderr, flush=True)


def end_with_parent() -> None:
    """From now on end by SIGTERM, with a state, when whoever started this process has gone."""

    def watch() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
