"""CPU seconds of a command and of everything it starts, over time, from `/proc`: by what the processes are."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

TICK = 1 / os.sysconf("SC_CLK_TCK")
Kind = Callable[[int, str], str]
"""What a process (its id, its command line) is counted as."""


@dataclass(frozen=True)
class Process:
    """One process at one moment."""

    pid: int
    parent: int
    started: int
    """Ticks since the machine's start: with the id, a process' identity."""
    cpu: float
    """Seconds of its own threads."""


@dataclass
class Account:
    """CPU seconds of a group of processes by kind, sampled; of those that are gone, what they had last counts on."""

    kind: Kind
    times: list[float] = field(default_factory=list)
    """Of the samples: seconds of `time.time`."""
    totals: list[dict[str, float]] = field(default_factory=list)
    """Of the samples: CPU seconds since the beginning, by kind."""
    _seen: dict[tuple[int, int], tuple[str, float]] = field(default_factory=dict)

    def sample(self, roots: Iterable[int]) -> None:
        """Count the trees under these processes, and orphans that were in them before."""
        now, processes = time.time(), running()
        known = {pid for pid, started in self._seen if processes.get(pid, _NONE).started == started}
        for pid in descendants(processes, {*roots, *known}):
            one = processes[pid]
            key = (pid, one.started)
            words = command_line(pid)  # each time: a worker takes its name after it has started; empty as it goes
            self._seen[key] = (self.kind(pid, words) if words else self._seen.get(key, ("other",))[0], one.cpu)
        sums: dict[str, float] = {}
        for kind, cpu in self._seen.values():
            sums[kind] = sums.get(kind, 0.0) + cpu
        self.times.append(now)
        self.totals.append(sums)

    def between(self, begin: float, end: float) -> dict[str, float]:
        """CPU seconds from one moment (`time.time`) to another, by kind, between samples in proportion."""
        before, after = self._at(begin), self._at(end)
        return {kind: seconds - before.get(kind, 0.0) for kind, seconds in after.items()}

    def _at(self, moment: float) -> dict[str, float]:
        right = min(max(bisect_left(self.times, moment), 1), len(self.times) - 1)
        low, high = self.times[right - 1], self.times[right]
        share = (moment - low) / (high - low)
        return {
            kind: (1 - share) * self.totals[right - 1].get(kind, 0.0) + share * seconds
            for kind, seconds in self.totals[right].items()
        }


class Watch:
    """Samples in a thread while it is a context; the processes are asked for anew each time."""

    def __init__(self, kind: Kind, roots: Callable[[], Iterable[int]], every: float) -> None:
        """`every`: seconds between samples."""
        self.account = Account(kind)
        self._roots, self._every, self._done = roots, every, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self.account.sample(self._roots())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._every):
            self.account.sample(self._roots())


def running(proc: Path = Path("/proc")) -> dict[int, Process]:
    """Every process that can be seen."""
    found = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:  # gone in the meantime
                continue
            rest = text[text.rindex(")") + 2 :].split()
            # utime, stime and starttime: fields 14, 15 and 22 of proc(5), of which the state, rest[0], is field 3.
            found[int(entry.name)] = Process(
                int(entry.name), int(rest[1]), int(rest[19]), TICK * (int(rest[11]) + int(rest[12]))
            )
    return found


def descendants(processes: Mapping[int, Process], roots: Iterable[int]) -> set[int]:
    """The roots that are there, and all that they started."""
    children: dict[int, list[int]] = {}
    for one in processes.values():
        children.setdefault(one.parent, []).append(one.pid)
    found: set[int] = set()
    left = [pid for pid in roots if pid in processes]
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, [])
    return found


def command_line(pid: int) -> str:
    """The words of a process, empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


_NONE = Process(0, 0, -1, 0.0)
