"""Train a recipe through Ray Train. The run folder stays authoritative: Ray only starts and watches the workers."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from arae.config import Recipe
from arae.errors import AraeError, InputError, Stopped, last_line
from arae.launch import Where
from arae.runs import RunFolder
from arae.train.log import Listener
from arae.train.state import list_states
from cluster.connect import address_of, connect
from cluster.desk import News, open_desk

WATCH_S = 0.5
ANSWER_S = 60.0
DEAF_S = 5.0  # without a whole group: there is none that a stop could reach
TROUBLES = 3  # errors of Ray Train's own, in a row and without a group between them
GRACE_S = 10.0  # for the group to end by itself once one of its workers has said how
LET_GO_S = 5.0
ENDING_S = 20.0  # for Ray Train to end once it is told to; its controller may just be starting
LACKING_S, STARTING_S = 10.0, 60.0  # of waiting for workers, after which it is said: without room for them, and with it


def launch(recipe: Recipe, folder: RunFolder, where: Where, listener: Listener, stop: Callable[[], bool]) -> None:
    """Run `cluster.worker.loop` on the workers until the recipe is trained, over failures of workers and machines.

    Raises what a worker found to be the end (InputError, Stopped, AraeError), wherever it was raised; Stopped where
    `stop` asked for it, where the workers can't be had within `where.wait` minutes, and where more failed from outside
    than `where.restarts` while a good state is kept; AraeError otherwise, also where it was the training's own error:
    that would come again.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    connect(where)
    import ray
    from ray.exceptions import RayError

    from cluster.trainer import make_trainer

    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray has put its own in their place, which save nothing
            signal.signal(number, handler)
    desk = open_desk()
    with tempfile.TemporaryDirectory(prefix="arae-ray-") as notes:  # Ray's own, which nothing here goes by
        gpu = wants_gpu(where, ray.cluster_resources(), alone=address_of(where) is None)
        make = partial(make_trainer, recipe, folder, where, desk, notes, gpu=gpu)
        try:
            news, error = _supervise(make, desk, Patience(where, listener), listener, stop)
        except RayError as lost:
            raise _kept(folder, f"the Ray cluster does not answer any more ({last_line(lost)})") from None
    if news.verdict is not None:
        raise news.verdict.error()
    if error is not None:
        raise _error(error, news, folder, where) from None


def _supervise(
    make: Callable[[], Any], desk: Any, patience: Patience, listener: Listener, stop: Callable[[], bool]
) -> tuple[News, Exception | None]:
    """Ray Train until it is done, or has failed for good; the last news, and its error.

    It starts groups anew itself after failures of workers, but gives up where one dies while a group is being set up.
    """
    import ray

    in_a_row = groups = 0
    while True:
        outcome: dict[str, Exception] = {}
        # Ray Train takes SIGINT for itself when it runs in the main thread; a stop must save first.
        thread = threading.Thread(target=_fit, args=(make(), outcome), daemon=True)
        thread.start()
        try:
            news = _follow(thread, desk, patience, listener, stop)
        finally:
            _end(thread, desk)
        error = outcome.get("error")
        if error is None or news.verdict is not None or getattr(error, "worker_failures", None):
            return news, error
        in_a_row, groups = 1 if news.groups > groups else in_a_row + 1, news.groups
        if in_a_row >= min(TROUBLES, 1 + patience.where.restarts):
            return news, error
        ray.get(desk.trouble.remote(_trouble(error)), timeout=ANSWER_S)


def _follow(
    thread: threading.Thread, desk: Any, patience: Patience, listener: Listener, stop: Callable[[], bool]
) -> News:
    """Hand on what the desk hears until Ray Train ends; returns the last of it."""
    import ray

    judged = 0.0
    while True:
        ended, stopping = not thread.is_alive(), stop()
        news: News = ray.get(desk.collect.remote(stop=stopping), timeout=ANSWER_S)
        for event in news.events:
            listener(event)
        judged = judged or (time.monotonic() if news.verdict else 0.0)
        if ended:
            return news
        if judged and time.monotonic() - judged > GRACE_S:
            return news  # others still wait for the one that has left, and would until their time is up
        if not judged:
            patience.bear(news, stopping=stopping)
        thread.join(WATCH_S)


class Patience:
    """Waits for workers, says so, and ends."""

    def __init__(self, where: Where, listener: Listener) -> None:
        self.where, self.listener = where, listener
        self._told = False

    def bear(self, news: News, *, stopping: bool) -> None:
        """Stopped where there has been no whole group for `where.wait` minutes, or is none to hear that it is over."""
        if stopping and news.waiting_s > DEAF_S:
            raise Stopped("stopped while no workers were at work; the same command goes on from what is kept")
        if news.waiting_s < min(LACKING_S, 60 * self.where.wait):
            self._told = False
            return
        room, said = room_for(self.where)
        if news.waiting_s > 60 * self.where.wait:
            lost = f"{news.reason}; " if news.reason else ""
            raise Stopped(f"{lost}gave up after {self.where.wait:g} min: {said}; the same command goes on")
        lacking = room < (self.where.workers or 1) or news.waiting_s > STARTING_S
        if lacking and not self._told:
            self.listener({"event": "note", "time": time.time(), "text": f"waiting for workers: {said}"})
            self._told = True


def _end(thread: threading.Thread, desk: Any) -> None:
    """Return when Ray Train's thread has ended, and see that it does: its waiting for workers has no end of its own.

    Ray ends the whole process, with a code and a line of its own, where a thread still uses what was shut down.
    """
    import ray
    from ray.exceptions import RayError

    from cluster.trainer import end_controller

    until = time.monotonic() + ENDING_S
    while thread.is_alive() and time.monotonic() < until:
        with suppress(RayError):
            begun: Any = ray.get(desk.controller.remote(), timeout=ENDING_S)
            if begun is not None:
                end_controller(*begun)
        thread.join(WATCH_S)
    with suppress(RayError):
        ray.get(desk.ended.remote(), timeout=LET_GO_S)


def _fit(trainer: Any, outcome: dict[str, Exception]) -> None:
    """Body of the thread: `outcome` gets `error` where there is one."""
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001 -- it crosses to the main thread, which raises it
        outcome["error"] = error


def wants_gpu(where: Where, has: Mapping[str, float], *, alone: bool) -> bool:
    """Whether the workers get a GPU each; `has`: the cluster's resources; `alone`: it is this machine's alone.

    A cluster of several machines that has any GPU is meant for them: workers then wait for theirs rather than train in
    another precision on a CPU. Raises InputError where this machine alone has fewer than are asked for.
    """
    workers, there = where.workers or 1, has.get("GPU", 0)
    asked = where.gpus if where.gpus is not None else None if where.device is None else int(where.device != "cpu")
    if asked is None:
        return there >= workers if alone else there > 0
    if asked and alone and there < workers:
        raise InputError(f"--workers {workers} with a GPU each: this machine has {there:g}")
    return bool(asked)


def room_for(where: Where) -> tuple[int, str]:
    """For how many workers the cluster has room, others left out of account; and in words, with how many are wanted."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    need = {"CPU": where.cpus or 1}
    if wants_gpu(where, ray.cluster_resources(), alone=False):
        need["GPU"] = 1
    room = sum(int(min(has.get(what, 0) // much for what, much in need.items())) for has in nodes)
    each = " and ".join(f"{much} {what}" for what, much in need.items())
    return room, (
        f"{where.workers} are wanted, of {each} each; the {len(nodes)} host(s) that answer have room for {room}, "
        "less what other jobs hold"
    )


def _error(error: Exception, news: News, folder: RunFolder, where: Where) -> AraeError:
    """What ends the command where no worker left a verdict."""
    if not getattr(error, "worker_failures", None):
        return _kept(folder, f"{_trouble(error)} (more than once in a row)")
    said = f"{news.reason} (after {where.restarts} restarts)" if where.restarts else news.reason
    if news.own:
        return AraeError(f"training failed: {said}; Ray's logs have the whole of it")
    return _kept(folder, said)


def _trouble(error: Exception) -> str:
    """An error of Ray Train's own in one line."""
    from ray.exceptions import RayActorError

    inner = getattr(error, "controller_failure", error)
    if isinstance(inner, RayActorError):
        return "a worker was killed or crashed while the group was being set up"
    return f"Ray Train failed: {type(inner).__name__}: {last_line(inner)}"


def _kept(folder: RunFolder, said: str) -> AraeError:
    """Stopped where there is something to go on from after what came from outside; AraeError where there is nothing."""
    states = list_states(folder.state)
    if states or (folder.model / "config.json").is_file():
        kept = f"the {states[-1].stage}'s state of step {states[-1].step}" if states else "what was finished"
        return Stopped(f"{said}; {kept} is kept, and the same command goes on from there")
    return AraeError(f"training failed: {said}; there was no state yet")
