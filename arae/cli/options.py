"""What several commands share: their arguments, and small things that they all say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from arae.errors import InputError

if TYPE_CHECKING:
    from arae.config import Recipe
    from arae.launch import Where
    from tune.space import Space

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
Address = Annotated[
    str | None,
    typer.Option(rich_help_panel=PANEL, help="A running Ray cluster: auto, or ray://host:port; default: this machine."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU where there is one.")]


def one_trip(recipe: Recipe) -> None:
    """InputError for a recipe that is a map of several trips."""
    if recipe.map is not None:
        raise InputError(
            f"{recipe.name} is a map of {len(recipe.map.radii)} radii: `arae demo`, or add map=null name=…"
        )


def where_of(
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN:MAX",
            rich_help_panel=PANEL,
            help="Train through Ray Train on this many workers; MIN:MAX: the group shrinks and grows with the cluster.",
        ),
    ] = None,
    address: Address = None,
    device: Device = None,
    cpus: Annotated[
        int | None, typer.Option(rich_help_panel=PANEL, help="CPU cores for each worker; default: 1.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(rich_help_panel=PANEL, help="GPUs for each worker, 0 or 1; default: 1 where the cluster has any."),
    ] = None,
    placement: Annotated[
        str, typer.Option(rich_help_panel=PANEL, help="pack: workers close together; spread: on many machines.")
    ] = "pack",
    restarts: Annotated[
        int, typer.Option(rich_help_panel=PANEL, help="Failures of workers and machines that a launch survives.")
    ] = 100,
    wait: Annotated[
        float, typer.Option(rich_help_panel=PANEL, help="Minutes without the workers asked for, then it gives up (75).")
    ] = 30.0,
    timeout: Annotated[
        int, typer.Option(rich_help_panel=PANEL, help="Seconds after which a worker that does not answer is replaced.")
    ] = 600,
) -> Where:
    """Where to run, from the flags that every launch has; InputError for what can't be."""
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


def launches(workers: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that launches: in the place of its `where` it has the flags of `where_of`.

    workers: what `--workers` is where it is left out; `--workers 0` then means without.
    """

    def with_flags(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, localns={"Where": object}, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in signature(command).parameters.values() if p.name != "where"]
        flags = [
            p.replace(default=workers) if p.name == "workers" else p
            for p in signature(where_of, locals={"Where": object}, eval_str=True).parameters.values()
        ]

        @wraps(command)
        def run(**given: Any) -> None:
            chosen = {flag.name: given.pop(flag.name) for flag in flags}
            if workers is not None and chosen["workers"] == "0":
                chosen["workers"] = None
            command(**given, where=where_of(**chosen))

        run.__dict__["__signature__"] = Signature([*own, *flags])
        run.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
        return run

    return with_flags


def recipe_and_space(recipe: str, space: str, overrides: Sequence[str]) -> tuple[Recipe, Space]:
    """What a sweep varies, and over what; overrides that begin with `search.` are the space's. InputError where wrong.

    Without a name of its own the sweep is called after both.
    """
    from arae.checkout import checkout_module
    from arae.config import load_recipe
    from arae.config.document import parse_override

    prefix = "search."
    search = dict(parse_override(text) for text in overrides if text.startswith(prefix))
    loaded = load_recipe(recipe, [text for text in overrides if not text.startswith(prefix)])
    spaces = checkout_module("tune.space")
    if not any(text.startswith("name=") for text in overrides):
        loaded = loaded.replace({"name": f"{loaded.name}-{spaces.space_name(space)}"})
    return loaded, spaces.load_space(space, loaded, search)


def columns(rows: list[tuple[str, str]]) -> None:
    """Print names and what is said of them as two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, said in rows:
        typer.echo(f"{name:<{width}}  {said}".rstrip())
