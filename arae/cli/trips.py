"""Commands that train and measure: train, evaluate, demo, reproduce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from arae.cli.options import Overrides, RecipeName, app, launches, one_trip
from arae.config import load_recipe
from arae.runs import RunFolder

if TYPE_CHECKING:
    from arae.launch import Where


@app.command()
@launches()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    where: Where,
) -> None:
    """Train the recipe's encoder, then its decoder; a run that was stopped or killed goes on."""
    loaded = load_recipe(recipe, overrides or ())
    from arae.check import check
    from arae.session import session

    one_trip(loaded)
    list(check(loaded, where.worker_device()))  # what can't be trained is said before there is a run

    with session(loaded) as run:
        run.train(where)
        typer.echo(f"{run.folder.path}: trained; `arae evaluate {run.folder.path}` measures it")


@app.command()
@launches()
def evaluate(recipe: RecipeName, overrides: Overrides = None, *, where: Where) -> None:
    """Measure a trained run on held-out images, into records; with --workers, batches are shared out over them."""
    loaded = load_recipe(recipe, overrides or ())
    from arae.models.autoencoder import find_model
    from arae.report import summary
    from arae.session import session

    one_trip(loaded)
    find_model(RunFolder.of(loaded).path)  # a run that was never trained is said before there is one

    with session(loaded, trained=True) as run:
        records = run.evaluate(where)
    for line in summary(records):
        typer.echo(line)
    typer.echo(f"{run.folder.records}: {len(records)} records")


@app.command()
@launches(workers="2")
def demo(overrides: Overrides = None, *, where: Where) -> None:
    """The main job in small: encode, train at several radii, invert, evaluate, report; --workers 0: without Ray."""
    from arae.demo import demo as run_demo
    from arae.demo import demo_recipe

    folder = run_demo(demo_recipe(overrides or []), where)
    typer.echo(f"{folder.path / 'report.html'}: open it in a browser; `arae ui` compares the runs")


@app.command()
@launches()
def reproduce(
    table: Annotated[str | None, typer.Argument(metavar="[ID]", help="A table, such as arae-main-T1.")] = None,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--list", help="List the tables, with state and planned cost.")] = False,
    scale: Annotated[str, typer.Option(help="full, or small: sized for two CPU cores.")] = "full",
    jobs: Annotated[int | None, typer.Option(help="Runs side by side; default: 2 on a CPU, 1 on a GPU.")] = None,
    *,
    where: Where,
) -> None:
    """Run a table of the paper and show its figures beside ours; what was stopped goes on."""
    from arae.launch import checkout_module

    if every or table is None:
        for line in checkout_module("benchmarks.tables.show").listing():
            typer.echo(line)
        return
    module = checkout_module("benchmarks.tables.reproduce")
    for line in module.reproduce(table, scale, overrides or [], where, jobs):
        typer.echo(line)
