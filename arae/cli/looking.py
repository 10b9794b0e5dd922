"""Commands that look at runs: report, ui."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from arae.cli.options import app
from arae.runs import RunFolder, runs_root


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder with records.")]) -> None:
    """Write a run's map, table and page from its records."""
    from arae.demo import report_folder

    typer.echo(report_folder(RunFolder(run)))


@app.command()
def ui(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
) -> None:
    """Open MLflow's UI on the runs."""
    from arae.tracking.server import ui as serve

    sys.exit(serve(runs_root(), host, port))
