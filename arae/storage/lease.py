"""Who is at work on a run, written at the storage: a second command elsewhere must not write into the same run.

Object storage has no locks that every kind of it knows, so this is a lease: an object that its holder renews, in a
thread of its own, for a transfer may take longer than a lease lives. Two that take it in the same second may both go on
for a few seconds, until one reads that it has lost it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from arae.errors import AraeError, Busy
from arae.storage.remote import Remote

NAME = ".lease.json"
RENEWED_S = 10.0
DEAD_S = 3600.0  # a lease this old is nobody's; clocks of two machines differ by less
WATCHED_S = 25.0  # a lease that is not renewed for this long is nobody's, whatever its clock says
LOOK_S = 0.5
_ours: set[str] = set()
"""Leases that this process holds: one that it could not give back is nobody's."""


class Lease:
    """The right to write into the run at `remote`, kept from `take` to `release`."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.id = uuid.uuid4().hex
        self._renewed = 0.0
        self._lost = False
        self._turn = threading.Lock()
        self._given_back = threading.Event()

    def take(self) -> None:
        """Busy where another command holds it; one that died is waited for, at most half a minute."""
        found = self._read()
        if found is not None and self._alive(found):
            raise Busy(
                f"{self.remote.shown}: another command is at work on this run, process {found.get('pid')} on "
                f"{found.get('host')}; wait for it or stop it"
            )
        _ours.add(self.id)
        self._write()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def renew(self) -> bool:
        """Whether it is still ours; asked of the storage where it has not been for a while, as after an outage."""
        with self._turn:
            if not self._lost and not self._given_back.is_set() and time.monotonic() - self._renewed > RENEWED_S:
                self._lost = (found := self._read()) is not None and found.get("id") != self.id
                if not self._lost:
                    self._write()
            return not self._lost

    def release(self) -> None:
        """Give it back, if it is still ours."""
        _ours.discard(self.id)
        self._given_back.set()
        with self._turn:  # what the thread is writing comes before the look
            if (found := self._read()) is not None and found.get("id") == self.id:
                self.remote.delete(NAME)

    def _keep(self) -> None:
        while not self._lost and not self._given_back.wait(RENEWED_S / 4):
            with suppress(AraeError, OSError):  # away: tried again, and whoever writes asks before it does
                self.renew()

    def _alive(self, found: dict[str, Any]) -> bool:
        if found.get("host") == socket.gethostname():
            mine = found.get("pid") == os.getpid()
            if (mine and found.get("id") not in _ours) or not _is_process(found.get("pid")):
                return False
        if abs(time.time() - float(found.get("time", 0))) > DEAD_S:
            return False
        until = time.monotonic() + WATCHED_S
        while time.monotonic() < until:
            now = self._read()
            if now is None:
                return False
            if now != found:
                return True
            time.sleep(LOOK_S)
        return False

    def _read(self) -> dict[str, Any] | None:
        content = self.remote.read(NAME)
        try:
            found = json.loads(content) if content else None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _write(self) -> None:
        held = {"id": self.id, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self.remote.write(NAME, json.dumps(held).encode())
        self._renewed = time.monotonic()


class Watched:
    """A lease that another process of the same command holds, seen from a worker."""

    def __init__(self, remote: Remote) -> None:
        self._lease = Lease(remote)
        self._first = self._holder()
        self._looked = time.monotonic()

    def renew(self) -> bool:
        """False where another command has taken the run over."""
        if time.monotonic() - self._looked < RENEWED_S:
            return True
        self._looked = time.monotonic()
        now = self._holder()
        return now is None or self._first is None or now == self._first

    def _holder(self) -> str | None:
        found = self._lease._read()
        return str(found.get("id")) if found else None


def _is_process(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
