"""The one loop: every stage of every run goes through `fit`, in one process or many."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from arae.data.augment import augment
from arae.data.load import stream
from arae.errors import Stopped
from arae.seeds import mix
from arae.train import faults
from arae.train.course import Course, go_back, go_back_to_best, resume, take_best
from arae.train.encoder import EncoderTrainer
from arae.train.meter import Meter, hosts_of
from arae.train.micro import Micro
from arae.train.probe import SIZE
from arae.train.saving import Saver
from arae.train.stage import Fit, Trainer, digest_of_stage, order_seed
from arae.train.state import Saved

SCORES = ("robust_accuracy", "clean_accuracy", "psnr")  # of what is measured, the first there is; higher is better
SURE = 3.0  # standard errors
WORD_S = 1.0  # how often, about, the workers agree whether to stop or to save


def fit(trainer: Trainer, run: Fit) -> float:
    """Train a stage from its newest state to its end; returns the seconds its steps took, earlier runs counted in.

    Raises Stopped after saving where a stop was asked for; AraeError where the loss is no number; InputError where a
    step does not fit into the device's memory; OSError where the state can't be written.
    """
    course = resume(trainer, run)
    with Saver(
        run.folder.state,
        stage=trainer.name,
        digest=digest_of_stage(trainer.name, run),
        keep=run.recipe.state.keep,
        tell=lambda saved, seconds: tell_saved(run, course, saved, seconds),
    ) as saver:
        meter = Meter(run.engine, course.seconds, hosts_of(run.engine))
        if run.recipe.state.not_finite == "rollback" and not course.step:
            save(trainer, run, course, meter, saver)  # there must be something to go back to
        while True:
            try:
                with faults.memory_told(run.recipe, trainer.name, run.source, run.engine):
                    advance(trainer, run, course, meter, saver)
                break
            except faults.LostNumbers as lost:
                saver.wait()
                course = go_back(trainer, run, course, lost)
                meter.restart()
            except faults.Overfitted as lost:
                saver.wait()
                assert isinstance(trainer, EncoderTrainer)
                course = go_back_to_best(trainer, run, course, lost)
                meter.restart()
                # At once: a run that is killed now goes on with the new attack.
                save(trainer, run, course, meter, saver, course.best)
    if run.part.export == "best":
        take_best(trainer, run)
    return meter.seconds


def advance(trainer: Trainer, run: Fit, course: Course, meter: Meter, saver: Saver) -> None:
    """The steps from `course.step` on, to the stage's end."""
    batches = micro_batches(trainer.name, run, course.step)
    own = len(run.engine.share(run.part.batch // run.part.micro, trainer.name))
    saved_at, word_every = time.monotonic(), 1
    for step in range(course.step, run.total):
        with meter.waiting():
            micros = [next(batches) for _ in range(own)]
        if step not in course.left_out:
            run.engine.begin()
            meter.add(step, trainer.step(step, micros), own * run.part.micro)
        done = course.step = step + 1
        if done <= course.watched:
            refuse_no_number(trainer, run, course, meter)
        saver.check()
        at_interval = done % run.interval == 0 or done == run.total
        if at_interval and meter.steps:
            report(trainer, run, course, meter)
            word_every = max(1, min(run.interval, int(WORD_S / meter.step_s)))
        score = check(trainer, run, course, meter) if ends_epoch(run, done) else None
        if overfitted(trainer, course, score):
            raise faults.Overfitted(done, score or 0.0, course.best or 0.0)
        # Workers must agree to stop or to save, which costs them a word: about one a second.
        stopping = late = False
        if at_interval or done % word_every == 0:
            stopping, late = run.engine.any(run.stop(), is_late(run, saved_at))
        better = score is not None and (course.best is None or score > course.best)
        if done % run.recipe.state.every == 0 or stopping or late or better or done == run.total:
            save(trainer, run, course, meter, saver, score)
            saved_at = time.monotonic()
        if stopping and done < run.total:
            saver.wait()
            raise Stopped(
                f"stopped at step {done} of {run.total} of the {trainer.name}; the same command goes on from there"
            )


def is_late(run: Fit, saved_at: float) -> bool:
    """Whether the recipe's minutes have passed since the last state; by rank 0's clock."""
    minutes = run.recipe.state.minutes
    return run.log.active and minutes is not None and time.monotonic() - saved_at > 60 * minutes


def micro_batches(stage: str, run: Fit, first: int) -> Iterator[Micro]:
    """This worker's micro-batches from step `first` on, augmented, in order."""
    per_step = run.part.batch // run.part.micro
    own = run.engine.share(per_step, stage)
    data, n = run.data, run.source.n
    chunk = max(1, n // run.part.batch)  # an epoch of ids at a time, not ninety
    for start in range(first, run.total, chunk):
        stop = min(start + chunk, run.total)
        ids = stream(n, run.part.batch, order_seed(stage, run), start, stop)
        ids = ids.reshape(stop - start, per_step, run.part.micro)
        flat = ids[:, own.start : own.stop].reshape(-1, run.part.micro)
        for i, images in enumerate(run.source.batches(flat)):
            where = torch.from_numpy(flat[i])
            labels = run.source.labels[where % n].to(run.engine.device, non_blocking=True)
            ready = augment(
                images, where.to(images.device), data.augment, data.pad, mix(run.recipe.seed, "augment", stage)
            )
            ready = ready.to(run.engine.device, run.engine.images_dtype, memory_format=torch.channels_last)
            yield Micro(ready, labels, own.start + i % len(own), per_step)


def report(trainer: Trainer, run: Fit, course: Course, meter: Meter) -> None:
    """Tell the interval's means; raises LostNumbers where a loss is no number."""
    refuse_no_loss(course, meter)
    told, done = meter.interval(), course.step
    epoch, left = done * run.part.batch / run.source.n, (run.total - done) * meter.step_s
    fields = {"stage": trainer.name, "step": done, "steps": run.total, "epoch": epoch, "eta_s": round(left, 3)}
    run.log.emit("interval", **fields, **told)


def refuse_no_loss(course: Course, meter: Meter) -> None:
    """LostNumbers for the first step whose loss is NaN or infinite; every worker must call it."""
    for step, loss in meter.losses():
        if not math.isfinite(loss):
            raise faults.LostNumbers(step, loss, exact=step < course.watched)  # the weights before it were looked at


def refuse_no_number(trainer: Trainer, run: Fit, course: Course, meter: Meter) -> dict[str, Any]:
    """The trainer's state; LostNumbers where a loss, or a number in it, is NaN or infinite. Every worker must call it.

    Losses tell of weights one step late: where all of them are numbers and the weights are not, it was the last update.
    """
    refuse_no_loss(course, meter)
    state = trainer.state()
    if any(run.engine.any(not all_finite(state))):
        raise faults.LostNumbers(course.step - 1, math.nan, exact=True)
    return state


def overfitted(trainer: Trainer, course: Course, score: float | None) -> bool:
    """Whether a guarded encoder's robust accuracy has collapsed, by more than as few images can tell.

    Not while the radius warms up: robustness at the whole radius says nothing yet.
    """
    if not isinstance(trainer, EncoderTrainer) or score is None or course.best is None:
        return False
    part, best = trainer.part, course.best
    warming = course.step < part.radius_warmup * trainer.total
    if part.guard is None or trainer.hardened or not part.attack.eps or warming:
        return False
    return score < part.guard.below * best and best - score > SURE * math.sqrt(best * (1 - best) / SIZE)


def ends_epoch(run: Fit, done: int) -> bool:
    """Whether to validate after this step: at the stage's end, and as often as the recipe says, or after epochs, about
    ten times in a stage."""
    if done == run.total:
        return True
    if (looks := run.recipe.evaluate.looks) is not None:
        return done * looks // run.total > (done - 1) * looks // run.total
    n, batch = run.source.n, run.part.batch
    every = max(1, run.total * batch // n // 10)
    return (done * batch // n) // every > ((done - 1) * batch // n) // every


def check(trainer: Trainer, run: Fit, course: Course, meter: Meter) -> float | None:
    """Measure on held-out images and tell it; returns the score that states are compared by, on every worker."""
    score, done = None, course.step
    with meter.paused():
        refuse_no_number(trainer, run, course, meter)
        with trainer.learner.whole():  # one worker measures, which could not ask the others for weights
            if run.log.active:
                measured = run.validate(done)
                epoch = round(done * run.part.batch / run.source.n, 2)
                passed = {"step": done, "epoch": epoch, "seconds": round(meter.seconds, 3)}
                score = next((measured[name] for name in SCORES if name in measured), None)
                collapsed = {"overfitted": True} if overfitted(trainer, course, score) else {}
                run.log.emit("epoch", stage=trainer.name, **passed, metrics=meter.epoch() | measured, **collapsed)
            return run.engine.told(score)


def save(trainer: Trainer, run: Fit, course: Course, meter: Meter, saver: Saver, score: float | None = None) -> None:
    """Begin to write the state; rank 0 alone, for it is of all workers. LostNumbers where it holds no numbers."""
    with meter.saving():
        state = refuse_no_number(trainer, run, course, meter)
        if score is not None and (course.best is None or score > course.best):
            course.best = score
        if run.log.active:
            payload = {
                "trainer": state,
                "seconds": meter.seconds,
                "images": run.images,
                "precision": run.engine.precision,
                "left_out": course.left_out,
                "best": course.best,
            }
            saver.save(payload, course.step, score)


def all_finite(value: Any) -> bool:
    """Whether no tensor of a state holds NaN or infinity."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(all_finite(one) for one in value.values())
    return all(all_finite(one) for one in value) if isinstance(value, list | tuple) else True


def tell_saved(run: Fit, course: Course, saved: Saved, seconds: float) -> None:
    """A state is safe on disk."""
    best = saved.score is not None and saved.score == course.best
    run.log.emit("state", stage=saved.stage, step=saved.step, best=best, seconds=round(seconds, 3))
