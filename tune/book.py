"""What the driver hears of its trials: the journal kept, people told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from arae.errors import Stopped, last_line
from arae.session import Session
from tune.journal import Entry
from tune.search import Points
from tune.space import Space
from tune.store import outcome_of
from tune.words import ended_words


class Book:
    """Hears Ray Tune's word on trials; keeps the journal and tells people."""

    def __init__(self, points: Points, run: Session, space: Space) -> None:
        self.points, self.run, self.space = points, run, space
        self._at: dict[str, str] = {}
        self.halted: Exception | None = None
        """What ends the sweep for now: no trial could do better."""

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A disk that is full, or away, ends the sweep: what can't be written down must not go on."""
        try:
            yield
        except OSError as error:
            self.halted = self.halted or error

    def heard(self, entry: Entry, result: Mapping[str, Any]) -> None:
        """A trial's word on a stage."""
        if "outcome" in result:
            self.points.passed(entry, dict(result["outcome"]))
        if "stage" in result:
            self._at[entry.id] = f"{result['stage']} {result['step']}/{result['steps']}"

    def completed(self, entry: Entry, result: Mapping[str, Any]) -> None:
        """A trial ended: at its end, or on a rung, where it waits."""
        if "objectives" in result:
            entry.state, entry.objectives = "finished", dict(result["objectives"])
            self._ended(entry)
            return
        self._at.pop(entry.id, None)
        self.points.paused(entry, result.get("pause") or {})
        if "halt" in result:
            self.halted = self.halted or Stopped(str(result["halt"]))

    def close(self) -> None:
        """What still waits on a rung is cut short there."""
        for entry, stage in self.points.waiting():
            at = self.points.rungs.waiting()[stage.key]
            entry.state, entry.reason = "stopped", f"its {stage.name} at step {at['step']}"
            known = replace(outcome_of(stage), trained=True, steps=at["step"], seconds=at["seconds"])
            self.points.journal.cut(entry, asdict(replace(known, workers=self.points.workers)))
            self._ended(entry)

    def failed(self, entry: Entry, reason: str) -> None:
        """A trial failed for good."""
        entry.state, entry.reason = "failed", reason
        self._ended(entry)

    def tried_again(self, entry: Entry, reason: str) -> None:
        """A trial failed, and begins anew from its newest state."""
        self.run.progress.note(f"{self.points.recipe_of(entry)[0].label}: tried again after {reason}")

    def show(self) -> None:
        """Say how far the sweep has come."""
        entries = list(self.points.entries.values())
        done = sum(entry.state is not None for entry in entries)
        total = self.space.search.trials or max(len(entries), self.space.count or 0)
        at_work = "; ".join(f"{self.points.entries[i].number + 1}: {at}" for i, at in self._at.items())
        self.run.progress.task("trials", done, max(total, done + len(self._at)), at_work)

    def _ended(self, entry: Entry) -> None:
        self._at.pop(entry.id, None)
        self.points.ended(entry)
        self.run.progress.note(ended_words(entry, self.points.recipe_of(entry)[0]))


def callback(book: Book) -> Any:
    """The book as a callback of Ray Tune's."""
    from ray.tune import Callback

    def entry_of(trial: Any) -> Entry:
        return book.points.entries[trial.config["task"]["id"]]

    class Told(Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            with book.guarded():
                book.heard(entry_of(trial), result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            with book.guarded():
                book.completed(entry_of(trial), trial.last_result)

        def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            with book.guarded():
                book.tried_again(entry_of(trial), _reason(trial))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            with book.guarded():
                book.failed(entry_of(trial), _reason(trial))

        def __reduce__(self) -> Any:  # Ray Tune keeps a copy of everything, to restore what we do not let it restore
            return dict, ()

    return Told()


def _reason(trial: Any) -> str:
    """Why a trial failed, in one line. Ray Tune writes the error to a file beside it, and hands it to nobody."""
    import cloudpickle
    from ray.exceptions import RayActorError

    try:
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except (OSError, TypeError, ImportError, AttributeError, EOFError, cloudpickle.pickle.UnpicklingError):
        return "its process ended"
    if isinstance(error, RayActorError):
        return "its process was killed, or crashed"
    return last_line(getattr(error, "cause", None) or error)
