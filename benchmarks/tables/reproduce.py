"""`arae reproduce`: run a table, put what was measured among the records, say what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from arae.errors import InputError
from arae.launch import Where
from benchmarks.tables.definition import FOLDER, SCALES, ScaleName, find, trips
from benchmarks.tables.jobs import Plan, default_jobs, run_all
from benchmarks.tables.run import PLACES, RESULTS, check_trips, done, measured, publish
from benchmarks.tables.show import lines
from benchmarks.tables.verdict import judge


def reproduce(
    table: str, scale: str, overrides: Sequence[str], where: Where, jobs: int | None, results: Path = RESULTS
) -> Iterator[str]:
    """Run a table at a scale; yields what to tell, a line each.

    `jobs`: runs side by side; None chooses (`default_jobs`). What a run holds already is not made again. Records of
    the tables that come with arae go to `results`, unless an override changes what is computed.

    Raises InputError for a table, a scale, an override, data or a folder that can't be; Stopped where the same command
    goes on; AraeError where a run fails.
    """
    definition, chosen = find(table), _scale(scale)
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs {jobs}: at least 1 run must go on; leave it out to let arae choose")
    there = trips(definition, chosen, overrides)
    check_trips(there, where.worker_device())
    made = sum(map(done, there))
    yield f"{definition.id} ({chosen} scale): {len(there)} runs, of which {made} are made already"
    run_all(there, Plan(table, chosen, tuple(overrides), where), jobs or default_jobs(where))
    yield from lines(judge(definition, chosen, there, measured(there)))
    changed = [text for text in overrides if text.partition("=")[0] not in PLACES]
    if changed:
        yield f"not put among arae's records: {', '.join(changed)} is not what the table says"
    elif (FOLDER / f"{table}.yaml").is_file():
        publish(there, results)
        yield f"{results / chosen}: has the records; `python -m benchmarks.tables` makes docs/tables.md anew"


def _scale(name: str) -> ScaleName:
    for each in SCALES:
        if name == each:
            return each
    raise InputError(f"--scale {name}: write {' or '.join(SCALES)}")
