"""Run folders that lie at a URL: brought before a command works on them, sent while it does, and at its end."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from arae.errors import AraeError, DiskFull, InputError, Stopped
from arae.storage.contents import ROLES, everything, no_states
from arae.storage.copy import Copy
from arae.storage.fetching import AT_WORK
from arae.storage.lease import Lease, Watched
from arae.storage.place import remote_of, runs_place
from arae.storage.pusher import Holder, Note, Pusher, patience
from arae.storage.remote import Away, is_url

if TYPE_CHECKING:
    import torch

    from arae.runs import RunFolder

Result = TypeVar("Result")

SHORT_S = 15.0  # without progress, for the last push of a command that ends badly anyhow


class Shared:
    """What a command's session holds of its run; where the run lies on a path, all of this does nothing."""

    def __init__(self, copy: Copy | None = None, pusher: Pusher | None = None) -> None:
        self._copy, self._pusher = copy, pusher

    def tell(self, note: Note) -> None:
        """From now on, tell `note` when the storage goes away and comes back."""
        if self._pusher is not None:
            self._pusher.note = note

    def bring_states(self) -> None:
        """Bring what only training needs, before training in this process."""
        if self._copy is not None:
            copy = self._copy
            patiently(lambda: copy.pull("work", everything))

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While the workers train: rank 0, perhaps on another machine, writes the work files (`mirrored`)."""
        if self._copy is None or self._pusher is None:
            yield
            return
        copy, pusher = self._copy, self._pusher
        patiently(pusher.now)
        pusher.lend(lent=True)
        try:
            yield
        except BaseException as error:
            # The word that the run ended, and why, is yet to be written and sent. It must not hide what ended it.
            with suppress(AraeError, OSError):
                _take_back(copy, pusher, _patience_after(error))
            raise
        _take_back(copy, pusher, patience())


@contextmanager
def shared(folder: RunFolder, note: Note) -> Iterator[Shared]:
    """A command's hold on its run folder: brought before (all but states), sent during, whole at the end.

    Raises InputError where the storage refuses or another command holds the run, Stopped where it does not answer.
    """
    remote = remote_of(folder.path)
    if remote is None:
        yield Shared()
        return
    copy, lease = Copy(folder.path, remote), Lease(remote)
    patiently(lease.take)
    with AT_WORK.held(folder.path):
        try:  # from here on, the lease renews itself: what follows may take long
            for role in ROLES:
                patiently(lambda role=role: copy.pull(role, no_states))
                patiently(lambda role=role: copy.claim(role))
            pusher = Pusher(copy, lease, {"session", "work"}, note)
            with finished(pusher):
                yield Shared(copy, pusher)
        finally:
            with suppress(AraeError):
                lease.release()


@contextmanager
def mirrored(folder: RunFolder, *, writer: bool) -> Iterator[None]:
    """A worker's hold on its run folder: brought before; sent during and after by the `writer`, which is rank 0.

    Every worker of the group enters it; the others wait until rank 0 has brought what counts, so that all of them go on
    from one state. Does nothing for a run folder on a path. The lease is the command's own (`shared`).

    Raises Stopped where the storage does not answer or this machine's disk can't take the copy (DiskFull), InputError
    where the storage refuses.
    """
    remote = remote_of(folder.path)
    if remote is None:
        yield
        return
    copy = Copy(folder.path, remote)
    with AT_WORK.held(folder.path):
        if not writer:
            _agree(None)
            with _disk_told(copy):
                patiently(lambda: _bring(copy))
            yield
            return
        try:
            with _disk_told(copy):
                holder = _begin_writing(copy)
        except AraeError as error:
            _agree(error)
            raise
        _agree(None)
        with finished(Pusher(copy, holder, {"work"}, _into_log(folder))):
            yield


@contextmanager
def finished(pusher: Pusher) -> Iterator[None]:
    """Send the rest at the end. What ended the block badly is not hidden by a storage that is away as well.

    A block that was stopped may say that a state is kept: where the storage has it not, the line says that, too.
    """
    try:
        yield
    except BaseException as error:
        try:
            pusher.finish(_patience_after(error))
        except Stopped as stopped:
            if isinstance(error, Stopped):
                raise type(error)(f"{error}; but {stopped}") from None
            pusher.note(str(stopped))
        raise
    pusher.finish(patience())


def patiently(action: Callable[[], Result], seconds: float | None = None) -> Result:
    """Do what needs the storage, again and again while it does not answer; Stopped after `seconds`, or `patience()`."""
    until, pause = time.monotonic() + (patience() if seconds is None else seconds), 0.5
    while True:
        try:
            return action()
        except Away as error:
            if time.monotonic() + pause > until:
                raise Stopped(f"{error}; run the same command again once it answers") from None
        time.sleep(pause)
        pause = min(5.0, 2 * pause)


def need_tracking_server() -> None:
    """InputError where MLflow would be given an SQLite store beside runs that lie at a URL."""
    if os.environ.get("MLFLOW_TRACKING_URI") or importlib.util.find_spec("mlflow") is None:
        return
    if is_url(runs_place()):
        raise InputError(
            "ARAE_RUNS is a URL, and MLflow's own store can't lie there: set MLFLOW_TRACKING_URI to a server "
            "(http://host:5000) or to a local file (sqlite:////path/mlflow.db)"
        )


def _patience_after(error: BaseException) -> float:
    """Seconds for the storage at the end of a block that ended so: what was stopped is to go on from what is there."""
    return patience() if isinstance(error, Stopped) else min(SHORT_S, patience())


def _take_back(copy: Copy, pusher: Pusher, seconds: float) -> None:
    """Bring what the workers made of the work files, and write them again ourselves, unless the run is another's."""
    pusher.following = False
    if patiently(pusher.holder.renew, seconds):
        patiently(lambda: copy.pull("work", no_states), seconds)
        patiently(lambda: copy.claim("work"), seconds)
        pusher.lend(lent=False)


@contextmanager
def _disk_told(copy: Copy) -> Iterator[None]:
    """A disk that can't take the working copy is an end with one line; what lies at the storage is as it was."""
    try:
        yield
    except AraeError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (DiskFull if full else Stopped)(
            f"{copy.path}: the working copy of {copy.remote.shown} can't be written ({error.strerror or error}); make "
            "room, or set ARAE_SCRATCH to a folder on another disk, and run the same command again"
        ) from None


def _begin_writing(copy: Copy) -> Holder:
    patiently(lambda: _bring(copy))
    patiently(lambda: copy.claim("work"))
    patiently(lambda: copy.push("work"))  # what an earlier worker on this machine could not send
    return Watched(copy.remote)


def _bring(copy: Copy) -> None:
    for role in ROLES:
        copy.pull(role)


def _agree(failed: AraeError | None) -> None:
    """Wait for rank 0's word, where there is a group; raises its failure in the others, too."""
    if "torch" not in sys.modules:  # then there is no group either
        return
    from torch import distributed as dist

    if dist.is_available() and dist.is_initialized():
        said = [(type(failed), str(failed)) if failed else None]
        dist.broadcast_object_list(said, device=_device(dist.get_backend()))
        if failed is None and said[0] is not None:
            kind, text = said[0]
            raise kind(text)


def _device(backend: str) -> torch.device:
    import torch

    if backend != "nccl":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _into_log(folder: RunFolder) -> Note:
    """A note of rank 0's goes where its events go."""

    def note(text: str) -> None:
        from arae.train.log import Log

        with suppress(OSError):
            Log(folder, None, active=True).note(text)

    return note
