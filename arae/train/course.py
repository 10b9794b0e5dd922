"""How far a stage has come: found again in its newest state, and gone back along where a loss is no number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from arae.data.load import stream
from arae.errors import AraeError, InputError
from arae.train import faults
from arae.train.encoder import EncoderTrainer
from arae.train.stage import Fit, Trainer, digest_of_stage, order_seed
from arae.train.state import Saved, best_of, drop_states_after, list_states, newest_state, read_state


@dataclass
class Course:
    """How far a stage has come."""

    step: int = 0
    """Steps made."""
    seconds: float = 0.0
    """That they took, on every machine they were made on."""
    left_out: list[int] = field(default_factory=list)
    """Steps whose batch is passed over, for it once led to a loss that was no number."""
    best: float | None = None
    """The highest score so far on the held-out images."""
    watched: int = 0
    """Up to this step weights are looked at after each update, to find the one that leads out of the numbers."""
    backs: int = 0
    """How often it has gone back."""


def newest(stage: str, run: Fit, before: int | None = None) -> tuple[Saved, dict[str, Any]] | None:
    """The newest good state. Rank 0 reads it for all: what others see of a shared disk may be older."""
    found = newest_state(run.folder.state, stage, run.log.note, before) if run.log.active else None
    return run.engine.told(found)


def resume(trainer: Trainer, run: Fit) -> Course:
    """Set the newest state back, if there is one; returns how far the stage has come."""
    found = newest(trainer.name, run)
    if found is None:
        return Course()
    saved, payload = found
    if saved.digest != digest_of_stage(trainer.name, run):
        raise InputError(
            f"{run.folder.path}: its state is of another recipe (data, seed or {trainer.name} differ); "
            "give this run another name=… or delete the folder"
        )
    if payload["images"] != run.images:
        raise InputError(
            f"{run.folder.path}: its state was trained on other images than data.train holds now; "
            "put those back, give this run another name=… or delete the folder"
        )
    if payload["precision"] != run.engine.precision:
        raise InputError(
            f"{run.folder.path}: its {trainer.name} was begun in {payload['precision']}, and here it would go on in "
            f"{run.engine.precision}: add precision={payload['precision']}"
        )
    trainer.restore(payload["trainer"])
    run.log.note(f"resumed the {trainer.name} at step {saved.step} of {run.total}")
    return course_of(saved, payload)


def course_of(saved: Saved, payload: dict[str, Any]) -> Course:
    """How far a state had come; those of older runs say less."""
    return Course(saved.step, payload["seconds"], list(payload.get("left_out", [])), payload.get("best"))


def go_back(trainer: Trainer, run: Fit, course: Course, lost: faults.LostNumbers) -> Course:
    """By the recipe's policy: the newest good state again, without the batch that led out of the numbers.

    Raises AraeError where the policy is to stop, or where it has been done often enough.
    """
    if run.log.active:
        n, batch, first = run.source.n, run.part.batch, lost.suspects[0]
        ids = stream(n, batch, order_seed(trainer.name, run), first, lost.step + 1)
        faults.write_batches(run.folder, trainer.name, lost, ids, n)
    # Twice for each batch: once to find the step, once without it; and as often for what does not come again.
    tried = len(course.left_out) >= faults.ROLLBACKS or course.backs >= 4 * faults.ROLLBACKS
    found = None if run.recipe.state.not_finite == "stop" or tried else newest(trainer.name, run, before=lost.step)
    if found is None:
        raise faults.lost_numbers(trainer.name, lost, tried=tried) from None
    saved, payload = found
    trainer.restore(payload["trainer"])
    back = course_of(saved, payload)
    back.left_out = sorted({*course.left_out, *back.left_out, *(lost.suspects if lost.exact else [])})
    back.watched, back.backs = max(course.watched, lost.step + 1), course.backs + 1
    then = "that batch is left out" if lost.exact else "looking for the step that leads there"
    run.log.note(
        f"the {trainer.name}'s loss was {lost.loss} at step {lost.step + 1}: gone back to step {saved.step}; {then}, "
        "and not_finite.jsonl names the images"
    )
    return back


def go_back_to_best(trainer: EncoderTrainer, run: Fit, course: Course, lost: faults.Overfitted) -> Course:
    """The state that was best on the held-out images again, and from there on the attack that the guard names.

    Later states are removed, for a run that goes on would begin with the newest. AraeError where no state can be read.
    """
    found = best_state(trainer.name, run)
    if found is None:
        raise AraeError(
            f"the {trainer.name}'s robust accuracy fell from {lost.best:.3g} to {lost.score:.3g} by step {lost.step} "
            "(catastrophic overfitting), and no state from before can be read; give encoder.attack more steps, under "
            "another name=…"
        )
    saved, payload = found
    if run.log.active:
        drop_states_after(run.folder.state, trainer.name, saved.step)
    trainer.restore(payload["trainer"])
    trainer.harden()
    assert trainer.part.guard is not None
    run.log.note(
        f"the {trainer.name}'s robust accuracy fell from {lost.best:.3g} to {lost.score:.3g} by step {lost.step} "
        f"(catastrophic overfitting): gone back to step {saved.step}, and on with PGD of {trainer.part.guard.steps} "
        "steps"
    )
    back = course_of(saved, payload)
    back.best = saved.score  # a better one may have been damaged
    back.left_out = sorted({*course.left_out, *back.left_out})
    back.watched, back.backs = course.watched, course.backs
    return back


def best_state(stage: str, run: Fit) -> tuple[Saved, dict[str, Any]] | None:
    """The state that was best on the held-out images; the next best where it is damaged. Rank 0 reads it for all."""
    found = None
    if run.log.active:
        scored = [s for s in list_states(run.folder.state) if s.stage == stage and s.score is not None]
        while found is None and (best := best_of(scored)):
            scored.remove(best)
            payload = read_state(run.folder.state, best, run.log.note)
            found = None if payload is None else (best, payload)
    return run.engine.told(found)


def take_best(trainer: Trainer, run: Fit) -> None:
    """Set back the state that was best on the held-out images, to be exported."""
    found = best_state(trainer.name, run)
    if found is None:
        run.log.note(f"no scored state of the {trainer.name} can be read: its last weights are exported")
        return
    best, payload = found
    run.log.note(f"the {trainer.name} of step {best.step} is exported, the best kept ({best.score:.4g})")
    trainer.restore(payload["trainer"])
