"""Early stopping against the full grid: how much of the front it finds, and for how many training steps.

For each seed both are really run, each in a store of its own: all 24 trials of a space to their end, and the same 24
with asynchronous successive halving (a third goes on from 1/9 and 1/3 of a stage's steps). Fashion-MNIST, small-cnn at
three radii, a mirror decoder on conv4 by eight settings of its training: four learning rates, two weights of the
feature loss. Steps are those of encoders and decoders together, each shared stage counted once.
The front is of robust accuracy (PGD-10, l2 0.75) and PSNR, both on 500 held-out images. Its hypervolume is that of the
trials that came to their end, between the full grid's ideal and nadir: the best and the worst value of each axis among
its 24 trials. (Not among its front's: there both axes nearly agree here, and a front of one or two points has no box.)

`python -m benchmarks.halving` runs it (three seeds: about 25 minutes on two CPU cores), or what is missing of it, and
writes `results/halving/demo.json`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from arae import provenance
from arae.config import Part
from arae.errors import AraeError, InputError
from arae.files import write_text
from benchmarks.harness import RESULTS, Made, here
from tune.front import hypervolume
from tune.results import by_objective, load_sweep
from tune.settings import SIGNS

OUT = RESULTS / "halving" / "demo.json"
OBJECTIVES = ("robust_accuracy", "psnr")
AXES = {
    "encoder.attack.eps": {"grid": [0, 0.75, 1.5]},
    "decoder.lr": {"grid": [3e-4, 1e-3, 3e-3, 1e-2]},
    "decoder.losses.feature": {"grid": [0.0, 0.01]},
}
RECIPE = (
    "encoder.phases=[]",
    "encoder.steps=300",
    "decoder.steps=270",
    "data.limit=4000",
    "evaluate.n=500",
    "evaluate.lpips=null",
    "evaluate.attacks=[{norm: l2, eps: 0.75, steps: 10}]",
    "state.every=100",
)
REACHED, SHARE = 0.97, 0.45
"""What is promised: at least so much of the hypervolume, for at most so much of the steps."""


class Run(Part):
    """One sweep."""

    finished: int
    steps: dict[str, int]
    """Training steps by stage, each stage of the store once."""
    points: tuple[tuple[float, float], ...]
    """Robust accuracy and PSNR (dB) of each trial that finished."""
    hours: float

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(self.steps.values())


class Pair(Part):
    """Both sweeps of one seed."""

    seed: int
    full: Run
    halved: Run

    @property
    def share(self) -> float:
        """Training steps of early stopping, as a share of the full grid's."""
        return self.halved.total / self.full.total

    @property
    def reached(self) -> float:
        """Hypervolume of early stopping's trials, as a share of the full grid's."""
        whole = np.array(self.full.points)
        signs = [SIGNS[name] for name in OBJECTIVES]  # of both, more is better
        ideal, nadir = whole.max(axis=0), whole.min(axis=0)
        part, all_of_it = (hypervolume(run.points, signs, ideal, nadir) for run in (self.halved, self.full))
        return part / all_of_it


class Halving(Made):
    """What `results/halving/demo.json` holds."""

    about: str
    pairs: tuple[Pair, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the mean over the seeds keeps what is promised."""
        return (
            float(np.mean([pair.reached for pair in self.pairs])) >= REACHED
            and float(np.mean([pair.share for pair in self.pairs])) <= SHARE
        )

    def lines(self) -> list[str]:
        """The result in words."""
        shown = []
        for pair in self.pairs:
            full, halved = pair.full, pair.halved
            gained = f"{100 * pair.reached:.1f} % of the hypervolume for {100 * pair.share:.1f} % of the steps"
            counted = f"{halved.total} of {full.total}; {halved.finished} of {full.finished} trials finished"
            shown.append(f"seed {pair.seed}: {gained} ({counted})")
        return [*shown, f"promised: at least {100 * REACHED:g} % for at most {100 * SHARE:g} %"]


def swept(seed: int, *, halved: bool) -> Run:
    """Run one sweep in a store of its own; AraeError where it fails."""
    with tempfile.TemporaryDirectory(prefix="arae-halving-") as folder:
        space = {"about": "early stopping", "axes": AXES}
        (Path(folder) / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
        command = [sys.executable, "-m", "arae", "sweep", "demo", str(Path(folder) / "space.yaml"), "name=halving"]
        command += [*RECIPE, f"seed={seed}", f"search.seed={seed}"]
        command += ["search.early_stop={}"] if halved else []
        done = subprocess.run(command, env={**os.environ, "ARAE_RUNS": folder}, check=False)
        if done.returncode:
            raise AraeError(f"the sweep of seed {seed} ended with {done.returncode}")
        sweep = load_sweep(Path(folder) / "halving")
        points = [by_objective(trial.entry.objectives, OBJECTIVES) for trial in sweep.finished]
        return Run(
            finished=len(points),
            steps=sweep.spent.steps,
            points=tuple((one, two) for one, two in points),
            hours=sweep.hours,
        )


def read(path: Path) -> Halving:
    """The record so far, or an empty one."""
    if path.is_file():
        return Halving.model_validate_json(path.read_text())
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    return Halving(about=about, git=provenance.git_revision(), time=provenance.now())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds that the record lacks; 0 where it keeps what is promised."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.halving", description=__doc__)
    parser.add_argument("--seeds", default="1,2,3", help="seeds, with commas between them")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    seeds = [int(text) for text in given.seeds.split(",") if text.isdigit()]
    if not seeds:
        raise InputError(f"--seeds {given.seeds}: write numbers, with commas between them")
    record = read(given.out)
    for seed in seeds:
        if seed in {pair.seed for pair in record.pairs}:
            continue
        pair = Pair(seed=seed, halved=swept(seed, halved=True), full=swept(seed, halved=False))
        record = record.model_copy(update={"pairs": (*record.pairs, pair), **here(torch.device("cpu"))})
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.out, record.model_dump_json(indent=1) + "\n")
    print("\n".join(record.lines()))
    return 0 if record.kept else 1


if __name__ == "__main__":
    sys.exit(main())
