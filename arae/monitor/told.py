"""What a run's log says of how it stands."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from arae.monitor.pace import Group, restart_words

if TYPE_CHECKING:
    from arae.monitor.status import Status


class Told:
    """What a log says, gathered into a `Status` event by event."""

    def __init__(self) -> None:
        self.end: Mapping[str, Any] | None = None
        """The `end` event, where it is the last."""
        self.gap = 0.0
        """Seconds between the last two intervals."""
        self.saved: dict[tuple[str, int], float] = {}
        """When the state of a stage and step was safe on disk."""
        self._interval: float | None = None

    def add(self, status: Status, event: Mapping[str, Any]) -> None:
        """Count one event; one that isn't understood is passed over."""
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            kind, moment = event["event"], float(event["time"])
            status.heard = moment
            self.end = event if kind == "end" else None
            if kind == "interval":
                self.gap = moment - self._interval if self._interval is not None else 0.0
                self._interval = moment
            if kind == "state":
                self.saved[event["stage"], int(event["step"])] = moment
            handler = {
                "stage": self._on_stage,
                "interval": self._on_interval,
                "epoch": self._on_epoch,
                "restart": self._on_restart,
                "group": self._on_group,
            }.get(kind)
            if handler:
                handler(status, event)

    @staticmethod
    def _on_stage(status: Status, event: Mapping[str, Any]) -> None:
        if event["state"] == "started":
            if event["stage"] != status.stage:  # else it goes on, from where the next interval will say
                status.step, status.metrics, status.validation, status.validation_step = 0, {}, {}, None
            status.stage, status.steps, status.eta_s = event["stage"], event.get("steps"), None
        elif event["state"] == "skipped":
            status.stage = event["stage"]

    @staticmethod
    def _on_interval(status: Status, event: Mapping[str, Any]) -> None:
        group = Group.of(event)
        status.stage, status.step, status.steps = event["stage"], int(event["step"]), int(event["steps"])
        status.metrics = dict(event["metrics"])
        status.eta_s = event.get("eta_s")
        status.images_per_s, status.loader_wait, status.workers = (
            group.images_per_s,
            group.loader_wait,
            [*group.workers],
        )

    @staticmethod
    def _on_epoch(status: Status, event: Mapping[str, Any]) -> None:
        status.validation, status.validation_step = dict(event["metrics"]), int(event["step"])

    @staticmethod
    def _on_restart(status: Status, event: Mapping[str, Any]) -> None:
        status.restarts.append(restart_words(event))
        status.restart_times.append(float(event["time"]))

    @staticmethod
    def _on_group(status: Status, event: Mapping[str, Any]) -> None:
        status.group = {key: value for key, value in event.items() if key not in ("event", "time")}
