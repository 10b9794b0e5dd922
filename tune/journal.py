"""A sweep's own book, `trials.jsonl`: what was begun, how each stage compared, how every trial ended.

It is all that a sweep goes on from. Ray Tune's own bookkeeping is thrown away: it knows nothing of stages, and restores
no scheduler. One object a line, told apart by `event`: `command` (a command began or ended its work), `begin` and `end`
(of a trial), `stage` (one that a trial made sure of), `cut` (one that it did not), `rung` (one that came as far as it
might) and `promoted` (one that may go on). What a kill tears is passed over.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arae.monitor.events import read_events
from arae.monitor.swept import State
from arae.runs import RunFolder


@dataclass
class Entry:
    """One trial as the book has it."""

    id: str
    values: dict[str, Any]
    number: int
    """In which order it was begun, from 0."""
    state: State | None = None
    """`stopped`: cut short on a rung; None: begun, and not at its end."""
    reason: str | None = None
    """Why it failed, or at what it was cut short."""
    objectives: dict[str, float] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Of each stage that it reached: `stage`, `key`, `trained`, `measured`, `steps`, `seconds`, `workers`,
    `evaluation_s`."""
    learned: dict[str, Any] = field(default_factory=dict)
    """What the search has to know of it again."""

    def passed(self, outcome: dict[str, Any]) -> None:
        """Take note of a stage; what it says in place of what it said before, save who trained it."""
        for before in self.stages:
            if (before["stage"], before["key"]) == (outcome["stage"], outcome["key"]):
                outcome = {**outcome, **{kind: before[kind] or outcome[kind] for kind in ("trained", "measured")}}
        self.stages = [one for one in self.stages if one["stage"] != outcome["stage"]] + [outcome]


class Journal:
    """The book of a sweep's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = RunFolder(folder).trials

    def add(self, event: str, **fields: Any) -> None:
        """Write one line, on disk when this returns. Raises OSError (a full disk)."""
        line = json.dumps({"event": event, "time": time.time(), **fields}) + "\n"
        with self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill tore the last line
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def begin(self, entry: Entry) -> None:
        """A trial is begun."""
        self.add("begin", id=entry.id, values=entry.values, number=entry.number, learned=entry.learned)

    def stage(self, entry: Entry, outcome: dict[str, Any]) -> None:
        """A trial has made sure of a stage."""
        entry.passed(outcome)
        self.add("stage", id=entry.id, outcome=outcome)

    def cut(self, entry: Entry, outcome: dict[str, Any]) -> None:
        """A trial was cut short in a stage."""
        entry.passed(outcome)
        self.add("cut", id=entry.id, outcome=outcome)

    def end(self, entry: Entry) -> None:
        """A trial has ended."""
        self.add("end", **{key: vars(entry)[key] for key in ("id", "state", "reason", "objectives")})

    def entries(self) -> dict[str, Entry]:
        """All trials, in the order in which they were begun."""
        found: dict[str, Entry] = {}
        for event in self.events("begin", "stage", "cut", "end"):
            if event["event"] == "begin" and event["id"] not in found:
                found[event["id"]] = Entry(
                    event["id"], event["values"], event["number"], learned=event.get("learned") or {}
                )
            elif event["event"] in ("stage", "cut") and event["id"] in found:
                found[event["id"]].passed(event["outcome"])
            elif event["event"] == "end" and event["id"] in found:
                for key in ("state", "reason", "objectives"):
                    setattr(found[event["id"]], key, event[key])
        return found

    def hours(self) -> float:
        """For how long commands have worked on the sweep; one that was killed until its last line."""
        total, begun, last = 0.0, None, 0.0
        for event in self.events():
            if event["event"] == "command":
                if begun is not None:
                    total += (event["time"] if event["state"] == "ended" else last) - begun
                begun = event["time"] if event["state"] == "begun" else None
            last = event["time"]
        return (total + (last - begun if begun is not None else 0.0)) / 3600

    def events(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """The lines, of these kinds or of all."""
        for event in read_events(self.path):
            if not kinds or event.get("event") in kinds:
                yield event
