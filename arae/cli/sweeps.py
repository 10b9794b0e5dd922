"""Commands on sweeps: sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from arae.cli.options import Overrides, RecipeName, app, launches
from arae.config import load_recipe
from arae.config.document import parse_override

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

    prefix = "search."
    given = list(overrides or ())
    search = dict(parse_override(text) for text in given if text.startswith(prefix))
    loaded = load_recipe(recipe, [text for text in given if not text.startswith(prefix)])
    spaces = checkout_module("tune.space")
    if not any(text.startswith("name=") for text in given):
        loaded = loaded.replace({"name": f"{loaded.name}-{spaces.space_name(space)}"})
    read = spaces.load_space(space, loaded, search)
    folder = checkout_module("tune.sweep").sweep(loaded, read, where, jobs)
    typer.echo(f"{folder.path}: done; `arae report {folder.path}` draws the map")
