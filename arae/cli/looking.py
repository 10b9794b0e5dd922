"""Commands that look at runs: status, runs, report, ui."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from arae.cli.options import app
from arae.runs import RunFolder, runs_root

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="A run folder, or a run's name.")],
    as_json: Json = False,
    follow: Annotated[bool, typer.Option("--follow", help="Then show its progress until it ends.")] = False,
) -> None:
    """Say how a run stands: step, time left, speed of each worker, states, restarts. Needs no cluster."""
    from arae.monitor.status import as_document, find_run, status_of
    from arae.monitor.watching import follow as follow_run
    from arae.monitor.watching import lines

    folder = find_run(run)
    found = status_of(folder)
    typer.echo(json.dumps(as_document(found)) if as_json else "\n".join(lines(found)))
    if follow:
        follow_run(folder, sys.stdout)


@app.command()
def runs(
    as_json: Json = False,
    every: Annotated[bool, typer.Option("--all", help="Also the trials of sweeps, and the stages they share.")] = False,
) -> None:
    """List all runs: how each stands, its step, when it was last heard, its main numbers. A sweep is one line."""
    from arae.monitor.status import all_runs, as_document
    from arae.monitor.watching import table

    found, hidden = all_runs(every=every)
    if as_json:
        typer.echo(json.dumps([as_document(one) for one in found]))
    elif found:
        typer.echo("\n".join(table(found)))
        if hidden:
            typer.echo(f"and {hidden} trials and stages of sweeps: `arae runs --all`", err=True)
    else:
        typer.echo(f"{runs_root()}: no runs yet; `arae train RECIPE` makes one", err=True)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder with records; a sweep's folder, or its name.")],
) -> None:
    """Write a run's or a sweep's map, table and page from its records."""
    from arae.checkout import checkout_module
    from arae.storage import fetched

    # Only a sweep has a space; without the drivers beside the package there are no sweeps, but runs to report.
    space = next((at for at in (fetched(run), runs_root() / run) if RunFolder(at).is_sweep), None)
    if space is not None:
        typer.echo(checkout_module("tune.map").write_map(space))
        return
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
