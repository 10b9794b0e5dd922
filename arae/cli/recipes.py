"""Commands on recipes and on the machine: ls, show, validate, plan, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from arae.cli.options import Device, Overrides, RecipeName, Workers, app, columns, recipe_and_space
from arae.config import dump_recipe, load_recipe
from arae.errors import InputError
from arae.runs import runs_root

SpaceToo = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SPACE] [key=value]...", help="A search space, by name or file; dotted overrides."),
]


@app.command()
def ls(
    what: Annotated[
        str, typer.Argument(help="recipes, spaces, data, encoders, decoders, discriminators or metrics")
    ] = "recipes",
) -> None:
    """List what there is by name."""
    from arae.listing import LISTS

    if what not in LISTS:
        raise InputError(f"ls {what}: there are {', '.join(LISTS)}")
    columns(LISTS[what]())


@app.command()
def show(recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]")] = None, overrides: Overrides = None) -> None:
    """Print a recipe as it resolves, its digest last; without a recipe, every key and what it means."""
    if recipe is None:
        from arae.listing import described_keys

        columns(described_keys())
        return
    loaded = load_recipe(recipe, overrides or ())
    typer.echo(f"{dump_recipe(loaded)}# digest: {loaded.digest}")


@app.command()
def validate(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Check a recipe, its networks and its data, without training."""
    loaded = load_recipe(recipe, overrides or ())
    from arae.check import check
    from arae.train.engine import default_device

    for line in check(loaded, default_device()):
        typer.echo(line)
    typer.echo(f"{loaded.name}: valid")


@app.command()
def plan(recipe: RecipeName, overrides: SpaceToo = None, workers: Workers = None, device: Device = None) -> None:
    """Estimate parameters, memory, FLOPs (the attack's steps counted), images/s and hours before anything starts.

    With SPACE, those of a sweep: trials, stages once they are shared, device hours, storage.
    """
    given = list(overrides or ())
    space = next((text for text in given if "=" not in text), None)
    if space is not None:
        given.remove(space)
        made = _sweep_plan(recipe, space, given, workers, device)
    else:
        loaded = load_recipe(recipe, given)
        from arae.launch import Where
        from arae.plan import plan_recipe

        made = plan_recipe(loaded, workers or 1, Where(workers=workers, device=device).torch_device()).lines()
    for line in made:
        typer.echo(line)


def _sweep_plan(recipe: str, space: str, given: list[str], workers: int | None, device: str | None) -> list[str]:
    """The plan of a sweep over a space; the overrides are those of `arae sweep`."""
    loaded, read = recipe_and_space(recipe, space, given)
    from arae.checkout import checkout_module
    from arae.launch import Where

    prepared = checkout_module("tune.sweep").prepared(loaded, read)
    return checkout_module("tune.plan").plan_sweep(prepared, read, Where(workers=workers, device=device)).lines()


@app.command()
def doctor() -> None:
    """Say what of the stack works here, and how to mend what does not."""
    from arae.doctor import examine

    typer.echo("looking at the machine and trying each library; some seconds …", err=True)
    marks = {"ok": "ok     ", "warn": "warn   ", "missing": "missing"}
    for finding in examine(runs_root()):
        typer.echo(f"{marks[finding.state]}  {finding.name}: {finding.said}")
        if finding.mend:
            typer.echo(f"         -> {finding.mend}")
