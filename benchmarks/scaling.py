"""Scaling over workers, measured on your own cluster: the checks of what can't be run on one machine without GPUs.

    python -m benchmarks.scaling --address auto --workers 1,2,4,8 imagenet-alexnet data.train=/shared/train.beton …

For each number of workers it trains the recipe's stages for `--steps` steps twice: `strong`, with the recipe's own
batch, and `weak`, with a batch that grows with the workers; and it times `all_reduce`, by NCCL and by gloo where there
are GPUs. It checks
- that every number of workers computes the same (the losses of the strong runs, within a bound of the precision);
- that all groups agree on one precision, also where V100 and A100 are mixed;
- efficiency, waiting for the loader, stragglers; that NCCL is faster than gloo;
and writes one JSON record (`--out`; default `<runs>/scaling/<recipe>.json`) after every run: cut short, the same
command goes on. Exit code 0: every check passed; 1: one did not; 2: bad input. Nothing else should run meanwhile.

Without `--address` it starts Ray on this machine: `--workers 1,2` on two CPU cores is what benchmarks/results/scaling
holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arae import provenance
from arae.config import Recipe, dump_recipe, load_recipe
from arae.errors import AraeError, InputError
from arae.launch import Where, launch
from arae.models.autoencoder import read_config
from arae.runs import RunFolder, runs_root
from benchmarks.collectives import SIZES, measure
from benchmarks.scaled import KINDS, Kind, Scaling, ScalingRun, checks, efficiency, stage_run


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, write the record, print it; returns the exit code."""
    options = arguments().parse_intermixed_args(words)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        numbers = sorted({int(number) for number in options.workers.split(",")})
        path = Path(options.out) if options.out else runs_root() / "scaling" / f"{recipe.name}.json"
        where = Where(
            workers=numbers[0],
            address=options.address,
            gpus=options.gpus,
            cpus=options.cpus,
            placement=options.placement,
            restarts=0,
        )
        record = scale(recipe, numbers, options.steps, where, path, options.kinds.split(","))
    except AraeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for line in lines(record):
        print(line)
    print(f"{path}: the record")
    return 0 if all(check.passed for check in record.checks) else 1


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="Scaling over workers.")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--workers", default="1,2,4,8", help="numbers of workers, with commas")
    parser.add_argument("--kinds", default="strong,weak", choices=("strong,weak", "strong", "weak"))
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each stage in each run")
    parser.add_argument("--address", help="a running Ray cluster: auto, or ray://host:port")
    parser.add_argument("--gpus", type=int, choices=(0, 1), help="GPUs for each worker")
    parser.add_argument("--cpus", type=int, help="CPU cores for each worker")
    parser.add_argument("--placement", default="pack", choices=("pack", "spread"))
    parser.add_argument("--out", help="the record")
    return parser


def scale(
    recipe: Recipe, numbers: Sequence[int], steps: int, where: Where, path: Path, kinds: Collection[str] = KINDS
) -> Scaling:
    """The record with all that is asked for; what it has already, of the same recipe and steps, is kept."""
    recipe = short(recipe, steps)
    for part in (recipe.encoder, recipe.decoder):
        if part and part.batch // part.micro < numbers[-1]:
            raise InputError(
                f"--workers {numbers[-1]}: a step has {part.batch // part.micro} micro-batches; set micro_batch smaller"
            )
    record = before(path, recipe, steps)
    from cluster.connect import connect

    connect(replace(where, workers=numbers[-1]))
    for number in numbers:
        if record.group(number) is None:
            say(f"all_reduce, {number} workers …")
            record = kept(record, path, groups=(*record.groups, measure(replace(where, workers=number), SIZES)))
        for kind in KINDS:
            if kind in kinds and record.run(kind, number) is None:
                say(f"{kind}, {number} workers …")
                one = run(recipe, kind, numbers[0], replace(where, workers=number), record)
                record = kept(record, path, runs=(*record.runs, one))
    return record


def short(recipe: Recipe, steps: int) -> Recipe:
    """The recipe's stages for so many steps, saved only at their ends."""
    changes = {"name": f"scaling/{recipe.name}", "map": None, "state.every": 10**9, "encoder.epochs": None}
    changes |= {"encoder.steps": steps}
    if recipe.decoder:
        changes |= {"decoder.epochs": None, "decoder.steps": steps}
    return recipe.replace(changes)


def before(path: Path, recipe: Recipe, steps: int) -> Scaling:
    """What was recorded already; InputError where it is of another recipe."""
    fresh = Scaling(recipe=dump_recipe(recipe), digest=recipe.digest, steps=steps, **source())
    if not path.is_file():
        return fresh
    old = Scaling.model_validate_json(path.read_text())
    if (old.digest, old.steps) != (fresh.digest, steps):
        raise InputError(f"{path}: holds another recipe's record, or of other steps; move it away or set --out")
    return old


def kept(record: Scaling, path: Path, **more: object) -> Scaling:
    """The record with more in it, judged anew and written."""
    record = record.model_copy(update=more | source())
    record = record.model_copy(update={"checks": checks(record)})
    record.write(path)
    return record


def source() -> dict[str, Any]:
    """Where a number comes from."""
    return {"versions": provenance.versions(), "git": provenance.git_revision(), "time": provenance.now()}


def run(recipe: Recipe, kind: Kind, least: int, where: Where, record: Scaling) -> ScalingRun:
    """Train once; with the fewest workers weak is strong."""
    workers = where.workers or 1
    if kind == "weak" and workers == least and (done := record.run("strong", least)):
        return done.model_copy(update={"kind": "weak"})
    grown = {
        f"{name}.batch": part.batch * workers // least
        for name, part in (("encoder", recipe.encoder), ("decoder", recipe.decoder))
        if part and kind == "weak"
    }
    # The micro-batch stays, where it was the whole batch too.
    fixed = {"encoder.micro_batch": recipe.encoder.micro}
    fixed |= {"decoder.micro_batch": recipe.decoder.micro} if recipe.decoder else {}
    made = recipe.replace({"name": f"{recipe.name}/{kind}-{workers}"} | grown | fixed)
    folder = RunFolder.of(made)
    shutil.rmtree(folder.path, ignore_errors=True)  # of a run that was cut short: its times would be of two halves
    folder.create(made)
    launch(made, folder, where, lambda event: None)
    events = [json.loads(line) for line in folder.log.read_text().splitlines()]
    config = read_config(folder.model) or {}
    stages = {"encoder": made.encoder} | ({"decoder": made.decoder} if made.decoder else {})
    first = next(event for event in events if event["event"] == "interval")
    return ScalingRun(
        kind=kind,
        workers=workers,
        hosts=tuple(worker["host"] for worker in first["workers"]),
        stages={name: stage_run(events, name, part.batch, config[name]["training"]) for name, part in stages.items()},
    )


def lines(record: Scaling) -> list[str]:
    """The record for a terminal."""
    out = []
    for one in record.runs:
        for name, stage in one.stages.items():
            share = efficiency(record, one.kind, one, name)
            rate = f"{stage.images_per_s:,.1f} images/s, {share:.2f} of perfect"
            out.append(f"{one.kind:<7}{name:<8} {one.workers:>3} workers  {rate}  ({stage.precision}, {stage.device})")
    for group in record.groups:
        for timing in group.timings:
            size = f"{timing.bytes / 2**20:g} MiB"
            took = f"{1000 * timing.seconds:.2f} ms, {timing.bus / 1e9:.2f} GB/s"
            out.append(f"all_reduce {timing.backend} {timing.workers:>3} workers  {size:>8}: {took}")
    return out + [f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {check.said}" for check in record.checks]


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
