"""What a run tells: one JSON object a line in `log.jsonl`, and the same to whoever listens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from arae.runs import RunFolder

Event = dict[str, Any]
Listener = Callable[[Event], None]


class Log:
    """Writes events; only rank 0's does anything, so that nothing is said once a worker."""

    def __init__(self, folder: RunFolder, listener: Listener | None, *, active: bool) -> None:
        self.path, self.listener, self.active = folder.log, listener, active

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event, with the time."""
        if not self.active:
            return
        line: Event = {"event": event, "time": time.time(), **fields}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.listener is not None:
            self.listener(line)

    def note(self, text: str) -> None:
        """Something a reader of the log should know."""
        self.emit("note", text=text)
