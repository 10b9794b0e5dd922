"""The record of `time_to_robust` as a page: `docs/cheap-training.md` and its picture.

`python -m benchmarks.curves` writes both.
"""

from __future__ import annotations

import io
import json
from statistics import median
from typing import TYPE_CHECKING, Any

from arae.files import write_bytes, write_text
from arae.report.figures import COLOURS, DASHES, DPI, INK, MARKERS
from benchmarks.harness import FOLDER
from benchmarks.time_to_robust import BASE, OUT, RECIPES, TASKS, Record, Run, quickest, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = FOLDER.parent / "docs" / "cheap-training.md"
PICTURE = PAGE.with_name("time-to-robust.png")

INTRODUCTION = """# Adversarial training that costs less

PGD-7 goes through the network seven times more, there and back, than a training without attacks. These options of a
recipe's `encoder` make it cheaper; each can be combined with a shorter schedule, and each has its price. What some of
them cost and bring, in real runs at a small size, is told below.

| Option | What it does | Source |
|---|---|---|
| `attack: {steps: 2}` | fewer steps of the attack, each longer | Madry et al. 2018 with another K |
| `attack: {steps: 1, random_start: true}` | a single step from a random point | Wong et al. 2020 |
| `noise: 2.0` with one step | noise, a step, no projection | N-FGSM, de Jorge et al. 2022 |
| `replays: 4` with one step | several updates a batch; the attack comes with their gradients | Shafahi et al. 2019 |
| `early_stop: 1` | each sample leaves the attack once it is misclassified | Zhang et al. 2020 |
| `phases: [{until: 0.5, steps: 2, scale: 0.5}]` | fewer steps, or smaller images, in earlier parts | Wong et al. 2020 |
| `radius_warmup: 0.7` | a radius that grows | |
| `guard: {}` | where held-out images under PGD fall: back to the best state, and a stronger attack | Wong et al. 2020 |

A single step may fail all at once (*catastrophic overfitting*): the network withstands that one step and nothing else.
It is seen under PGD alone, so the guard looks with PGD, and it costs that look alone until it is needed.
"""


def draw(record: Record) -> bytes:
    """Robust accuracy against CPU seconds of training, a panel a task: thin lines are seeds, marks what they end at."""
    from matplotlib.figure import Figure

    tasks = [task for task in RECIPES if record.of(task, "PGD-7")]
    figure = Figure(figsize=(6.0 * len(tasks) + 1, 5.2), dpi=DPI, layout="constrained", facecolor="white")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        _panel(axes, record, task)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, record: Record, task: str) -> None:
    for i, name in enumerate(RECIPES[task]):
        runs = record.of(task, name)
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        }
        marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
        for run in runs:
            seconds, robust = zip(*((p.seconds, 100 * p.robust) for p in run.points), strict=True)
            axes.plot(seconds, robust, linewidth=0.9, alpha=0.75, **style)
            axes.plot(run.seconds, 100 * run.robust, marker=marker, markersize=7, color=style["color"], linestyle="")
        axes.plot([], [], marker=marker, label=name, **style)
    ends = [100 * p.robust for run in record.runs if run.task == task for p in run.points[len(run.points) // 2 :]]
    axes.set_ylim(bottom=max(0, min(ends) - 8))
    attack = TASKS[task]
    axes.set_title(f"{attack.norm}, radius {attack.eps:g}", loc="left", fontweight="bold", color=INK)
    axes.set_xscale("log")
    axes.set_xlabel("CPU seconds of training")
    axes.set_ylabel("robust accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8.5)


def page(record: Record) -> str:
    """The page in Markdown."""
    machine = f"{record.hardware.get('device', 'a CPU')}, one thread; torch {record.versions.get('torch', '?')}"
    return "\n".join(
        [
            INTRODUCTION,
            "## What was measured",
            "",
            record.about,
            "",
            *(f"- {_task(task)}" for task in RECIPES if record.of(task, "PGD-7")),
            "",
            f"On {machine}; the last of the runs: {record.time[:10]}, revision {record.git}.",
            "",
            *table(record),
            "",
            f"![Robust accuracy against training time]({PICTURE.name})",
            "",
            "Lines: 1,000 held-out images under PGD-10, on the way. Marks: 5,000 under APGD-50, at the end. Each seed "
            "has a line and a mark. What a network in training is to small images is no match for whole ones, so a "
            "training that begins with small images is seen only from where it goes on with whole ones.",
            "",
            *_said(record),
            "",
            "`python -m benchmarks.time_to_robust` makes the runs, `python -m benchmarks.curves` this page.",
            "",
        ]
    )


def _task(task: str) -> str:
    """What its recipes have in common, and what each changes."""
    attack, part, base = TASKS[task], BASE["encoder"], RECIPES[task]["PGD-7"]
    steps = base.get("steps", part["steps"])
    epochs = steps * part["batch"] / BASE["data"]["limit"]
    changes = [
        f"{name} has " + ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in own.items())
        for name, every in RECIPES[task].items()
        if (own := {key: value for key, value in every.items() if base.get(key) != value})
    ]
    warmed = f", the radius growing over {base['radius_warmup']:g} of them" if "radius_warmup" in base else ""
    return (
        f"`{task}`: radius {attack.eps:g}; PGD-7 makes {steps:,} steps of {part['batch']} images, {epochs:.0f} "
        f"epochs{warmed}. {'; '.join(changes)}. Every recipe's rate falls to zero at its own end, so a shorter "
        "training is one that was meant to be short."
    )


def _said(record: Record) -> list[str]:
    """What follows, in words."""
    said, shares = list[str](), quickest(record, "l2")
    if not shares:
        pass
    elif (share := median(shares)) < 1:
        said.append(
            f"The quickest to come within a point of PGD-7's robust accuracy (l2) takes {share:.2f} of its time."
        )
    else:
        said.append("Nothing comes within a point of PGD-7's robust accuracy (l2) in less time.")
    fallen = [run for run in record.of("linf", "FGSM") if _peak(run) > 2 * run.points[-1].robust]
    guarded = record.of("linf", "FGSM, guarded")
    if not guarded:
        return [*said, "", "What single steps do under l-inf, and what the guard makes of it, is still to be run."]
    back = [run for run in guarded if run.went_back]
    said.append(
        f"Under l-inf, {len(fallen)} of {len(record.of('linf', 'FGSM'))} trainings by FGSM ended below half of the "
        f"robust accuracy that they had had on the way; with the guard, {len(back)} of {len(guarded)} were found "
        "overfitted and went back."
    )
    return said


def _peak(run: Run) -> float:
    return max(point.robust for point in run.points)


def main() -> None:
    """Write both."""
    record = Record.model_validate_json(OUT.read_text())
    write_bytes(PICTURE, draw(record))
    write_text(PAGE, page(record))


if __name__ == "__main__":
    main()
