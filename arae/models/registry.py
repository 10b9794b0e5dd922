"""What a table of networks holds, and how one is picked by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from arae.errors import InputError

Shape = tuple[int, int, int]
Builder = TypeVar("Builder", bound=Callable[..., object])


@dataclass(frozen=True)
class Entry(Generic[Builder]):
    """A network: how it is built, and one line about it."""

    build: Builder
    summary: str


def pick(table: Mapping[str, Entry[Builder]], name: str, kind: str) -> Builder:
    """The builder of a name. Raises InputError for an unknown one, with the nearest."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(table)}"
        raise InputError(f"no {kind} {name!r}: {hint}")
    return table[name].build


def checked_shape(shape: Sequence[int] | None, what: str) -> Shape:
    """A shape as three positive integers. Raises InputError for any other."""
    if shape is None or len(shape) != 3 or min(shape) < 1:
        given = "missing" if shape is None else f"{tuple(shape)}"
        raise InputError(f"{what} is {given}: give (channels, height, width), each at least 1")
    return int(shape[0]), int(shape[1]), int(shape[2])
