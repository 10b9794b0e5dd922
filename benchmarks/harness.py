"""How things are timed and written down: interleaved rounds, ratios of each round, JSON, tables made from the JSON.

Variants run in turn within a round (A B A B), so that whatever else the machine does falls on all of them alike. A
ratio is that of one round; what is told is its median and range over the rounds. Warm-up rounds are run and not
counted. On a CPU a time is CPU seconds of the process, all threads together, which other people's load hardly moves;
on a GPU it is the time between two CUDA events. Torch has one thread on a CPU, for waiting threads burn CPU seconds.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from pydantic import Field

from arae import provenance
from arae.allocation import memory_kept
from arae.config import Part
from arae.files import write_text

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

Work = Callable[[], object]
Clock = Callable[[Work], float]
"""Runs the work and returns its seconds."""
Seconds = tuple[Annotated[float, Field(gt=0)], ...]


class Made(Part):
    """On what, by what and when a record was made."""

    hardware: dict[str, str | int] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    git: str
    time: str


def here(device: torch.device) -> dict[str, Any]:
    """The fields of `Made`, of now."""
    return {
        "hardware": machine(device),
        "versions": provenance.versions(),
        "git": provenance.git_revision(),
        "time": provenance.now(),
    }


class Comparison(Part):
    """How many times as long one variant takes as another."""

    what: str
    slow: str
    """The variant above the line."""
    fast: str
    """The variant below it."""


class Result(Made):
    """One benchmark on one machine: what `results/<name>.json` holds."""

    name: str
    about: str
    """What is measured, on what."""
    images: int
    """Images in one timing of one variant."""
    warmup: int
    """Rounds before the first that counts."""
    seconds: dict[str, Seconds]
    """Each variant's seconds, round by round."""
    clock: str
    """What the seconds are of."""
    comparisons: tuple[Comparison, ...]
    left_out: dict[str, str]
    """Variants that could not be measured here, and why."""
    notes: tuple[str, ...] = ()
    """What else was seen: sentences."""
    sizes: dict[str, float] = Field(default_factory=dict)
    """Bytes that an image takes, by variant, where that was measured too."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """What else was measured, by a name that ends in its unit."""


def cpu_clock(work: Work) -> float:
    """CPU seconds of this process, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def cuda_clock(work: Work) -> float:
    """Seconds between two events on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def interleaved(variants: Mapping[str, Work], rounds: int, warmup: int, clock: Clock) -> dict[str, Seconds]:
    """Time every variant once a round, in the order given; the first `warmup` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, work in variants.items():
            taken = clock(work)
            if number >= warmup:
                seconds[name].append(taken)
    return {name: tuple(values) for name, values in seconds.items()}


def ratios(result: Result, comparison: Comparison) -> list[float]:
    """One ratio a round."""
    pairs = zip(result.seconds[comparison.slow], result.seconds[comparison.fast], strict=True)
    return [slow / fast for slow, fast in pairs]


def measure(
    name: str,
    about: str,
    variants: Mapping[str, Work],
    comparisons: Iterable[Comparison],
    *,
    images: int,
    rounds: int,
    warmup: int,
    device: torch.device,
    left_out: Mapping[str, str] | None = None,
) -> Result:
    """Time the variants on the device. A GPU's results have a name of their own, so both kinds can be kept."""
    gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    if not gpu:
        torch.set_num_threads(1)
    try:
        with memory_kept(device):  # as in training, for all variants
            seconds = interleaved(variants, rounds, warmup, cuda_clock if gpu else cpu_clock)
        made = here(device)
    finally:
        torch.set_num_threads(threads)
    return Result(
        name=f"{name}-cuda" if gpu else name,
        about=about,
        images=images,
        warmup=warmup,
        seconds=seconds,
        clock="CUDA events" if gpu else "CPU seconds",
        comparisons=tuple(comparisons),
        left_out=dict(left_out or {}),
        **made,
    )


def machine(device: torch.device) -> dict[str, str | int]:
    """Name of the device, cores that this process may use, torch's threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "cores": len(os.sched_getaffinity(0)), "torch_threads": torch.get_num_threads()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def write(result: Result, folder: Path = RESULTS) -> Path:
    """`<folder>/<name>.json`, in place of an older one."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{result.name}.json"
    write_text(path, json.dumps(result.model_dump(mode="json"), indent=1) + "\n")
    return path


def read(folder: Path = RESULTS) -> list[Result]:
    """Every result there is, by name."""
    return [Result.model_validate_json(path.read_text()) for path in sorted(folder.glob("*.json"))]


def with_tables(page: str, results: Sequence[Result]) -> str:
    """The page with all that stands between its markers made anew."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the page has no {BEGIN} … {END}"
    return f"{before}{BEGIN}\n\n" + "\n".join(section(each) for each in results) + f"\n{END}{after}"


def section(result: Result) -> str:
    """One result in Markdown: what it is, its times, its ratios, where it is from."""
    rounds = min(len(values) for values in result.seconds.values())
    times = [f"| {name} | {_times(values)} | {_rate(result, values)} |" for name, values in result.seconds.items()]
    compared = [f"| {each.what} | {_ratio(ratios(result, each))} |" for each in result.comparisons]
    left_out = [f"Left out: {name}: {why}.\n" for name, why in result.left_out.items()]
    versions = ", ".join(f"{name} {value}" for name, value in result.versions.items() if name != "arae")
    hardware = f"{result.hardware['device']}, {result.hardware['cores']} cores, {result.hardware['torch_threads']}"
    lines = [
        f"### {result.name}\n",
        f"{result.about}\n",
        f"{result.clock}; n = {rounds} interleaved rounds after {result.warmup} of warm-up.\n",
        "| Variant | Milliseconds: median (range) | Images a second |",
        "|---|---|---|",
        *times,
        "",
        "| Ratio | Median (range) |",
        "|---|---|",
        *compared,
        "",
        *left_out,
        *(f"{note}\n" for note in result.notes),
        f"On {hardware} torch thread(s); {versions}; `{result.git}`; {result.time}.\n",
    ]
    return "\n".join(lines)


def _times(seconds: Sequence[float]) -> str:
    low, middle, high = (_three(1000 * value) for value in (min(seconds), median(seconds), max(seconds)))
    return f"{middle} ({low} – {high})"


def _rate(result: Result, seconds: Sequence[float]) -> str:
    return _three(result.images / median(seconds))


def _ratio(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def _three(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    digits = 2 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"
