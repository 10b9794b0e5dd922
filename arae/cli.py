"""The command line: verbs only. Each loads a recipe and calls one function."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from arae.config import dump_recipe, load_options, load_recipe
from arae.errors import AraeError, InputError
from arae.runs import RunFolder, runs_root

if TYPE_CHECKING:
    from arae.config import Recipe
    from arae.launch import Where

INTERRUPTED = 130  # what typer makes of Ctrl-C; ours is 1 where nothing was kept

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


def main() -> None:
    """Run a command; an AraeError ends it with one line and its own exit code."""
    try:
        code = app(standalone_mode=False)
    except AraeError as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read has gone
            sys.exit(1)
        _end(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except Exception as error:
        told = getattr(error, "format_message", None)  # typer's own, whose class has moved between its versions
        if told is None:
            raise
        _end(f"{told()}; `arae --help` and `arae VERB --help` list what there is", 2)
    sys.exit(1 if code == INTERRUPTED else code or 0)


def _end(said: str, code: int) -> NoReturn:
    typer.echo(f"arae: {' '.join(said.split())}", err=True)
    sys.exit(code)


@app.command()
def ls(
    what: Annotated[
        str, typer.Argument(help="recipes, data, encoders, decoders, discriminators, metrics or runs")
    ] = "recipes",
) -> None:
    """List what there is by name."""
    from arae.listing import LISTS

    if what not in LISTS:
        raise InputError(f"ls {what}: there are {', '.join(LISTS)}")
    _columns(LISTS[what]())


@app.command()
def show(recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]")] = None, overrides: Overrides = None) -> None:
    """Print a recipe as it resolves, its digest last; without a recipe, every key and what it means."""
    if recipe is None:
        from arae.listing import described_keys

        _columns(described_keys())
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
def plan(recipe: RecipeName, overrides: Overrides = None, workers: Workers = None, device: Device = None) -> None:
    """Estimate parameters, memory, FLOPs (the attack's steps counted), images/s and hours before anything starts."""
    loaded = load_recipe(recipe, overrides or ())
    from arae.launch import Where
    from arae.plan import plan_recipe

    where = Where(workers=workers, device=device)
    for line in plan_recipe(loaded, workers or 1, where.torch_device()).lines():
        typer.echo(line)


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


@app.command(name="encode")
def encode_command(
    source: Annotated[
        str, typer.Argument(help="An image folder, an .npz file, IMAGES,LABELS idx files, or a catalogue name.")
    ],
    dest: Annotated[Path, typer.Argument(help="The .beton file to write; its manifest lies beside it.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="split=test mode=raw size=256 …")
    ] = None,
) -> None:
    """Write images as an FFCV .beton file, whole or not at all."""
    from arae.data.encode import EncodeOptions, encode
    from arae.progress import Progress

    chosen = load_options(EncodeOptions, options or (), where="arae encode")
    with Progress() as progress:
        manifest = encode(source, dest, chosen, progress.task)
    names = ", ".join(manifest.classes[:20]) + (", …" if len(manifest.classes) > 20 else "")
    typer.echo(
        f"{dest}: {manifest.n} images, {manifest.bytes / 2**20:.1f} MiB, {len(manifest.classes)} classes: {names}"
    )
    for name, reason in manifest.skipped:
        typer.echo(f"arae: left out {name}: {reason}", err=True)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    workers: Workers = None,
    address: Address = None,
    device: Device = None,
) -> None:
    """Train the recipe's encoder, then its decoder; a run that was stopped or killed goes on."""
    loaded, where = load_recipe(recipe, overrides or ()), _where(workers, address, device)
    from arae.check import check
    from arae.session import session

    _one_trip(loaded)
    list(check(loaded, where.torch_device()))  # what can't be trained is said before there is a run

    with session(loaded) as run:
        run.train(where)
        typer.echo(f"{run.folder.path}: trained; `arae evaluate {run.folder.path}` measures it")


@app.command()
def evaluate(recipe: RecipeName, overrides: Overrides = None, device: Device = None) -> None:
    """Measure a trained run on held-out images, into records."""
    loaded = load_recipe(recipe, overrides or ())
    from arae.models.autoencoder import load_autoencoder
    from arae.report import summary
    from arae.session import session

    _one_trip(loaded)
    load_autoencoder(RunFolder.of(loaded).path)  # a run that was never trained is said before there is one

    with session(loaded, trained=True) as run:
        records = run.evaluate(_where(None, None, device).torch_device())
    for line in summary(records):
        typer.echo(line)
    typer.echo(f"{run.folder.records}: {len(records)} records")


@app.command()
def reconstruct(
    run: Annotated[Path, typer.Argument(help="A run folder or a model folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("reconstructions"),
) -> None:
    """Reconstruct images from their features; each picture shows the original, then the reconstruction."""
    from arae.models.autoencoder import load_autoencoder
    from arae.pictures import reconstruct_files

    for path, quality in reconstruct_files(load_autoencoder(run), images, out):
        typer.echo(f"{path}  {quality:.2f} dB")


@app.command(name="import")
def import_command(
    source: Annotated[Path, typer.Argument(help="A checkpoint: .pt, .pth or .safetensors.")],
    dest: Annotated[Path, typer.Argument(help="The model folder to write.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="name=alexnet encoder=FILE layer=conv5 …")
    ] = None,
) -> None:
    """Make a model folder of another project's checkpoint, whole or not at all."""
    from arae.importing import ImportOptions, import_model

    for line in import_model(source, dest, load_options(ImportOptions, options or (), where="arae import")):
        typer.echo(line)
    typer.echo(f"{dest}: imported")


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


@app.command()
def demo(
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(help="Ray Train workers; 0 trains in this process, without Ray.")] = 2,
    address: Address = None,
    device: Device = None,
) -> None:
    """The main job in small: encode, train at several radii, invert, evaluate, report."""
    from arae.demo import demo as run_demo
    from arae.demo import demo_recipe

    folder = run_demo(demo_recipe(overrides or []), _where(workers or None, address, device))
    typer.echo(f"{folder.path / 'report.html'}: open it in a browser; `arae ui` compares the runs")


@app.command()
def reproduce(
    table: Annotated[str | None, typer.Argument(metavar="[ID]", help="A table, such as arae-main-T1.")] = None,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--list", help="List the tables, with state and planned cost.")] = False,
    scale: Annotated[str, typer.Option(help="full, or small: sized for two CPU cores.")] = "full",
    jobs: Annotated[int | None, typer.Option(help="Runs side by side; default: 2 on a CPU, 1 on a GPU.")] = None,
    workers: Workers = None,
    address: Address = None,
    device: Device = None,
) -> None:
    """Run a table of the paper and show its figures beside ours; what was stopped goes on."""
    from arae.launch import checkout_module

    if every or table is None:
        for line in checkout_module("benchmarks.tables.show").listing():
            typer.echo(line)
        return
    where = _where(workers, address, device)
    module = checkout_module("benchmarks.tables.reproduce")
    for line in module.reproduce(table, scale, overrides or [], where, jobs):
        typer.echo(line)


def _one_trip(recipe: Recipe) -> None:
    if recipe.map is not None:
        raise InputError(
            f"{recipe.name} is a map of {len(recipe.map.radii)} radii: `arae demo`, or add map=null name=…"
        )


def _where(workers: int | None, address: str | None, device: str | None) -> Where:
    from arae.launch import Where

    return Where(workers=workers, address=address, device=device)


def _columns(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, said in rows:
        typer.echo(f"{name:<{width}}  {said}".rstrip())
