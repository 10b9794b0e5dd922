"""A run folder's working copy, and how it and the storage are brought together.

The storage holds a run's files under their own names, so that other tools can read them. Two processes may have a hand
in one run: the command (its *session* files: recipe, text log, what MLflow has yet to hear) and, while it trains,
the worker of rank 0, perhaps on another machine (the *work* files: all others). For each of the two the storage says
which copy wrote last. That copy is right about them, even where it holds what it could not send; in any other copy the
storage is right. No clocks are compared, and nothing is merged.

What others may see is never half: states go first, then the manifest that lists them, and only then are those removed
that it lists no more; weights likewise before the model's config.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, cast

from arae.files import write_text
from arae.locks import held
from arae.storage.contents import (
    LISTS,
    MANIFEST,
    Batch,
    Role,
    Signature,
    Wanted,
    everything,
    files_of,
    named_states,
    own_files,
    role_of,
    signature,
    stat_of,
)
from arae.storage.remote import Away, Entry, Remote

OURS = ".mirror"  # what we know of the copy, in the run folder; hidden files are not sent
LARGE = 4 << 20  # from this size, a file that grows is sent ever more rarely
RATE = 1 << 20  # bytes a second that such files may take of the network, about


@dataclass
class Known:
    """A file at the time when copy and storage held the same of it."""

    local: Signature
    remote: tuple[int, int | None]
    """Bytes and time, as the storage lists it."""


class Copy:
    """The working copy at `path` of a run at `remote`."""

    def __init__(self, path: Path, remote: Remote) -> None:
        self.path, self.remote = path, remote
        self.moved = time.monotonic()
        """When the storage last took something of a file."""
        self.sent = 0
        """Files that it took or removed."""
        self._sent_at: dict[str, float] = {}

    @cached_property
    def id(self) -> str:
        """This copy's own name, in no other's."""
        place = self.path / OURS / "copy"
        with self._held("copy"):
            if not place.is_file():
                write_text(place, uuid.uuid4().hex)
            return place.read_text().strip()

    def claim(self, role: Role) -> None:
        """Say at the storage that this copy is right about a role from now on. Call it after a pull, before writing."""
        if self._last_writer(role) != self.id:
            mark = {"copy": self.id, "host": socket.gethostname(), "time": time.time()}
            self.remote.write(f".{role}.json", json.dumps(mark).encode())

    def pull(self, role: Role, wanted: Wanted = everything, listed: Mapping[str, Entry] | None = None) -> None:
        """Bring what the storage knows better, of that the `wanted`; `listed`: what its folder has just listed.

        Raises Away, InputError; OSError for the local disk.
        """
        with self._held(role):
            for _ in range(5):  # a writer may remove what its own older list named, while we read
                found = self.remote.list() if listed is None else listed
                if self._pulled(role, {n: e for n, e in own_files(found).items() if role_of(n) == role}, wanted):
                    return
                listed = None
            raise Away(f"{self.remote.shown}: it changed too fast to be read")

    def _pulled(self, role: Role, theirs: dict[str, Entry], wanted: Wanted) -> bool:
        """Whether all that was listed could be brought."""
        known, here, last = self._known(role), files_of(self.path, role), self._last_writer(role)
        ours = last == self.id or (last is None and not theirs)
        for name in () if ours else sorted(here, key=lambda n: n not in LISTS):
            if name not in theirs or not (wanted(name) or _same(known.get(name), here[name], theirs[name])):
                (self.path / name).unlink(missing_ok=True)
                known.pop(name, None)
                here.pop(name)
        for name in sorted(filter(wanted, theirs), key=lambda n: n in LISTS):  # a list, once what it names is here
            there = theirs[name]
            if ours and (name in here or name in known):
                continue
            if name in here and name not in LISTS and _same(known.get(name), here[name], there):
                continue
            if not self.remote.download(name, self.path / name):
                return False
            if (local := signature(self.path / name)) is not None:
                known[name] = Known(local, (there.bytes, there.changed))
        if role_of(MANIFEST) == role and not ours:
            self._note_manifest((self.path / MANIFEST).read_bytes() if MANIFEST in theirs else None)
        self._note_known(role, known)
        return True

    def push(self, role: Role, *, whole: bool = False) -> None:
        """Send what is new here, of a role that was claimed; all but `whole` leaves large files that grow for later.

        Raises Away, InputError; OSError for the local disk.
        """
        with self._held(role), ExitStack() as stack:
            known = self._known(role)
            batch = Batch.of(self.path, role, {name: each.local for name, each in known.items()}, stack)
            sending = [n for n, now in batch.now.items() if not (n in known and known[n].local == now)]
            gone = [n for n in known if n not in batch.now]
            for name in sorted(sending, key=lambda n: (n in LISTS, n)):
                if whole or not self._too_early(name, batch.now[name][0]):
                    self._send(name, batch, known)
                    self._note_known(role, known)
            for name in sorted(gone, key=lambda n: (n not in LISTS, n)):
                self.remote.delete(name)
                known.pop(name)
                self._note_known(role, known)
                self._progressed(name, None)

    def _send(self, name: str, batch: Batch, known: dict[str, Known]) -> None:
        if name in batch.lists:
            now = batch.now[name]
            self.remote.write(name, batch.lists[name])
        else:
            file = batch.opened(self.path, name)
            if file is None:
                return  # gone again meanwhile: the next push sees what is there then
            with file:
                now = stat_of(os.fstat(file.fileno()))
                self.remote.upload(name, cast(BinaryIO, _Heard(file, self)), now[0])
        there = self.remote.entry(name)
        known[name] = Known(now, (there.bytes, there.changed) if there else (0, None))
        self._sent_at[name] = time.monotonic()
        self._progressed(name, batch.lists.get(name))

    def newest_state(self) -> str | None:
        """The newest state that the storage lists, as far as is known here; None where it lists none."""
        with suppress(OSError):
            return next(iter(reversed(named_states((self.path / OURS / "manifest.json").read_bytes()))), None)
        return None

    def _note_manifest(self, content: bytes | None) -> None:
        write_text(self.path / OURS / "manifest.json", (content or b"").decode())

    def _progressed(self, name: str, content: bytes | None) -> None:
        self.moved = time.monotonic()
        self.sent += 1
        if name == MANIFEST:
            self._note_manifest(content)

    def _too_early(self, name: str, size: int) -> bool:
        if size < LARGE or name.startswith(("state/", "model/")):
            return False
        return time.monotonic() - self._sent_at.get(name, 0.0) < size / RATE

    def _last_writer(self, role: Role) -> str | None:
        found = self.remote.read(f".{role}.json")
        try:
            return str(json.loads(found)["copy"]) if found else None
        except (ValueError, KeyError, TypeError):
            return None

    def _known(self, role: Role) -> dict[str, Known]:
        try:
            document = json.loads((self.path / OURS / f"{role}.json").read_text())
            return {name: Known((a, b), (c, d)) for name, (a, b, c, d) in document.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _note_known(self, role: Role, known: Mapping[str, Known]) -> None:
        document = {name: (*each.local, *each.remote) for name, each in known.items()}
        write_text(self.path / OURS / f"{role}.json", json.dumps(document))

    @contextmanager
    def _held(self, what: str) -> Iterator[None]:
        """One process of this machine at a time: a command and a worker may share the copy."""
        with held(self.path / OURS / f"{what}.lock"):
            yield


class _Heard:
    """A file on its way: a further piece is asked for once the storage took one before."""

    def __init__(self, file: BinaryIO, copy: Copy) -> None:
        self._file, self._copy = file, copy

    def read(self, size: int) -> bytes:
        """As the file's."""
        if self._file.tell():
            self._copy.moved = time.monotonic()
        return self._file.read(size)


def _same(known: Known | None, here: Signature, there: Entry) -> bool:
    """Whether neither side changed since both were the same; unknown where the storage tells no time."""
    return (
        known is not None
        and known.local == here
        and known.remote == (there.bytes, there.changed) != (there.bytes, None)
    )
