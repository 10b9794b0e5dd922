"""Peak memory of a training step as `plan` predicts it, beside what a process really held.

Measured on a CPU: each case in a process of its own, one thread, which first trains the smallest network for a step (so
that libraries are loaded and kernels compiled) and then the case for two: by how much its resident memory rose at most,
from before the networks were made (`VmHWM` of Linux). What is freed is given back to the system at once
(`MALLOC_MMAP_THRESHOLD_`), so that what is counted is what is held; as a process usually keeps some of it for later,
its own figure, without that setting, is told beside it. n = 3 processes of each kind.

`python -m benchmarks.memory` takes some minutes, writes `results/memory/steps.json`, and prints the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from arae.config import Part, Recipe
from arae.cost import Networks
from arae.files import write_text
from arae.footprint import footprint, one_step, without_unused
from benchmarks.harness import RESULTS, Made, here

OUT = RESULTS / "memory" / "steps.json"
ROUNDS = 3
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ATTACK = {"norm": "l2", "eps": 1.0, "steps": 2}
LOSSES = {"pixel": 1.0, "feature": 0.01, "adversarial": 0.001}
CASES: dict[str, tuple[str, tuple[int, int, int], dict[str, Any]]] = {
    "encoder small-cnn, 1024 images of 32 px": ("encoder", (3, 32, 32), {"encoder.batch": 1024}),
    "encoder ResNet-18, 64 images of 32 px": (
        "encoder", (3, 32, 32), {"encoder.name": "resnet18-cifar", "encoder.layer": "layer4", "encoder.batch": 64},
    ),
    "encoder AlexNet, 64 images of 224 px": (
        "encoder", (3, 224, 224), {"encoder.name": "alexnet", "encoder.layer": "conv5", "encoder.batch": 64},
    ),
    "decoder conv5, 32 images of 224 px": (
        "decoder", (3, 224, 224),
        {"encoder.name": "alexnet", "encoder.layer": "conv5", "decoder.name": "alexnet-conv5", "decoder.batch": 32},
    ),
    "the same, in 4 micro-batches": (
        "decoder", (3, 224, 224),
        {"encoder.name": "alexnet", "encoder.layer": "conv5", "decoder.name": "alexnet-conv5", "decoder.batch": 32,
         "decoder.micro_batch": 8},
    ),
    "encoder AlexNet, 64 images in 4 micro-batches": (
        "encoder", (3, 224, 224),
        {"encoder.name": "alexnet", "encoder.layer": "conv5", "encoder.batch": 64, "encoder.micro_batch": 16},
    ),
    "decoder conv5, 32 images, recomputed in 4 parts": (
        "decoder", (3, 224, 224),
        {"encoder.name": "alexnet", "encoder.layer": "conv5", "decoder.name": "alexnet-conv5", "decoder.batch": 32,
         "decoder.recompute": 4},
    ),
}  # fmt: skip


class Case(Part):
    """One step; bytes."""

    predicted: int
    held: tuple[int, ...]
    """By process."""
    kept: tuple[int, ...]
    """The same, as a process usually is."""


class Record(Made):
    """What `results/memory/steps.json` holds."""

    about: str
    precision: str
    cases: dict[str, Case]


def recipe_of(name: str) -> Recipe:
    """The recipe of a case, in float32; as the case says."""
    document: dict[str, Any] = {
        "name": "memory",
        "precision": "fp32",
        "data": {"name": "fashion-mnist"},
        "encoder": {"name": "small-cnn", "layer": "conv4", "steps": 2, "batch": 8, "lr": 0.1, "attack": ATTACK},
        "decoder": {"name": "mirror", "steps": 2, "batch": 8, "losses": LOSSES},
    }
    return Recipe.model_validate(document).replace(CASES[name][2] if name else {})


def step(name: str) -> None:
    """Body of the process: prints the bytes by which it rose."""
    torch.set_num_threads(1)
    stage, shape, _ = CASES[name]
    one_step(without_unused(Networks(recipe_of(""), (3, 32, 32), 10), stage), stage)
    gc.collect()
    before = _of_proc("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    one_step(without_unused(Networks(recipe_of(name), shape, 10), stage), stage)
    print(_of_proc("VmHWM") - before)


def _of_proc(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def risen(name: str, **settings: str) -> int:
    """What a new process says."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--step", name]
    return int(subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, text=True).stdout)


def measured(name: str) -> Case:
    """One case."""
    stage, shape, _ = CASES[name]
    predicted = footprint(Networks(recipe_of(name), shape, 10), stage, torch.device("cpu"))
    held, kept = (tuple(risen(name, **given) for _ in range(ROUNDS)) for given in (GIVEN_BACK, {}))
    return Case(predicted=sum(predicted.values()), held=held, kept=kept)


def table(record: Record) -> list[str]:
    """A row for each case, in Markdown."""
    rows = ["| Step | predicted | held | predicted / held | kept by the process |", "|---|---|---|---|---|"]
    for name, case in record.cases.items():
        held, kept = median(case.held), median(case.kept)
        sizes = " | ".join(f"{size / 2**20:,.0f} MiB" for size in (case.predicted, held))
        rows.append(f"| {name} | {sizes} | {case.predicted / held:.2f} | {kept / 2**20:,.0f} MiB |")
    return rows


def off(record: Record) -> list[float]:
    """By how much of what was held each prediction is off."""
    return [abs(case.predicted / median(case.held) - 1) for case in record.cases.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--step", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.step:
        step(given.step)
        return
    cases = dict[str, Case]()
    for name in CASES:
        print(f"{name} …", file=sys.stderr, flush=True)
        cases[name] = measured(name)
    record = Record(
        about=" ".join((__doc__ or "").split("\n\n")[1].split()),
        precision="fp32",
        cases=cases,
        **here(torch.device("cpu")),
    )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    write_text(OUT, json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
    print("\n".join(table(record)))


if __name__ == "__main__":
    main()
