"""MLflow's copy of a sweep: the trials write what it is to hear into their folders, the driver sends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from arae.runs import SHARED, runs_root
from arae.tracking.mirror import PENDING, Note, Sender, first_line, log_note

EVERY_S = 3.0
LONGEST_PAUSE_S = 30.0
CLOSING_S = 60.0


class Delivery:
    """A thread that sends what waits in the folders of a sweep, its trials and the stages, while it is a context.

    One sender a sweep, whatever its trials: no trial waits for a server, and workers need no credentials for it. What
    is left at the end is sent by the next command, or by `arae ui`.
    """

    def __init__(self, folder: Path, note: Note = log_note) -> None:
        self.folder, self.note = folder, note
        self._failure: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join(CLOSING_S)
        if self._failure is not None or self._thread.is_alive():
            self.note(f"{self.folder}: MLflow has not had all of this yet; the next command or `arae ui` sends it")

    def _run(self) -> None:
        pause = EVERY_S
        while True:
            last = self._done.wait(pause)
            before, self._failure = self._failure, self._sent()
            if self._failure is not None and before is None:
                self.note(f"MLflow is away ({self._failure}); what it misses is kept in the run folders")
            elif self._failure is None and before is not None:
                self.note("MLflow answers again")
            pause = min(LONGEST_PAUSE_S, 2 * pause) if self._failure is not None else EVERY_S
            if last:
                return

    def _sent(self) -> str | None:
        """Send what waits; what MLflow says where it can't be."""
        for folder in self._waiting():
            try:
                Sender(folder, runs_root(), self.note).drain()
            except Exception as error:  # noqa: BLE001 -- MLflow, a database driver or the network: all the same here
                return first_line(error)
        return None

    def _waiting(self) -> Iterator[Path]:
        """The folders that have something to send: parents before children."""
        yield from (path.parent for path in self.folder.glob(PENDING))
        for place in (self.folder, runs_root() / SHARED):
            yield from sorted(path.parent for path in place.glob(f"*/{PENDING}"))
