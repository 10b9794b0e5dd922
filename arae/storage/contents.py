"""What belongs to a run folder, whose it is, and one look at it that holds together."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, Literal

from arae.storage.remote import Entry

Role = Literal["session", "work"]
ROLES: tuple[Role, ...] = ("session", "work")
Signature = tuple[int, int]
"""Bytes and nanoseconds of a file; of a list, bytes and a checksum."""
Wanted = Callable[[str], bool]

SESSION = ("recipe.yaml", "log.txt", "mlflow.json", "mlflow.pending.jsonl")
MANIFEST = "state/manifest.json"
LISTS = (MANIFEST, "model/config.json")  # each names other files, which must be there before it is
LEFT_OUT = ("data", "ray")  # encoded images are written anew; Ray's notes are of no use to a later command


def everything(_: str) -> bool:
    """All of a run."""
    return True


def no_states(name: str) -> bool:
    """What measures and shows need: no states, which only training goes on from."""
    return not fnmatch(name, "state/*.pt*")


def glance(name: str) -> bool:
    """What a list of runs needs: no weights and no pictures."""
    return name.rpartition("/")[0] in ("", "state", "model") and name.endswith((".json", ".jsonl", ".yaml", ".txt"))


@dataclass
class Batch:
    """What one push takes as the state of the folder, however it goes on changing meanwhile."""

    now: dict[str, Signature]
    lists: dict[str, bytes]
    files: dict[str, BinaryIO]
    """New states, held open: the training may remove them before they are sent."""

    @classmethod
    def of(cls, folder: Path, role: Role, sent: Mapping[str, Signature], stack: ExitStack) -> Batch:
        """Look at the folder: the manifest first, then the states that it names and no others.

        sent: what was sent before; what of it did not change is not opened.
        """
        here = files_of(folder, role)
        if role == "session":
            return cls(here, {}, {})
        lists, opened, named = dict[str, bytes](), dict[str, BinaryIO](), list[str]()
        for _ in range(20):
            lists = {name: data for name in LISTS if (data := _content(folder / name)) is not None}
            named, opened, whole = named_states(lists.get(MANIFEST)), dict[str, BinaryIO](), True
            for name in named:
                if name in sent and sent[name] == signature(folder / name):
                    continue
                try:
                    opened[name] = stack.enter_context((folder / name).open("rb"))
                except FileNotFoundError:  # the training has moved on: its newer manifest says to what
                    whole = False
            if whole or lists.get(MANIFEST) == _content(folder / MANIFEST):
                break
        now = {name: each for name, each in here.items() if name not in LISTS and no_states(name)}
        now |= {name: sent[name] for name in named if name in sent}
        now |= {name: stat_of(os.fstat(file.fileno())) for name, file in opened.items()}
        return cls(now | {name: (len(data), zlib.crc32(data)) for name, data in lists.items()}, lists, opened)

    def opened(self, folder: Path, name: str) -> BinaryIO | None:
        """The file to send; None where it has gone."""
        if name in self.files:
            return self.files[name]
        try:
            return (folder / name).open("rb")
        except FileNotFoundError:
            return None


def role_of(name: str) -> Role:
    """Whose file this is while a run trains on another machine than its command's."""
    return "session" if name in SESSION else "work"


def files_of(folder: Path, role: Role) -> dict[str, Signature]:
    """What of a role lies in a run folder."""
    return {n: s for n in files_below(folder) if role_of(n) == role and (s := signature(folder / n))}


def own_files(listed: Mapping[str, Entry]) -> dict[str, Entry]:
    """Of all that lies below a run's folder, the run's own files."""
    nested = [n.removesuffix("recipe.yaml") for n in listed if n.endswith("/recipe.yaml")]
    return {n: e for n, e in listed.items() if _sent(n) and not n.startswith(tuple(nested))}


def files_below(folder: Path) -> Iterator[str]:
    """A run folder's own files, by their paths in it: no hidden ones, none half written, none of runs inside."""
    for at, folders, files in os.walk(folder):
        here = Path(at)
        folders[:] = sorted(
            name
            for name in folders
            if not (here / name / "recipe.yaml").is_file() and _sent((here / name).relative_to(folder).as_posix())
        )
        for name in sorted(files):
            inside = (here / name).relative_to(folder).as_posix()
            if _sent(inside):
                yield inside


def _sent(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and parts[0] not in LEFT_OUT and not name.endswith((".tmp", ".part"))


def named_states(manifest: bytes | None) -> list[str]:
    """The files that a manifest of states lists."""
    try:
        return [f"state/{each['file']}" for each in json.loads(manifest or b"{}").get("states", [])]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def signature(path: Path) -> Signature | None:
    """Bytes and time of a file; of a list its content tells, for it may be written twice in one tick of a clock."""
    try:
        if f"{path.parent.name}/{path.name}" in LISTS:
            data = path.read_bytes()
            return len(data), zlib.crc32(data)
        return stat_of(path.stat())
    except OSError:
        return None


def stat_of(found: os.stat_result) -> Signature:
    """Bytes and nanoseconds."""
    return found.st_size, found.st_mtime_ns


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
