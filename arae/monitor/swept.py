"""How sweeps and their trials stand, from the sweep's book `trials.jsonl`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import yaml

from arae.monitor.events import read_events
from arae.runs import RunFolder

State = Literal["finished", "stopped", "failed"]
STATES: dict[State, str] = {"finished": "finished", "stopped": "cut short", "failed": "failed"}
"""What the book says of a trial that has ended, and how it is told."""


class Book:
    """The last word on each trial, and on the command that works on them."""

    def __init__(self, folder: RunFolder) -> None:
        self.ended: dict[str, tuple[State, str | None]] = {}
        """State and reason of the trials that have ended, by id."""
        self.begun = set[str]()
        self.heard: float | None = None
        self.at_work = False
        """Whether a command began and has not ended; a killed one never does."""
        for event in read_events(folder.trials):
            with suppress(KeyError, TypeError, ValueError):
                self._add(event)
        self.planned = _planned(folder)

    def _add(self, event: Mapping[str, Any]) -> None:
        kind, self.heard = event["event"], float(event["time"])
        if kind == "command":
            self.at_work = event["state"] == "begun"
        elif kind == "begin":
            self.begun.add(event["id"])
        elif kind == "end":
            self.ended[event["id"]] = event["state"], event.get("reason")

    @property
    def counts(self) -> dict[str, int]:
        """Trials by how they stand; `begun` are at work, or have to go on."""
        ended = Counter(STATES[state] for state, _ in self.ended.values())
        return {**ended, "begun": len(self.begun - self.ended.keys())}

    @property
    def whole(self) -> bool:
        """Whether there is nothing left to do."""
        return bool(self.ended) and self.begun <= self.ended.keys() and len(self.ended) >= (self.planned or 0)


def _planned(folder: RunFolder) -> int | None:
    """How many trials there are to be; None where a budget of hours or their luck decides."""
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        search = yaml.safe_load(folder.space.read_text())["search"]
        if search.get("kind", "grid") != "grid":  # the plan is that of the first command; budgets may have grown
            return None if {"hours", "gpu_hours"} & search.keys() else int(search["trials"])
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        return int(json.loads((folder.path / "plan.json").read_text())["trials"])
    return None


def sweep_of(folder: RunFolder) -> RunFolder | None:
    """The sweep that a run folder is a trial of."""
    above = RunFolder(folder.path.parent)
    return above if above.is_sweep else None
