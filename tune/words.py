"""What a sweep says of itself while it runs."""

from __future__ import annotations

from collections.abc import Collection

from tune.journal import Entry
from tune.space import Point, Space

UNITS = {
    "clean_accuracy": ("clean", "{:.1%}"),
    "robust_accuracy": ("robust", "{:.1%}"),
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips": ("LPIPS", "{:.3f}"),
    "gpu_hours": ("took", "{:.2g} h"),
}


def ended_words(entry: Entry, point: Point) -> str:
    """How a trial ended: `3: eps=0.75, loss=pixel: robust 45.2%, PSNR 19.81 dB (encoder taken over)`."""
    head = f"{entry.number + 1}: {point.label}"
    if entry.state == "failed":
        return f"{head}: failed: {entry.reason}"
    if entry.state == "stopped":
        return f"{head}: cut short, {entry.reason}"
    values = [
        f"{UNITS[name][0]} {UNITS[name][1].format(value)}"
        for name, value in entry.objectives.items()
        if name in UNITS and name != "gpu_hours"
    ]
    there = [stage["stage"] for stage in entry.stages if not stage["trained"] and not stage["measured"]]
    return f"{head}: {', '.join(values)}" + (f" ({' and '.join(there)} taken over)" if there else "")


def standing(entries: Collection[Entry], space: Space, jobs: int) -> str:
    """What there is to do: `24 trials, 3 finished, 2 at a time`."""
    search = space.search
    total = f"{space.count} trials" if space.count is not None else f"trials drawn by {search.kind}"
    if search.trials is not None:
        total = f"{search.trials} trials by {search.kind}" if space.count is None else f"at most {search.trials} trials"
    begun = [entry for entry in entries if entry.state is None]
    finished = sum(entry.state == "finished" for entry in entries)
    parts = [total, f"{finished} finished"] if entries else [total]
    if begun:
        parts.append(f"{len(begun)} to go on with")
    return ", ".join([*parts, f"{jobs} at a time"])
