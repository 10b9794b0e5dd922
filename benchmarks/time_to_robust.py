"""Time to a robust accuracy: adversarial training made cheaper, against PGD-7.

Measured, by really training `arae train`'s loop in one process of one thread: the CPU seconds of all its steps (the
steps that a guard throws away too; not what looks at held-out images), and the robust accuracy at the end on every
other test image, 5,000, which were held out: APGD-CE, 50 steps, in float32. On the way, at ten points, that of 1,000
images under PGD-10, for the curves. small-cnn at half its width on 6,000 images of Fashion-MNIST.

- `l2`, radius 0.5: every recipe against PGD-7 (34 epochs), pairwise on the same images. Each has its schedule fall to
  zero at its own end, so a shorter training is one that was meant to be short.
- `linf`, radius 0.25, reached after 0.3 of a training (at once, already PGD-7 at radius 0.2 stayed at the level of
  chance): what single steps can do to a training (catastrophic overfitting), and what guards against it.

n = 3 seeds each, the recipes of a seed one after the other; no warm-up, as a run is thousands of steps.
`python -m benchmarks.time_to_robust` makes the runs that the record lacks (all: about an hour on two cores, one run on
each), writes `results/time-to-robust/fashion-mnist.json` after each, and prints the table.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from arae import provenance
from arae.attacks import Threat, apgd
from arae.attacks.gradient import perturb
from arae.config import Attack, Part, Recipe
from arae.data.augment import to_float
from arae.data.encode import EncodeOptions, encode
from arae.data.load import open_source
from arae.files import write_text
from arae.models.encoder import Encoder
from arae.modes import evaluating
from arae.runs import RunFolder
from arae.train import run as training
from arae.train.encoder import EncoderTrainer
from arae.train.micro import Micro
from benchmarks.harness import RESULTS, Made, here

OUT = RESULTS / "time-to-robust" / "fashion-mnist.json"
SEEDS = (1, 2, 3)
LOOKS, LOOKED_AT = 10, 1000
JUDGE = 50
"""Steps of the APGD that has the last word."""
LESS = 0.01
"""By how much a cheap recipe may be less robust than PGD-7."""

BASE: dict[str, Any] = {
    "name": "time",
    "data": {"name": "fashion-mnist", "limit": 6000},
    "encoder": {
        "name": "small-cnn",
        "width": 0.5,
        "steps": 1600,
        "batch": 128,
        "lr": 0.05,
        "weight_decay": 5e-4,
        "schedule": {"kind": "linear", "warmup": 0.1},
    },
    "evaluate": {"looks": 20},
    "state": {"every": 1000},
}
TASKS: dict[str, Attack] = {
    "l2": Attack(norm="l2", eps=0.5, steps=7),
    "linf": Attack(norm="linf", eps=0.25, steps=7),
}
ONE = {"attack.steps": 1}
WARM = {"steps": 1200, "radius_warmup": 0.3}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "l2": {
        "PGD-7": {},
        "PGD-7, third as long": {"steps": 530},
        "PGD-2": {"attack.steps": 2, "steps": 1250},
        "PGD-2, small images first": {"attack.steps": 2, "steps": 1400, "phases": [{"until": 0.3, "scale": 0.5}]},
        "1, 2, 7 steps": {"steps": 1200, "phases": [{"until": 0.5, "steps": 1}, {"until": 0.85, "steps": 2}]},
        "FGSM": ONE | {"attack.step_size": 0.5},
        "N-FGSM": ONE | {"noise": 1.0},
        "free-4": ONE | {"replays": 4, "steps": 530},
    },
    "linf": {
        "PGD-7": WARM,
        "FGSM": WARM | ONE | {"attack.step_size": 0.25},
        "FGSM, guarded": WARM | ONE | {"attack.step_size": 0.25, "guard": {"below": 0.7}},
        "N-FGSM": WARM | ONE | {"noise": 2.0},
    },
}


class Point(Part):
    """A look at a network in training."""

    step: int
    seconds: float
    """CPU seconds of training until then."""
    clean: float
    robust: float
    """Under PGD-10, on 1,000 held-out images."""


class Run(Part):
    """One training."""

    task: str
    recipe: str
    seed: int
    seconds: float
    """CPU seconds of all steps."""
    steps: int
    """That were made."""
    points: tuple[Point, ...]
    clean: float
    right: str
    """Of every judged image a bit, in hexadecimal: whether it is classified correctly under the last attack."""
    went_back: bool
    """Whether the guard found catastrophic overfitting."""

    @property
    def hits(self) -> np.ndarray:
        """bool [5000]"""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.right), dtype=np.uint8)).astype(bool)

    @property
    def robust(self) -> float:
        """Accuracy under the last attack."""
        return float(self.hits.mean())


class Record(Made):
    """What `results/time-to-robust/fashion-mnist.json` holds."""

    about: str
    recipes: dict[str, dict[str, dict[str, Any]]]
    """By task and name, what each changes of the task's PGD-7."""
    common: dict[str, Any]
    """What all share."""
    runs: tuple[Run, ...] = ()

    def of(self, task: str, recipe: str) -> list[Run]:
        """The runs of a recipe, by seed."""
        found = [run for run in self.runs if (run.task, run.recipe) == (task, recipe)]
        return sorted(found, key=lambda run: run.seed)


def recipe_of(task: str, name: str, seed: int, images: dict[str, str]) -> Recipe:
    """The whole recipe of a run; `images`: the encoded splits."""
    document = {**BASE, "data": {**BASE["data"], **images}, "seed": seed}
    document["encoder"] = {**BASE["encoder"], "attack": TASKS[task].model_dump(exclude_defaults=True)}
    changes = {f"encoder.{key}": value for key, value in RECIPES[task][name].items()}
    return Recipe.model_validate(document).replace(changes)


class Timed(EncoderTrainer):
    """The trainer, with a clock that stands still while it is looked at."""

    made: Timed
    """The last one that was made in this process."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.seconds, self.steps, self.points = 0.0, 0, list[Point]()
        self.images, self.labels = (tensor[:LOOKED_AT] for tensor in held_out(self.recipe))
        Timed.made = self

    def step(self, step: int, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """See `EncoderTrainer`."""
        begun = time.process_time()
        told = super().step(step, micros)
        self.seconds += time.process_time() - begun
        self.steps += 1
        if (step + 1) * LOOKS // self.total > step * LOOKS // self.total:
            self.points.append(self.look(step + 1))
        return told

    def look(self, step: int) -> Point:
        """How it stands."""
        attack = self.part.attack.model_copy(update={"steps": 10, "step_size": None})
        with self.engine.autocast():
            attacked = torch.cat([perturb(self.model, x, y, attack) for x, y in pieces(self.images, self.labels)])
        clean, robust = (correct(self.model, x, self.labels).float().mean().item() for x in (self.images, attacked))
        return Point(step=step, seconds=round(self.seconds, 2), clean=round(clean, 4), robust=round(robust, 4))


def held_out(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """All test images float32 [N, C, H, W], and their labels."""
    source = open_source(recipe.data, "test", torch.device("cpu"))
    return to_float(next(iter(source.batches(np.arange(source.n)[None])))), source.labels


def pieces(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """In batches, as the kernels like them."""
    return zip(images.split(250), labels.split(250), strict=True)


@torch.no_grad()
def correct(model: Encoder, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified correctly, bool [N]."""
    with evaluating(model):
        return torch.cat([model(x).argmax(1) == y for x, y in pieces(images, labels)])


def trained(task: str, name: str, seed: int, images: dict[str, str]) -> Run:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    recipe = recipe_of(task, name, seed, images)
    with tempfile.TemporaryDirectory(prefix="arae-time-") as place:
        folder = RunFolder(Path(place) / "run")
        folder.create(recipe)
        with mock.patch.object(training, "EncoderTrainer", Timed):
            training.train(recipe, folder, torch.device("cpu"))
        timed = Timed.made
    model, threat = timed.model.eval(), Threat(recipe.encoder.attack.norm or "l2", recipe.encoder.attack.eps)
    tests, labels = (tensor[::2] for tensor in held_out(recipe))
    worst = []
    for i, (x, y) in enumerate(pieces(tests, labels)):
        generator = torch.Generator().manual_seed(i)
        worst.append(apgd(model, x, y, threat, JUDGE, generator=generator))
    right = correct(model, torch.cat(worst), labels)
    return Run(
        task=task,
        recipe=name,
        seed=seed,
        seconds=round(timed.seconds, 2),
        steps=timed.steps,
        points=tuple(timed.points),
        clean=correct(model, tests, labels).float().mean().item(),
        right=np.packbits(right.numpy()).tobytes().hex(),
        went_back=timed.hardened,
    )


def common() -> dict[str, Any]:
    """What the runs of a record have in common: with another of these they could not stand side by side."""
    tasks = {name: attack.model_dump(exclude_defaults=True) for name, attack in TASKS.items()}
    return {"base": BASE, "tasks": tasks, "judge": JUDGE}


def read(path: Path) -> Record:
    """The record so far, without runs of recipes that are others now."""
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    empty = Record(about=about, recipes=RECIPES, common=common(), git=provenance.git_revision(), time=provenance.now())
    record = Record.model_validate_json(path.read_text()) if path.is_file() else empty
    if any(record.common.get(key) != empty.common[key] for key in ("base", "judge")):
        return empty
    same = {
        (task, name)
        for task, recipes in RECIPES.items()
        for name, changes in recipes.items()
        if record.recipes.get(task, {}).get(name) == changes
        and record.common["tasks"].get(task) == empty.common["tasks"][task]
    }
    kept = tuple(run for run in record.runs if (run.task, run.recipe) in same)
    return record.model_copy(update={"about": about, "recipes": RECIPES, "common": empty.common, "runs": kept})


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that the record lacks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_robust", description=__doc__)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="seeds, with commas between them")
    parser.add_argument("--only", default="", help="names of recipes that begin so, such as l2/PGD")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, one on a core")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    record = read(given.out)
    done = {(run.task, run.recipe, run.seed) for run in record.runs}
    wanted = [
        (task, name, int(seed))
        for seed in given.seeds.split(",")
        for task, recipes in RECIPES.items()
        for name in recipes
        if f"{task}/{name}".startswith(given.only) and (task, name, int(seed)) not in done
    ]
    with tempfile.TemporaryDirectory(prefix="arae-time-") as place, executor(given.jobs) as workers:
        images = {split: str(Path(place) / f"{split}.beton") for split in ("train", "test")}
        if wanted:
            encode("fashion-mnist", Path(images["train"]), EncodeOptions(split="train"))
            encode("fashion-mnist", Path(images["test"]), EncodeOptions(split="test"))
        jobs = {workers.submit(trained, *one, images): one for one in wanted}
        for count, job in enumerate(as_completed(jobs), start=1):
            run = job.result()
            record = record.model_copy(update={"runs": (*record.runs, run), **here(torch.device("cpu"))})
            given.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(given.out, record.model_dump_json(indent=1) + "\n")
            said = f"{run.task}/{run.recipe}, seed {run.seed}: {run.seconds:.0f} s, {100 * run.robust:.2f} % robust"
            print(f"{count}/{len(wanted)} {said}", file=sys.stderr, flush=True)
    print("\n".join(table(record)))


def executor(jobs: int) -> ProcessPoolExecutor:
    """Processes made afresh: torch's threads do not survive a fork."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1)


def table(record: Record) -> list[str]:
    """A row for each recipe, in Markdown."""
    rows = [
        "| Task | Recipe | CPU seconds | of PGD-7's | clean | robust | less than PGD-7 (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, recipes in RECIPES.items():
        base = {run.seed: run for run in record.of(task, "PGD-7")}
        for name in recipes:
            runs = [run for run in record.of(task, name) if run.seed in base]
            if not runs:
                continue
            shares = [run.seconds / base[run.seed].seconds for run in runs]
            clean, robust = (100 * mean(values) for values in zip(*((r.clean, r.robust) for r in runs), strict=True))
            seconds = f"{median(run.seconds for run in runs):.0f}"
            rows.append(
                f"| {task} | {name} | {seconds} | {median(shares):.2f} ({min(shares):.2f} – {max(shares):.2f}) | "
                f"{clean:.1f} % | {robust:.1f} % | {behind(runs, base)} |"
            )
    return rows


def quickest(record: Record, task: str) -> list[float]:
    """Of the recipe that is the quickest to come, in the mean over its seeds, within a point of PGD-7: its shares of
    PGD-7's time, by seed; of PGD-7 itself, 1, where no other does."""
    base, found = {run.seed: run for run in record.of(task, "PGD-7")}, [[1.0] * len(record.of(task, "PGD-7"))]
    for name in RECIPES[task]:
        runs = [run for run in record.of(task, name) if run.seed in base]
        if runs and len(runs) == len(base) and mean(base[run.seed].robust - run.robust for run in runs) <= LESS:
            found.append([run.seconds / base[run.seed].seconds for run in runs])
    return min(found, key=lambda shares: mean(shares) if shares else 1.0)


def behind(runs: Sequence[Run], base: dict[int, Run]) -> str:
    """How many points less robust than PGD-7 of the same seed, on the same images: mean over the seeds, and 95 %."""
    gaps = np.array([base[run.seed].hits.astype(float) - run.hits for run in runs])
    if not gaps.any():
        return "-"
    error = gaps.mean(axis=0).std(ddof=1) / np.sqrt(gaps.shape[1])
    return f"{100 * gaps.mean():.2f} ± {196 * error:.2f}"


if __name__ == "__main__":
    main()
