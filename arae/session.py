"""What surrounds a run's work: the lock on its folder, progress for people, the mirror to MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from arae.checkout import checkout_module
from arae.config import Recipe
from arae.evaluate import alone, evaluate
from arae.launch import Stop, Where, launch, refuse_another
from arae.monitor.events import ending
from arae.monitor.progress import Progress
from arae.records import Record
from arae.runs import RunFolder, runs_root
from arae.storage import Shared, need_tracking_server, shared
from arae.tracking import Family, Tracker
from arae.tracking.mirror import log_note
from arae.train.faults import storage_told
from arae.train.log import Event, Listener


@dataclass
class Session:
    """One run at work."""

    recipe: Recipe
    folder: RunFolder
    progress: Progress
    tracker: Tracker
    shared: Shared
    """The run's place at the storage, where it lies at a URL."""

    def listen(self, event: Event) -> None:
        """Hand an event of the training to everybody."""
        self.progress(event)
        self.tracker(event)

    def train(self, where: Where, listener: Listener | None = None, stop: Stop | None = None) -> None:
        """Train what is not trained yet.

        `listener` hears the events as well; `stop` is asked whether to save and end, in place of listening for signals.
        """
        heard = self.listen if listener is None else both(self.listen, listener)
        if where.workers is None:
            self.shared.bring_states()
            launch(self.recipe, self.folder, where, heard, stop)
            return
        with self.shared.lent():
            launch(self.recipe, self.folder, where, heard, stop)

    def evaluate(self, where: Where) -> list[Record]:
        """Measure, by the workers where some are asked for, and mirror the records."""
        workers = alone if where.workers is None else checkout_module("cluster.evaluate").OnCluster(where)
        progress, device = self.progress, where.torch_device()
        records = evaluate(self.recipe, self.folder, device, progress.task, progress.note, workers)
        self.tracker.log_records(records)
        return records


def both(first: Listener, second: Listener) -> Listener:
    """A listener that hands an event to two."""

    def hand_on(event: Event) -> None:
        first(event)
        second(event)

    return hand_on


@contextmanager
def session(
    recipe: Recipe, parent: str | None = None, *, trained: bool = False, family: Family | None = None
) -> Iterator[Session]:
    """Hold the recipe's run folder: resolved recipe written, progress shown, MLflow fed; all closed in the end.

    `parent`: name of the run that MLflow shows this one under. `trained`: leave the folder's `recipe.yaml`, which says
    what was trained, as it is: one evaluation in another way must not become the way of all later ones. `family`: what
    MLflow shows this run among.

    Raises InputError where the folder holds another recipe's training, Busy where another command is at work on it.
    """
    root = runs_root()
    folder = RunFolder.of(recipe, root)
    need_tracking_server()
    with storage_told(folder), folder.lock(), shared(folder, log_note) as place:
        refuse_another(recipe, folder)
        if not (trained and folder.recipe.is_file()):
            folder.create(recipe)
        with (
            ending(folder.log),
            Progress(folder) as progress,
            Tracker(folder, recipe, root, parent=parent, family=family, note=progress.note) as tracker,
        ):
            place.tell(progress.note)
            yield Session(recipe, folder, progress, tracker, place)
