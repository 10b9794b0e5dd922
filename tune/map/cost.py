"""What each trial cost, what it had for nothing, and how the sweep's front grew while it worked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arae.report.figures import COLOURS, INK
from tune.front import hypervolume
from tune.journal import Journal
from tune.map.draw import Hover, LeftOut, Picture, new_figure, written
from tune.map.table import MapTable, listed
from tune.results import Sweep, Trial, by_objective
from tune.store import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Cost per point"
GROWTH = "The front over time"
MOST = 40
"""Trials that a figure has room for; of more, the costliest."""
PARTS = {"encoder": ("encoder, training", COLOURS[0]), "decoder": ("decoder, training", COLOURS[4]),
         "measuring": ("measuring", COLOURS[2])}  # fmt: skip


def draw_cost(sweep: Sweep) -> Picture:
    """A bar a trial: what its stages took, and which of them another trial had paid for."""
    trials = [trial for trial in sweep.trials if trial.outcomes]
    if not trials:
        return LeftOut("cost", TITLE, "no trial has come to the end of a stage")
    shown = sorted(sorted(trials, key=lambda t: -_hours(t))[:MOST], key=lambda t: t.entry.number)
    unit, factor = unit_of(max(map(_hours, shown)))
    figure, hover = new_figure(0.75 + 0.165 * max(len(shown), 4)), Hover()
    axes = figure.subplots()
    for y, trial in enumerate(shown):
        _bar(axes, trial, y, factor, unit, hover)
    axes.set_yticks(range(len(shown)), [_name(trial) for trial in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(f"device-{unit} (workers times {unit})")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(handles=_handles(shown), loc="outside lower center", ncols=4, frameon=False)
    left = f" Of {len(trials)} trials the {len(shown)} costliest." if len(shown) < len(trials) else ""
    caption = (
        "What the stages of each trial took: training and measuring. Hatched: trained and measured for another trial, "
        f"and taken over for nothing.{left}"
    )
    return written("cost", TITLE, caption, figure, hover)


def unit_of(hours: float) -> tuple[str, float]:
    """A unit in which so many hours are a number to look at, and how many of it an hour has."""
    return ("hours", 1.0) if hours >= 1 else ("minutes", 60.0) if hours >= 1 / 60 else ("seconds", 3600.0)


def parts(outcome: Outcome) -> list[tuple[str, float, bool]]:
    """Of a stage: what it was, the device-hours, and whether another trial had paid for it."""
    training = (outcome.stage, outcome.device_hours, not outcome.trained)
    return [training, ("measuring", outcome.evaluation_s / 3600, not outcome.measured)]


def _hours(trial: Trial) -> float:
    return sum(hours for outcome in trial.outcomes for _, hours, _ in parts(outcome))


def _name(trial: Trial) -> str:
    label = trial.point.label or trial.id
    label = label if len(label) <= 46 else f"{label[:45]}…"
    words = {"stopped": "cut short", "failed": "failed", None: "not at its end"}
    return label if trial.finished else f"{label} ({words[trial.entry.state]})"


def _bar(axes: Axes, trial: Trial, y: int, factor: float, unit: str, hover: Hover) -> None:
    at = 0.0
    for outcome in trial.outcomes:
        for kind, hours, reused in parts(outcome):
            name, colour = PARTS[kind]
            how: dict[str, Any] = {"hatch": "//////", "alpha": 0.45} if reused else {}
            (bar,) = axes.barh([y], [hours * factor], left=at, height=0.68, color=colour, edgecolor="white",
                               linewidth=0.5, **how)  # fmt: skip
            whose = "taken over from another trial" if reused else "for this trial"
            what = name if kind != "measuring" else f"{outcome.stage}, measuring"
            told = f"{trial.id}: {trial.point.label}\n{what}: {hours * factor:.3g} {unit}, {whose}\n"
            stage = f"stage {outcome.stage}-{outcome.key}, {outcome.steps:,} steps, {outcome.workers} workers"
            hover.add(bar, told + stage)
            at += hours * factor


def _handles(trials: Sequence[Trial]) -> list[Any]:
    from matplotlib.patches import Patch

    there = {kind for trial in trials for outcome in trial.outcomes for kind, *_ in parts(outcome)}
    found = [Patch(color=colour, label=name) for kind, (name, colour) in PARTS.items() if kind in there]
    return [*found, Patch(facecolor="#bbbbbb", edgecolor="white", hatch="//////", label="taken over")]


def growth(table: MapTable) -> list[tuple[float, float, str]]:
    """(hours that were worked, share of the box covered, trial that ended) for each finished trial, as they ended.

    The box reaches, in each objective, from the worst finished trial to the best; empty where fewer than two ended.
    """
    sweep, names = table.sweep, [measure.metric for measure in table.objectives]
    signs = [measure.sign for measure in table.objectives]
    rows = {t.id: by_objective(t.entry.objectives, names) for t in sweep.finished}
    whole = {trial: row for trial, row in rows.items() if not np.isnan(row).any()}
    if len(whole) < 2 or not names:
        return []
    values = np.array(list(whole.values())) * signs
    ideal, nadir = values.max(axis=0) * signs, values.min(axis=0) * signs
    found, so_far = list[tuple[float, float, str]](), list[list[float]]()
    for trial, hours in _ended(sweep):
        if trial in whole:
            so_far.append(whole.pop(trial))
            found.append((hours, hypervolume(so_far, signs, ideal, nadir), trial))
    return found


def _ended(sweep: Sweep) -> list[tuple[str, float]]:
    """When each finished trial came to its end, in hours that commands had worked by then."""
    found, worked, begun, last = list[tuple[str, float]](), 0.0, None, 0.0
    for event in Journal(sweep.folder).events():
        now = float(event["time"])
        if event["event"] == "command":
            worked += (now if event["state"] == "ended" else last) - begun if begun is not None else 0.0
            begun = now if event["state"] == "begun" else None
        elif event["event"] == "end" and event["state"] == "finished":
            found.append((event["id"], (worked + (now - begun if begun is not None else 0.0)) / 3600))
        last = now
    return found


def draw_growth(table: MapTable) -> Picture:
    """The hypervolume of the finished trials over the time that was worked."""
    found = growth(table)
    if not found:
        return LeftOut("hypervolume", GROWTH, "fewer than two finished trials have all of the sweep’s objectives")
    unit, factor = unit_of(max(hours for hours, *_ in found))
    figure, hover = new_figure(2.1, 4.2), Hover()
    axes = figure.subplots()
    xs, ys = [factor * hours for hours, *_ in found], [100 * share for _, share, _ in found]
    axes.step(xs, ys, where="post", color=INK, linewidth=1.1)
    for i, (x, y, (_, share, trial)) in enumerate(zip(xs, ys, found, strict=True)):
        before = found[i - 1][1] if i else 0.0
        grown = share > before + 1e-12
        (dot,) = axes.plot([x], [y], marker="o", markersize=4.5, color=COLOURS[0],
                           markerfacecolor=COLOURS[0] if grown else "white")  # fmt: skip
        hover.add(dot, f"trial {trial} ended after {x:.3g} {unit}\nhypervolume {y:.1f} %, before {100 * before:.1f} %")
    axes.set_ylim(-4, 104)
    axes.set_xlim(0, max(xs) * 1.04 or 1)
    axes.set_xlabel(f"{unit} worked on the sweep")
    axes.set_ylabel("hypervolume (%)")
    caption = (
        f"Share of the box between the worst and the best finished trial in {listed(m.label for m in table.objectives)}"
        " that the finished trials dominate, as they ended; points are trials, filled where the front grew. What only "
        "just reaches the worst value of an objective covers nothing."
    )
    return written("hypervolume", GROWTH, caption, figure, hover)
