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
PANEL = "Workers (Ray Train)"
Group = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="N|MIN:MAX",
        rich_help_panel=PANEL,
        help="Train through Ray Train on this many workers; MIN:MAX lets the group shrink and grow with the cluster.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(rich_help_panel=PANEL, help="A running Ray cluster: auto, or ray://host:port; default: this machine."),
]
Cpus = Annotated[int | None, typer.Option(rich_help_panel=PANEL, help="CPU cores for each worker; default: 1.")]
Gpus = Annotated[
    int | None,
    typer.Option(rich_help_panel=PANEL, help="GPUs for each worker, 0 or 1; default: 1 where the cluster has any."),
]
Placement = Annotated[
    str, typer.Option(rich_help_panel=PANEL, help="pack: workers close together; spread: on many machines.")
]
Restarts = Annotated[
    int, typer.Option(rich_help_panel=PANEL, help="Failures of workers and machines that a launch survives.")
]
Wait = Annotated[
    float, typer.Option(rich_help_panel=PANEL, help="Minutes without the workers asked for, then it gives up (75).")
]
Timeout = Annotated[
    int, typer.Option(rich_help_panel=PANEL, help="Seconds after which a worker that does not answer is replaced.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU where there is one.")]


def one_trip(recipe: Recipe) -> None:
    """InputError for a recipe that is a map of several trips."""
    if recipe.map is not None:
        raise InputError(
            f"{recipe.name} is a map of {len(recipe.map.radii)} radii: `arae demo`, or add map=null name=…"
        )


def where_of(
    workers: str | None,
    address: str | None,
    device: str | None,
    *,
    cpus: int | None = None,
    gpus: int | None = None,
    placement: str = "pack",
    restarts: int = 100,
    wait: float = 30.0,
    timeout: int = 600,
) -> Where:
    """Where to run, from the flags; InputError for what can't be."""
    from arae.launch import Where, parse_workers

    least, most = (None, None) if workers is None else parse_workers(workers)
    return Where(
        workers=least,
        most=most,
        address=address,
        device=device,
        cpus=cpus,
        gpus=gpus,
        placement=placement,
        restarts=restarts,
        wait=wait,
        timeout=timeout,
    )


def columns(rows: list[tuple[str, str]]) -> None:
    """Print names and what is said of them as two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, said in rows:
        typer.echo(f"{name:<{width}}  {said}".rstrip())
