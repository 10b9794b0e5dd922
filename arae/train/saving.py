"""States written while training goes on: a copy is taken between two steps, and a thread makes a file of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from arae.train.state import Saved, save_state

Tell = Callable[[Saved, float], None]
"""Called with a state that is safe on disk, and the seconds it took to write."""


class Saver:
    """Writes one stage's states in a thread, one at a time: it holds one copy of the state, whatever the disk does.

    Leaving it as a context waits for what is being written. What the thread has to say, its errors (OSError) too, comes
    with the next call, in the caller's thread.
    """

    def __init__(self, folder: Path, *, stage: str, digest: str, keep: int, tell: Tell) -> None:
        self.folder, self.stage, self.digest, self.keep, self.tell = folder, stage, digest, keep, tell
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._safe: deque[tuple[Saved, float]] = deque()

    def save(self, payload: dict[str, Any], step: int, score: float | None = None) -> None:
        """Copy the payload and begin to write it; waits while the state before it is still being written."""
        self.wait()
        taken = copied(payload)
        self._thread = threading.Thread(target=self._write, args=(taken, step, score), name="saving", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Tell what has been written since the last call, raise what went wrong; never waits."""
        while self._safe:
            self.tell(*self._safe.popleft())
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until all is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:  # the first error is the one to tell
            self._thread.join()

    def _write(self, payload: dict[str, Any], step: int, score: float | None) -> None:
        begun = time.perf_counter()
        try:
            saved = save_state(
                self.folder, payload, stage=self.stage, step=step, digest=self.digest, keep=self.keep, score=score
            )
            self._safe.append((saved, time.perf_counter() - begun))
        except BaseException as error:  # noqa: BLE001 -- it crosses to the loop, which raises it
            self._error = error


def copied(value: Any) -> Any:
    """A copy on the CPU of a state: of its tensors and what holds them."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(one) for one in value)
    return value
