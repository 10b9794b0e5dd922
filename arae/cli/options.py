"""What several commands share: their arguments, and small things that they all say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from arae.errors import InputError

if TYPE_CHECKING:
    from arae.config import Recipe
    from arae.launch import Where

app = typer.Typer(
    name="arae",
    help="Train and benchmark adversarially robust autoencoders. RECIPE: a shipped name, a YAML file or a run folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe, a YAML file, or a run folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Dotted overrides: encoder.attack.eps=1.5")
]
Workers = Annotated[int | None, typer.Option(help="Train through Ray Train on this many workers.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster: auto, or ray://host:port.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU where there is one.")]


def one_trip(recipe: Recipe) -> None:
    """InputError for a recipe that is a map of several trips."""
    if recipe.map is not None:
        raise InputError(
            f"{recipe.name} is a map of {len(recipe.map.radii)} radii: `arae demo`, or add map=null name=…"
        )


def where_of(workers: int | None, address: str | None, device: str | None) -> Where:
    """Where to run, from the flags."""
    from arae.launch import Where

    return Where(workers=workers, address=address, device=device)


def columns(rows: list[tuple[str, str]]) -> None:
    """Print names and what is said of them as two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, said in rows:
        typer.echo(f"{name:<{width}}  {said}".rstrip())
