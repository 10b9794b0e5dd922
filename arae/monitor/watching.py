"""Statuses of runs in words: all of one, a table of many; and a run that goes on before one's eyes."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from arae.monitor.events import tail
from arae.monitor.pace import Group, clock, group_words
from arae.monitor.progress import Progress
from arae.monitor.status import State, Status, is_held
from arae.runs import RunFolder
from arae.storage import fetched, glance

MOST_RESTARTS = 5  # that are told one by one, the newest
MOST_WORKERS = 16  # likewise
LOOK_S = 2.0
MIB = 2**20


def ago(seconds: float | None) -> str:
    """`5 s ago`, `2:10 ago`, `3 days ago`."""
    if seconds is None:
        return "at an unknown time"
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s ago"
    return f"{clock(seconds)} ago" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days ago"


def lines(status: Status, now: float | None = None) -> list[str]:
    """A run in some lines, as `arae status` shows it."""
    now = time.time() if now is None else now
    rows = [
        ("trials", _trials(status)),
        ("stage", "" if status.trials else _progress(status)),
        ("training", _numbers(status.metrics)),
        ("held out", _validation(status)),
        ("records", _numbers(status.records)),
        ("speed", "  ".join(_group(status).words()) if status.standing != "finished" else ""),
        *_workers(status),
        ("group", group_words(status.group) if status.group else ""),
        ("states", _states(status)),
        *_restarts(status),
        ("MLflow", f"{status.pending} operations not sent yet; `arae ui` sends them" if status.pending else ""),
    ]
    said = [f"  {label:<9} {text}".rstrip() for label, text in rows if text]
    return [_headline(status, now), *said]


def follow(folder: RunFolder, stream: TextIO) -> None:
    """Show the progress of a run that another command is at work on, from here on until that command ends."""
    ended = threading.Event()
    with Progress(stream=stream) as progress:
        reader = threading.Thread(target=tail, args=(folder.log, progress, ended), daemon=True)
        reader.start()
        while is_held(folder, time.time()):
            time.sleep(LOOK_S)
            fetched(folder.path, glance)  # of a run at a URL this is a copy
        ended.set()
        reader.join()


def table(statuses: Sequence[Status], now: float | None = None) -> list[str]:
    """Many runs, a line each, under a heading."""
    now = time.time() if now is None else now
    rows = [("run", "state", "stage", "step", "left", "heard", "numbers")]
    for one in statuses:
        step = f"{one.step}/{one.steps} ({_percent(one)})" if one.steps and one.standing != "finished" else ""
        left = clock(one.eta_s) if one.standing == "running" and one.eta_s is not None else ""
        heard = ago(now - one.heard) if one.heard is not None else ""
        stage = one.stage if one.standing != "finished" or one.trials else " and ".join(one.finished)
        numbers = _numbers(one.main) or one.why or _trials(one)
        rows.append((one.name, one.standing, stage or "", step, left, heard, numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _headline(status: Status, now: float) -> str:
    heard = f", last heard {ago(now - status.heard)}" if status.heard is not None else ""
    meaning = {
        "silent": " (a command is at work on it, and says nothing)",
        "killed": " (it ended without a word: the same command goes on)",
        "new": " (nothing is trained yet)",
    }.get(status.standing, "")
    why = f": {status.why}" if status.why else ""
    return f"{status.path}: {status.standing}{meaning}{heard}{why}"


def _progress(status: Status) -> str:
    if status.standing == "finished" or status.stage is None:
        return " and ".join(f"{stage} trained" for stage in status.finished)
    left = f", {clock(status.eta_s)} left" if status.eta_s is not None and status.standing == "running" else ""
    done = f" step {status.step} of {status.steps} ({_percent(status)})" if status.steps else ""
    return f"{status.stage}{done}{left}"


def _trials(status: Status) -> str:
    """`3 finished, 1 failed, 2 begun, of 24`."""
    counted = ", ".join(f"{number} {how}" for how, number in (status.trials or {}).items() if number)
    return f"{counted}, of {status.steps}" if counted and status.steps else counted


def _percent(status: Status) -> str:
    return f"{100 * (status.fraction or 0):.0f} %"


def _validation(status: Status) -> str:
    numbers = _numbers({name: one for name, one in status.validation.items() if name not in status.metrics})
    return f"{numbers}  (step {status.validation_step})" if numbers else ""


def _group(status: Status) -> Group:
    return Group(status.images_per_s, tuple(status.workers), status.loader_wait)


def _workers(status: Status) -> list[tuple[str, str]]:
    if len(status.workers) < 2 or status.standing == "finished":
        return []
    shown = status.workers if len(status.workers) <= MOST_WORKERS else _group(status).stragglers[:MOST_WORKERS]
    return [
        (
            "" if number else "workers",
            f"{one.rank} on {one.host}: {one.images_per_s:.0f} images/s, a step {one.work_s:.3g} s of own work and "
            f"{one.wait_s:.3g} s of waiting for the loader" + (f"  SLOW, {one.slowness:.1f}×" * one.is_straggler),
        )
        for number, one in enumerate(shown)
    ]


def _states(status: Status) -> str:
    told = []
    if status.newest_state is not None:
        told.append(f"newest {_state(status.newest_state)}, {status.newest_state.bytes / MIB:.1f} MiB")
    if status.best_state is not None:
        told.append(f"best {_state(status.best_state)}")
    return "; ".join(told)


def _state(state: State) -> str:
    return f"{state.stage} step {state.step} ({ago(state.age_s)})"


def _restarts(status: Status) -> list[tuple[str, str]]:
    if not status.restarts:
        return []
    newest = list(zip(status.restart_times, status.restarts, strict=True))[-MOST_RESTARTS:]
    dated = [("", f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}  {why}") for at, why in newest]
    return [("restarts", str(len(status.restarts))), *dated]


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, int | float))
