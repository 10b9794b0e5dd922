"""`compare`: where two sweeps, two runs' records, or two machines' results of a benchmark differ beyond intervals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from arae.checkout import checkout_module
from arae.config import Recipe, load_recipe
from arae.differences import INTERVALS, Comparison, Measured, Pair
from arae.errors import InputError
from arae.matching import Key, by_key, circumstances, matched, measure, settings
from arae.records import Record, read_records
from arae.runs import RunFolder, runs_root
from arae.storage import fetched, glance

Kind = Literal["sweep", "records", "benchmark"]
CALLED: dict[Kind, str] = {
    "sweep": "a sweep",
    "records": "a run's records",
    "benchmark": "a benchmark's result",
}
RANGES = (
    "Criterion: two medians differ where their ranges over the rounds do not overlap; where they overlap they are not "
    "told apart, which does not make them equal."
)


def compare(a: str, b: str) -> Comparison:
    """Compare two sweeps' folders, two run folders or files of records, or two of `benchmarks/results/*.json`.

    Names of runs under the folder of the runs will do. InputError for what is none of these, or two that are not of
    one kind.
    """
    (kind, first), (other, second) = _located(a), _located(b)
    if kind != other:
        raise InputError(f"{a} is {CALLED[kind]}, and {b} {CALLED[other]}: compare two of one kind")
    between: Callable[[str, Path, str, Path], Comparison] = {
        "sweep": _sweeps,
        "records": _runs,
        "benchmark": _benchmarks,
    }[kind]
    return between(a, first, b, second)


def _located(name: str) -> tuple[Kind, Path]:
    """What a side is, and where it lies on this disk."""
    path = fetched(name, glance)
    if not path.exists():
        path = runs_root() / name
    if path.is_file():
        return ("benchmark" if path.suffix == ".json" else "records"), path
    if not path.is_dir():
        raise InputError(f"{name}: neither a folder or file, nor a run under {runs_root()}; `arae runs` lists those")
    if RunFolder(path).is_sweep:
        return "sweep", path
    if not (path / "records.jsonl").is_file():
        raise InputError(
            f"{name}: no records.jsonl in {path}; `arae evaluate` writes it for a run, and of benchmarks give one file"
        )
    return "records", path


def _runs(a: str, first: Path, b: str, second: Path) -> Comparison:
    mine, theirs = read_records(first), read_records(second)
    pairs, only_a, only_b = matched(*by_key(mine, theirs))
    notes = [*settings(_recipe_of(first), _recipe_of(second), "recipes"), *circumstances(mine, theirs)]
    return Comparison("records", a, b, INTERVALS, tuple(pairs), tuple(only_a), tuple(only_b), tuple(notes))


def _recipe_of(path: Path) -> Recipe | None:
    """The recipe beside the records, where there is one that can be read."""
    folder = path if path.is_dir() else path.parent
    try:
        return load_recipe(folder) if (folder / "recipe.yaml").is_file() else None
    except InputError:
        return None


def _sweeps(a: str, first: Path, b: str, second: Path) -> Comparison:
    """Trials at the same point; what their base recipes differ in is said, and may be what is asked about."""
    results = checkout_module("tune.results")
    sweeps = [results.load_sweep(path) for path in (first, second)]
    mine, theirs = ({_point(trial.point.values): trial for trial in sweep.trials} for sweep in sweeps)
    alone = [*_unmatched(mine, theirs)], [*_unmatched(theirs, mine)]
    measured = [defaultdict[Key, list[tuple[Any, Record]]](list) for _ in sweeps]
    odd: dict[str, str] = {}
    for one, other in ((trial, theirs[point]) for point, trial in mine.items() if point in theirs):
        if one.finished and other.finished:
            # The measurements of a stage that trials share are one, so the other side's goes into the key.
            records = [{measure(record): record for record in trial.records} for trial in (one, other)]
            for side, trial in enumerate((one, other)):
                for what, record in records[side].items():
                    both = tuple(where[what].model_dump_json() if what in where else None for where in records)
                    measured[side][*what, *both].append((trial, record))
        else:
            for side, trial in enumerate((one, other)):
                alone[side].append(_named(trial))
        sets = one.point.overrides, other.point.overrides
        odd |= {key: one.point.label for key in sets[0] | sets[1] if sets[0].get(key) != sets[1].get(key)}
    keyed = [{key: (_common(found), found[0][1]) for key, found in side.items()} for side in measured]
    pairs, *left = matched(*keyed)
    notes = [*settings(sweeps[0].recipe, sweeps[1].recipe, "base recipes")]
    notes += [f"Beware: at {label}, the two spaces set {key} differently." for key, label in sorted(odd.items())]
    axes = [", ".join(sweep.space.axes) for sweep in sweeps]
    notes += [f"The axes are {axes[0]} in A, {axes[1]} in B."] if axes[0] != axes[1] else []
    notes += circumstances(*([record for trial in sweep.finished for record in trial.records] for sweep in sweeps))
    return Comparison("sweeps", a, b, INTERVALS, tuple(pairs), (*alone[0], *left[0]), (*alone[1], *left[1]), (*notes,))


def _common(found: Sequence[tuple[Any, Record]]) -> str:
    """In words, what the points have in common that share a measurement."""
    first, *others = (trial.point for trial, _ in found)
    if not others:
        return first.label
    same = {name: value for name, value in first.values.items() if all(p.values.get(name) == value for p in others)}
    return ", ".join(filter(None, (replace(first, values=same).label, f"{len(found)} trials")))


def _named(trial: Any) -> str:
    return trial.point.label + ("" if trial.finished else " (not finished)")


def _unmatched(mine: Mapping[Key, Any], theirs: Mapping[Key, Any]) -> Iterator[str]:
    return (_named(trial) for point, trial in mine.items() if point not in theirs)


def _point(values: Mapping[str, Any]) -> Key:
    """A point's values, in which 0 and 0.0 are one."""
    return tuple(sorted((name, _plain(value)) for name, value in values.items()))


def _plain(value: Any) -> str:
    return repr(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)


def _benchmarks(a: str, first: Path, b: str, second: Path) -> Comparison:
    """Ratios of one round each, and the time that an image takes, with their ranges over the rounds."""
    harness = checkout_module("benchmarks.harness")
    mine, theirs = (_result(harness, path) for path in (first, second))
    if mine.name.removesuffix("-cuda") != theirs.name.removesuffix("-cuda"):
        raise InputError(f"{a} is of benchmark {mine.name}, and {b} of {theirs.name}: compare two results of one")
    sides = [dict(_quantities(harness, result)) for result in (mine, theirs)]
    pairs = [
        Pair("", name, unit, better, value, sides[1][name, unit, better])
        for (name, unit, better), value in sides[0].items()
        if (name, unit, better) in sides[1]
    ]
    only_a, only_b = (tuple(key[0] for key in x if key not in y) for x, y in (sides, reversed(sides)))
    notes = [f"{side}: {_machine(result)}" for side, result in (("A", mine), ("B", theirs))]
    if mine.about != theirs.about:
        notes.append(f"Beware: they measure other things. A: {mine.about} B: {theirs.about}")
    if (mine.images, mine.clock) != (theirs.images, theirs.clock):
        notes.append(
            f"A's seconds are {mine.clock} for {mine.images:,} images, B's {theirs.clock} for {theirs.images:,}."
        )
    return Comparison("benchmarks", a, b, RANGES, tuple(pairs), only_a, only_b, tuple(notes))


def _result(harness: Any, path: Path) -> Any:
    try:
        return harness.Result.model_validate_json(path.read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: not a benchmark's result, which `python -m benchmarks` writes as results/NAME.json ({said})"
        ) from None


def _quantities(harness: Any, result: Any) -> Iterator[tuple[tuple[str, str, Literal["lower"] | None], Measured]]:
    """What a result says, with ranges in the place of intervals."""
    for comparison in result.comparisons:
        if {comparison.slow, comparison.fast} <= result.seconds.keys():
            yield (f"ratio: {comparison.what}", "1", None), _ranged(harness.ratios(result, comparison))
    unit = "ms an image"
    for variant, seconds in result.seconds.items():
        yield (f"time: {variant}", unit, "lower"), _ranged([1000 * one / result.images for one in seconds])


def _ranged(values: Sequence[float]) -> Measured:
    return Measured(statistics.median(values), (min(values), max(values)), len(values))


def _machine(result: Any) -> str:
    hardware = ", ".join(f"{name} {value}" for name, value in result.hardware.items())
    versions = ", ".join(f"{name} {value}" for name, value in result.versions.items() if name in ("python", "torch"))
    return f"{hardware}; {result.clock}; {versions}; {result.git[:12]}; {result.time}"
