"""One trial, wherever Ray Tune has put it: its stages made sure of, its records written, its driver told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arae.config import Recipe
from arae.errors import Busy, Stopped
from arae.evaluate import evaluate
from arae.launch import Where
from arae.records import Record, write_records
from arae.runs import RunFolder, runs_root
from arae.session import Session, session
from arae.storage import is_url, runs_place
from arae.tracking import Family
from arae.train.log import Event
from arae.train.loop import SCORES
from tune.results import objectives_of
from tune.store import Measure, Outcome, Stage, Work, stages_of

STOP = ".stop"
"""File in the sweep's folder that asks all its trials to save and end."""
LOOK_S = 1.0

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Task:
    """All that a trial is told."""

    id: str
    sweep: str
    """Name of the sweep: its run folder's, and its experiment's in MLflow."""
    label: str
    values: Mapping[str, Any]
    recipe: Mapping[str, Any]
    where: Mapping[str, Any]
    cwd: str
    """Where relative paths begin."""
    limits: Mapping[str, float]
    """Of each stage, up to which share of its steps it may be trained."""
    gpu_elsewhere: bool = False
    """Measure in a task of Ray's that has a GPU: the trial itself has none, for its workers have them."""

    def config(self) -> dict[str, Any]:
        """As Ray Tune hands it on."""
        return {"task": asdict(self)}


class Voice:
    """What a trial tells the driver; and whether it has come as far as it may."""

    def __init__(self, tell: Tell, limits: Mapping[str, float]) -> None:
        self._tell, self._limits = tell, limits
        self._steps = 0
        self.stage: Stage | None = None
        self.pause: dict[str, Any] | None = None
        """Where it has: the stage's step and score there."""

    def __call__(self, event: Event) -> None:
        """An event of a training: looks at held-out images are handed on, and may be the last that is wanted now."""
        if self.stage is None or self.pause is not None or event.get("stage") != self.stage.name:
            return
        if event["event"] == "stage" and event["state"] == "started":
            self._steps = event["steps"]
        elif event["event"] == "epoch" and not event.get("overfitted"):  # then training goes back to before it
            metrics, step = event["metrics"], event["step"]
            score = next((metrics[name] for name in SCORES if name in metrics), None)
            self.tell({"step": step, "steps": self._steps, "score": score})
            limit = self._limits[self.stage.name]
            if limit * self._steps - 1e-6 <= step < self._steps:
                told = {"step": step, "score": score, "share": limit, "seconds": event.get("seconds", 0.0)}
                self.pause = self.of_stage(told)

    def tell(self, values: dict[str, Any]) -> None:
        """Tell the driver how the stage stands."""
        self._tell(self.of_stage(values))

    def of_stage(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values with the stage that they are of."""
        assert self.stage is not None
        return {"stage": self.stage.name, "key": self.stage.key, "group": self.stage.group, **values}


def run_trial(config: dict[str, Any]) -> None:
    """The function that Ray Tune calls, in a thread of an actor that is used again for the next trial."""
    from ray import tune

    task = Task(**config["task"])
    if os.path.isdir(task.cwd):
        os.chdir(task.cwd)
    voice = Voice(tune.report, task.limits)
    asked = runs_root() / task.sweep / STOP
    try:
        tune.report({"step": 0, "objectives": perform(task, voice, asked)})
    except Stopped as stopped:
        tune.report({"step": 0, **_said(voice, asked, stopped)})


def _said(voice: Voice, asked: Path, stopped: Stopped) -> dict[str, Any]:
    """Why a trial has stopped: it was asked to, has come as far as it may, or its storage or workers went away."""
    if asked.exists():
        return {"asked": True}
    if voice.pause is not None:
        return {"pause": voice.pause}
    return {"halt": str(stopped)}


def perform(task: Task, voice: Voice, asked: Path) -> dict[str, float]:
    """Do a trial's work; returns its objectives. `asked`: a file that asks it to save and end.

    Raises what training and measuring raise, and Stopped where a stage has come as far as it may.
    """
    recipe = Recipe.model_validate(task.recipe)
    named = recipe.replace({"name": f"{task.sweep}/{task.id}", "map": None})
    family = Family(
        task.sweep,
        task.label,
        task.values,
        {"stage": "trial", "trial": task.id, "sweep": task.sweep},
        delivered=is_url(runs_place()),
    )
    outcomes, records = list[Outcome](), list[Record]()
    with ExitStack() as stack:
        run = _own(stack, lambda: session(named, task.sweep, family=family), asked)
        work = Work(
            where=Where(**task.where),
            parent=named.name,
            experiment=task.sweep,
            measure=_measure(task, run),
            listener=voice,
            note=run.progress.note,
            stop=_stop(voice, asked),
            limits=task.limits,
        )
        for stage in stages_of(recipe):
            voice.stage = stage
            outcome, found = work.ensure(stage)
            outcomes.append(outcome)
            records += found
            voice.tell({"step": outcome.steps, "steps": outcome.steps, "outcome": asdict(outcome)})
        write_records(run.folder.records, records)
        run.tracker.log_records(records)
    return objectives_of(records, outcomes)


def _own(stack: ExitStack, opened: Callable[[], AbstractContextManager[Session]], asked: Path) -> Session:
    """The trial's folder, once nobody else has it: a driver that was killed leaves its trials behind for a moment."""
    while True:
        try:
            return stack.enter_context(opened())
        except Busy:
            if asked.exists():
                raise Stopped("stopped while another process held the trial's folder") from None
            time.sleep(LOOK_S)


def _stop(voice: Voice, asked: Path) -> Callable[[], bool]:
    """Whether the trial has come as far as it may, or all are to end; the file is looked for about once a second."""
    looked, found = 0.0, False

    def stop() -> bool:
        nonlocal looked, found
        if not found and time.monotonic() - looked > LOOK_S:
            looked, found = time.monotonic(), asked.exists()
        return voice.pause is not None or found

    return stop


def _measure(task: Task, run: Session) -> Measure:
    """How a stage is measured: here, or in a task of Ray's that has the GPU which the trial itself lacks."""

    def here(recipe: Recipe, folder: RunFolder) -> list[Record]:
        device = Where(**task.where).torch_device()
        return evaluate(recipe, folder, device, run.progress.task, run.progress.note)

    def elsewhere(recipe: Recipe, folder: RunFolder) -> list[Record]:
        import ray

        made = ray.remote(num_gpus=1, num_cpus=0)(measure_there).remote(recipe.model_dump(mode="json"), task.cwd)
        return [Record.model_validate(one) for one in ray.get(made)]

    return elsewhere if task.gpu_elsewhere else here


def measure_there(recipe: Mapping[str, Any], cwd: str) -> list[dict[str, Any]]:
    """Measure a stage of the store on another process's GPU; what is returned are its records."""
    import torch

    from arae.storage import fetched

    if os.path.isdir(cwd):
        os.chdir(cwd)
    made = Recipe.model_validate(recipe)
    folder = RunFolder(fetched(RunFolder.of(made).path))
    return [record.model_dump(mode="json") for record in evaluate(made, folder, torch.device("cuda"))]
