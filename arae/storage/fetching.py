"""Run folders at a URL for commands that only read them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arae.storage.contents import ROLES, Wanted, glance, no_states
from arae.storage.copy import Copy
from arae.storage.place import remote_of, runs_place, runs_root, working_root
from arae.storage.remote import Entry, Remote, as_url, is_url, redacted

RECIPE = "recipe.yaml"


class AtWork:
    """The run folders that this process is at work in: their copies are newer than what could be fetched."""

    def __init__(self) -> None:
        self._folders: Counter[Path] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def held(self, folder: Path) -> Iterator[None]:
        """While the block lasts, the folder is not fetched."""
        with self._lock:
            self._folders[folder.absolute()] += 1
        try:
            yield
        finally:
            with self._lock:
                self._folders[folder.absolute()] -= 1

    def __contains__(self, folder: Path) -> bool:
        return self._folders[folder.absolute()] > 0


AT_WORK = AtWork()


def fetched(run: str | Path, wanted: Wanted = no_states) -> Path:
    """The local folder of a run (or of what is in one), brought up to date where the run lies at a URL.

    `run` is a URL, a path, or, where `ARAE_RUNS` is a URL, a run's name. What is not such a run is returned as it is.
    Raises Away where the storage does not answer, InputError where it refuses.
    """
    path, remote = _located(run)
    if remote is None:
        return path
    root, inner = path, list[str]()
    while not (root / RECIPE).is_file() and remote.entry(RECIPE) is None:
        inner.insert(0, root.name)
        root = root.parent
        remote = remote_of(root)
        if remote is None:
            return path
    bring(root, remote_of(root) or remote, wanted)
    return root.joinpath(*inner)


def bring(folder: Path, remote: Remote, wanted: Wanted, listed: dict[str, Entry] | None = None) -> None:
    """Bring a run's working copy up to date, unless this process is at work in it."""
    if folder in AT_WORK:
        return
    copy = Copy(folder, remote)
    found = remote.list() if listed is None else listed
    for role in ROLES:
        copy.pull(role, wanted, found)


def fetch_runs() -> None:
    """Bring what a list of runs shows of each: no weights, no pictures. Does nothing for runs on a path."""
    place, root = runs_place(), runs_root()
    if not is_url(place):
        return
    remote = Remote(place)
    listed = remote.list()
    for name in (n.removesuffix(f"/{RECIPE}") for n in listed if n.endswith(f"/{RECIPE}")):
        below = {n.removeprefix(f"{name}/"): entry for n, entry in listed.items() if n.startswith(f"{name}/")}
        bring(root / name, remote / name, glance, below)


def _located(run: str | Path) -> tuple[Path, Remote | None]:
    """The local folder, and what it is the copy of; None where it is no copy."""
    place = runs_place()
    if is_url(run):
        url = as_url(run)
        shown, of = redacted(url).rstrip("/"), redacted(place).rstrip("/") if is_url(place) else None
        if of and shown.startswith(f"{of}/"):
            path = runs_root() / shown.removeprefix(f"{of}/")
            return path, remote_of(path)
        above, _, name = shown.rpartition("/")
        return working_root(above) / name, Remote(url)
    path = Path(run)
    if is_url(place) and not path.exists() and not path.is_absolute():
        path = runs_root() / path
        remote = remote_of(path)
        return (path, remote) if remote and remote.entry(RECIPE) else (Path(run), None)
    return path, remote_of(path)
