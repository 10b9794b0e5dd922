"""Commands that hold results against each other: compare."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from arae.cli.options import app

Side = Annotated[
    str,
    typer.Argument(help="A sweep's folder, a run folder, a file of records, or a file of benchmarks/results."),
]


@app.command()
def compare(
    a: Side,
    b: Side,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where two sweeps, two runs, or two machines' benchmarks differ beyond their intervals."""
    from arae.compare import compare as compared

    found = compared(a, b)
    typer.echo(json.dumps(found.document()) if as_json else "\n".join(found.lines()))
