"""What sends a working copy to the storage while others work in it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from arae.errors import InputError, Stopped
from arae.storage.contents import ROLES, Role, no_states
from arae.storage.copy import Copy

Note = Callable[[str], None]

EVERY_S = 3.0
LONGEST_PAUSE_S = 30.0
LOOK_S = 0.2
SLACK_S = 5.0  # for a request under way


class Holder(Protocol):
    """Tells whether the run is still ours to write into."""

    def renew(self) -> bool:
        """False once another command has it."""
        ...


class Pusher:
    """A thread that sends the claimed roles of a copy every few seconds, and bears with a storage that is away.

    Whoever trains never waits for it. `note` is told, from the thread, when the storage goes away and is back.
    """

    def __init__(self, copy: Copy, holder: Holder, roles: set[Role], note: Note) -> None:
        self.copy, self.holder, self.note = copy, holder, note
        self.roles = roles
        self.following = False
        """Whether another process writes the work files, and this one brings what there is to see of them."""
        self._lost = False
        self._turn = threading.Lock()
        self._closing = threading.Event()
        self._sent = threading.Event()
        self._patience = 0.0
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._run, name="storage", daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """Send the rest, however long that takes; `seconds`: how long the storage may take nothing of it.

        Raises Stopped where it took nothing for so long, or is another's now.
        """
        self._patience, self.copy.moved = seconds, time.monotonic()
        self._closing.set()
        while self._thread.is_alive() and time.monotonic() < self.copy.moved + seconds + SLACK_S:
            self._thread.join(LOOK_S)
        if self._lost:
            raise Stopped(
                f"{self.copy.remote.shown}: another command has taken this run over; what this one did since lies in "
                f"{self.copy.path} on {socket.gethostname()} alone"
            )
        if not self._sent.is_set():
            raise Stopped(
                f"{self.copy.remote.shown}: the storage did not take the end of this run "
                f"({self._trouble or 'no answer'}){self._there()}; the end lies in {self.copy.path} on "
                f"{socket.gethostname()} alone: run the same command there once the storage is back"
            )

    def _there(self) -> str:
        """What the storage has of the states, where they are ours to send."""
        if "work" not in self.roles:
            return ""
        newest = self.copy.newest_state()
        return f"; the newest state there is {newest}" if newest else "; there is no state there"

    def lend(self, *, lent: bool) -> None:
        """Leave the work files to another process, and follow what it makes of them; or take them back."""
        with self._turn:
            self.roles = {"session"} if lent else {"session", "work"}
            self.following = lent

    def now(self) -> None:
        """Send and bring, in the caller's thread. Raises what the storage raises."""
        with self._turn:
            self._once(whole=True)

    def _run(self) -> None:
        pause = EVERY_S
        while not self._closing.wait(pause):
            pause = self._tried(pause)
        stuck = None  # since when tries have failed without a file that was taken whole
        while not self._lost:
            sent = self.copy.sent
            self._tried(LONGEST_PAUSE_S, whole=True)
            if self._trouble is None:
                self._sent.set()
                return
            if stuck is None or self.copy.sent != sent:
                stuck = time.monotonic()
            if time.monotonic() >= stuck + self._patience:
                return
            time.sleep(1)

    def _tried(self, pause: float, *, whole: bool = False) -> float:
        """Send once; returns how long to wait before the next time."""
        try:
            with self._turn:
                self._once(whole=whole)
        except (InputError, OSError) as error:  # Away, a refusal, or the local disk: training goes on in any case
            if self._trouble is None:
                self.note(f"{error}; what it misses is kept in {self.copy.path} and sent once it answers")
            self._trouble = str(error)
            return min(LONGEST_PAUSE_S, 2 * pause)
        if self._trouble is not None:
            self.note(f"{self.copy.remote.shown}: answers again, and has what it missed")
        self._trouble = None
        return EVERY_S

    def _once(self, *, whole: bool) -> None:
        if self._lost:
            return
        if not self.holder.renew():
            self._lost = True
            self.note(f"{self.copy.remote.shown}: another command has taken this run over; nothing more is sent")
            return
        for role in ROLES:
            if role in self.roles:
                self.copy.push(role, whole=whole)
        if self.following:
            self.copy.pull("work", no_states)


def patience() -> float:
    """Seconds to wait for a storage that does not answer, when a command begins and ends: `ARAE_STORAGE_WAIT`, or 60.

    Raises InputError for what is no number.
    """
    text = os.environ.get("ARAE_STORAGE_WAIT", "60")
    try:
        return float(text)
    except ValueError:
        raise InputError(f"ARAE_STORAGE_WAIT={text}: write a number of seconds") from None
