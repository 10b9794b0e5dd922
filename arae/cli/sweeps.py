"""Commands on sweeps: sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from arae.cli.options import Overrides, RecipeName, app, launches, recipe_and_space

if TYPE_CHECKING:
    from arae.launch import Where

SpaceName = Annotated[str, typer.Argument(metavar="SPACE", help="A shipped space, or a YAML file.")]


@app.command()
@launches()
def sweep(
    recipe: RecipeName,
    space: SpaceName,
    overrides: Overrides = None,
    jobs: Annotated[
        int | None, typer.Option(help="Trials at a time; default: one a GPU, else one a CPU core (up to 8).")
    ] = None,
    *,
    where: Where,
) -> None:
    """Vary the recipe over a space: train each stage once, measure, map; what was stopped or killed goes on."""
    from arae.checkout import checkout_module

    loaded, read = recipe_and_space(recipe, space, overrides or ())
    folder = checkout_module("tune.sweep").sweep(loaded, read, where, jobs)
    typer.echo(f"{folder.path}: done; `arae report {folder.path}` draws the map")
