"""What a scaling run is kept as, and the checks that it must pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from arae.config import Part
from arae.files import write_text
from benchmarks.collectives import Group

Kind = Literal["strong", "weak"]
COMPARED = 10  # steps: PGD amplifies rounding, and what differs by more than it differs from the first step on
BOUNDS = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
KINDS: tuple[Kind, ...] = ("strong", "weak")
LEAST = {"strong": 0.5, "weak": 0.8}
MOST_WAITING, MOST_STRAGGLING = 0.1, 1.25
WARM = 0.2  # share of the steps that is not timed


class StageRun(Part):
    """One stage at one number of workers."""

    steps: int
    batch: int
    losses: tuple[float, ...]
    """Of each interval, the group's mean."""
    images_per_s: float
    """Of the group, median over the intervals timed."""
    work_s: tuple[float, ...]
    """Of each worker, by rank: seconds of its own in a step, before the workers meet."""
    step_s: float
    wait_share: float
    """Of a step, spent waiting for the loader, by the worker that waits longest."""
    precision: str
    device: str


class ScalingRun(Part):
    """Both stages at one number of workers; `weak`: the batch grows with it."""

    kind: Kind
    workers: int
    hosts: tuple[str, ...]
    stages: dict[str, StageRun]


class Check(Part):
    """One thing that must hold."""

    name: str
    passed: bool
    said: str


class Scaling(Part):
    """The whole record: what `python -m benchmarks.scaling` writes, after each run anew."""

    recipe: str
    digest: str
    steps: int
    runs: tuple[ScalingRun, ...] = ()
    groups: tuple[Group, ...] = ()
    checks: tuple[Check, ...] = ()
    versions: dict[str, str]
    git: str
    time: str

    def run(self, kind: Kind, workers: int) -> ScalingRun | None:
        """The run that was made, if it was."""
        return next((one for one in self.runs if (one.kind, one.workers) == (kind, workers)), None)

    def group(self, workers: int) -> Group | None:
        """The group that was measured, if it was."""
        return next((one for one in self.groups if len(one.places) == workers), None)

    def write(self, path: Path) -> None:
        """As JSON, all or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.model_dump_json(indent=1) + "\n")


def stage_run(events: Sequence[Mapping[str, Any]], stage: str, batch: int, training: Mapping[str, Any]) -> StageRun:
    """What a run's log says of a stage; `training`: of the model folder's entry, what it was trained on."""
    intervals = [e for e in events if e["event"] == "interval" and e["stage"] == stage]
    timed = [e for e in intervals if e["step"] > WARM * e["steps"]]
    workers = [sorted(e["workers"], key=lambda worker: worker["rank"]) for e in timed]
    work = tuple(median(worker["work_s"] for worker in each) for each in zip(*workers, strict=True))
    step_s = median(e["step_s"] for e in timed)
    return StageRun(
        steps=intervals[-1]["steps"],
        batch=batch,
        losses=tuple(e["metrics"]["loss"] for e in intervals),
        images_per_s=median(e["images_per_s"] for e in timed),
        work_s=work,
        step_s=step_s,
        wait_share=median(max(worker["wait_s"] for worker in each) for each in workers) / step_s,
        precision=training["precision"],
        device=training["device"],
    )


def efficiency(record: Scaling, kind: Kind, run: ScalingRun, stage: str) -> float:
    """Images a second over those of the fewest workers, per worker: 1 is perfect."""
    first = least_run(record, kind)
    share = run.workers / first.workers
    return run.stages[stage].images_per_s / first.stages[stage].images_per_s / share


def least_run(record: Scaling, kind: Kind) -> ScalingRun:
    """The run of fewest workers."""
    return min((run for run in record.runs if run.kind == kind), key=lambda run: run.workers)


def checks(record: Scaling) -> tuple[Check, ...]:
    """Everything that can be judged from what the record holds so far."""
    return (*_numbers(record), *_precisions(record), *_speeds(record), *_backends(record))


def _numbers(record: Scaling) -> Iterable[Check]:
    """The same global numbers at each number of workers, where the batch is the same."""
    strong = [run for run in record.runs if run.kind == "strong"]
    for run in strong[1:]:
        for name, stage in run.stages.items():
            first = strong[0].stages[name]
            pairs = list(zip(stage.losses[:COMPARED], first.losses[:COMPARED], strict=True))
            apart = max(abs(own - other) / abs(other) for own, other in pairs)
            bound = BOUNDS[stage.precision]
            said = f"losses of the first {len(pairs)} reports differ by at most {apart:.1e} (bound {bound:.0e})"
            yield Check(name=f"same numbers, {name}, {run.workers} workers", passed=apart <= bound, said=said)
            moved = abs(stage.losses[-1] - stage.losses[0]) > bound * abs(stage.losses[0])
            said = f"from {stage.losses[0]:.4g} to {stage.losses[-1]:.4g}"
            yield Check(name=f"losses move, {name}, {run.workers} workers", passed=moved, said=said)


def _precisions(record: Scaling) -> Iterable[Check]:
    """One precision in all runs: a mixed group must not change what is computed unnoticed."""
    found = {stage.precision for run in record.runs for stage in run.stages.values()}
    devices = sorted({place.device for group in record.groups for place in group.places})
    if found:
        said = f"{', '.join(sorted(found))} on {', '.join(devices) or 'devices that were not asked'}"
        yield Check(name="one precision", passed=len(found) == 1, said=said)


def _speeds(record: Scaling) -> Iterable[Check]:
    for run in record.runs:
        least = LEAST[run.kind]
        for name, stage in run.stages.items():
            what = f"{run.kind}, {name}, {run.workers} workers"
            share = efficiency(record, run.kind, run, name)
            if run.workers > least_run(record, run.kind).workers:
                said = f"{share:.2f} of perfect (at least {least})"
                yield Check(name=f"efficiency, {what}", passed=share >= least, said=said)
            said = f"{100 * stage.wait_share:.1f} % of a step (at most {100 * MOST_WAITING:.0f} %)"
            yield Check(name=f"waiting for the loader, {what}", passed=stage.wait_share <= MOST_WAITING, said=said)
            if run.workers > 1:
                ratio = max(stage.work_s) / median(stage.work_s)
                rank = stage.work_s.index(max(stage.work_s))
                said = f"the slowest, rank {rank} on {run.hosts[rank]}, takes {ratio:.2f} × the median"
                yield Check(name=f"stragglers, {what}", passed=ratio <= MOST_STRAGGLING, said=said)


def _backends(record: Scaling) -> Iterable[Check]:
    """NCCL must be the faster one: where it is not, it does not use the network it should."""
    for group in record.groups:
        best = {t.backend: t for t in sorted(group.timings, key=lambda timing: timing.bytes)}
        if {"nccl", "gloo"} <= set(best) and len(group.places) > 1:
            nccl, gloo = (best[name].bus / 1e9 for name in ("nccl", "gloo"))
            said = f"{nccl:.2f} GB/s against {gloo:.2f} GB/s at {best['nccl'].bytes / 2**20:.0f} MiB"
            yield Check(name=f"NCCL over gloo, {len(group.places)} workers", passed=nccl > gloo, said=said)
