"""`python -m benchmarks.tables`: make `docs/tables.md` anew from the definitions and the records that come with arae.

Each table's cost is counted anew first, into `counted.json`; that takes a minute.

`python -m benchmarks.tables run TABLE SCALE RUN [--device D] [key=value …]` trains and measures one run: what
`arae reproduce` starts side by side.
"""

from __future__ import annotations

import argparse
import sys

from arae.errors import AraeError
from arae.files import write_text
from arae.launch import Where
from benchmarks.tables.definition import SCALES, definitions, find, trips
from benchmarks.tables.jobs import end_with_parent
from benchmarks.tables.planned import recount
from benchmarks.tables.run import run_trip
from benchmarks.tables.show import PAGE, page


def main() -> None:
    """Write the page, or run one run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    run = parser.add_subparsers(dest="verb").add_parser("run")
    run.add_argument("table")
    run.add_argument("scale", choices=SCALES)
    run.add_argument("key")
    run.add_argument("--device")
    run.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    try:
        if given.verb != "run":
            recount(definitions())
            write_text(PAGE, page())
            return
        end_with_parent()
        (trip,) = (t for t in trips(find(given.table), given.scale, given.overrides) if t.key == given.key)
        run_trip(trip, Where(device=given.device))
    except AraeError as error:
        print(f"arae: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
