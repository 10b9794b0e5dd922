"""A sweep, from the driver's side: Ray Tune runs the trials, the sweep's journal keeps what counts, MLflow is told."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml

from arae.check import check
from arae.config import Recipe, digest_of
from arae.errors import AraeError, InputError, Stopped, last_line
from arae.files import write_text
from arae.launch import Where, stop_requested
from arae.runs import RunFolder
from arae.session import Session, session
from arae.tracking import Family
from tune.book import Book, callback
from tune.delivery import Delivery
from tune.journal import Journal
from tune.plan import write_plan
from tune.results import read_space
from tune.search import Points, id_of, points_of, searcher
from tune.side import Side
from tune.space import Space
from tune.trial import STOP, run_trial
from tune.words import standing

POLL = 0.5
GRACE_S = 60.0
"""For trials that were asked to end, to save and do so."""


def sweep(recipe: Recipe, space: Space, where: Where, jobs: int | None = None) -> RunFolder:
    """Run every trial that is not finished yet, `jobs` at a time; returns the sweep's run folder.

    `recipe.name` is the sweep's. The same call goes on from where an earlier one ended, however it did.

    Raises InputError for what no trial could do, or a folder that holds another sweep; Stopped where it was stopped, or
    Ray went away; AraeError where no trial came to its end.
    """
    recipe = prepared(recipe, space)
    refuse_another_sweep(recipe, space)
    check_all(recipe, space, where)
    tags = {"stage": "sweep", "space": space.about or "a space of its own"}
    family = Family(recipe.name, recipe.name, {}, tags, delivered=False)
    delivery = Delivery(RunFolder.of(recipe).path)
    with stop_requested() as stop, delivery, session(recipe, family=family) as run:
        delivery.note = run.progress.note
        document = space.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        write_text(run.folder.space, yaml.safe_dump(document, sort_keys=False))
        write_plan(run.folder.path, recipe, space, where, run.progress.note)
        journal = Journal(run.folder.path)
        journal.add("command", state="begun")
        try:
            points = points_of(space, space.search, recipe, journal, run.folder.path)
            points.workers = where.workers or 1
            _run(Side(recipe, where, jobs), space, points, run, stop)
        finally:
            with suppress(OSError):
                journal.add("command", state="ended")
    return run.folder


def prepared(recipe: Recipe, space: Space) -> Recipe:
    """The recipe that the trials vary: no map of its own; looked at often enough for every rung to be met."""
    changes: dict[str, Any] = {"map": None}
    if space.search.early_stop is not None:
        changes["evaluate.looks"] = max(recipe.evaluate.looks or 0, space.search.early_stop.looks)
    return recipe.replace(changes)


def check_all(recipe: Recipe, space: Space, where: Where) -> None:
    """InputError for networks, layers or data that could not be trained, before anything is; each kind once."""
    seen = set[str]()
    for point in space.crossings():
        made = space.recipe(recipe, point)
        kind = made.replace({"seed": 0, "encoder.attack.eps": 0, "encoder.attack.norm": None, "evaluate.attacks": []})
        if (digest := digest_of(kind.digested())) not in seen:
            seen.add(digest)
            list(check(made, where.worker_device()))


def refuse_another_sweep(recipe: Recipe, space: Space) -> None:
    """InputError where the sweep's folder holds one of another recipe or space. The search may change: budgets grow."""
    folder = RunFolder.of(recipe)
    again = "give this one another name=… or delete the folder"
    if folder.space.is_file():
        old = read_space(folder.path)
        if (old.axes, old.fixed) != (space.axes, space.fixed):
            raise InputError(f"{folder.path} holds a sweep of another space (its axes differ); {again}")
    for entry in Journal(folder.path).entries().values():
        if id_of(space.recipe(recipe, space.point(entry.values))) != entry.id:
            raise InputError(f"{folder.path} holds a sweep of another recipe; {again}")


def _run(side: Side, space: Space, points: Points, run: Session, stop: Callable[[], bool]) -> None:
    run.progress.note(f"{points.recipe.name}: {standing(points.entries.values(), space, side.jobs)}")
    begun, asked = time.monotonic(), run.folder.path / STOP
    asked.unlink(missing_ok=True)
    book = Book(points, run, space)

    def ending() -> bool:
        return stop() or book.halted is not None

    def next_config() -> dict[str, Any] | None:
        with book.guarded():
            entry = None if ending() else points.next((time.monotonic() - begun) / 3600)
            return None if entry is None else side.task(points, entry).config()
        return None

    search = searcher(next_config, lambda: bool(points.running) and not ending())
    thread = threading.Thread(target=_fit, args=(side, search, book), daemon=True)
    thread.start()
    until = float("inf")
    while thread.is_alive() and time.monotonic() < until:
        thread.join(POLL)
        book.show()
        if ending() and until == float("inf"):
            until = time.monotonic() + GRACE_S
            run.progress.note("stopping: trials at work save their states")
            with suppress(OSError):
                asked.touch()
    if not ending():
        book.close()
    _judge(points, run, book.halted, stopped=stop())


def _judge(points: Points, run: Session, halted: Exception | None, *, stopped: bool) -> None:
    """Raise what the end of the work amounts to."""
    entries = list(points.entries.values())
    finished = [entry for entry in entries if entry.state == "finished"]
    again = "the same command goes on from there"
    if halted is not None:
        if isinstance(halted, OSError):
            raise halted
        said = str(halted) if isinstance(halted, AraeError) else f"Ray went away ({last_line(halted)})"
        raise Stopped(f"{run.folder.path}: {said}; {len(finished)} trials are finished, and {again}")
    if stopped:
        raise Stopped(f"{run.folder.path}: stopped with {len(finished)} trials finished; {again}")
    failed = [entry for entry in entries if entry.state == "failed"]
    if not finished:
        first = f"; the first: {failed[0].reason}" if failed else ""
        raise AraeError(f"{run.folder.path}: none of {len(entries)} trials came to its end{first}")
    if failed:
        shown = "; ".join(f"{points.recipe_of(entry)[0].label}: {entry.reason}" for entry in failed[:3])
        run.progress.note(f"{len(failed)} of {len(entries)} trials failed and are left out ({shown})")


def _fit(side: Side, search: Any, book: Book) -> None:
    """Body of the thread that Ray Tune runs in; the book is told where it ends by an error."""
    import logging

    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="arae-tune-") as notes:
            tune.Tuner(
                tune.with_resources(run_trial, side.resources),
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    num_samples=-1,
                    max_concurrent_trials=side.jobs,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=notes,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=book.space.search.retries),
                    callbacks=[callback(book)],
                ),
            ).fit()
    except Exception as error:  # noqa: BLE001 -- it crosses to the main thread, which says what it means
        book.halted = book.halted or error
