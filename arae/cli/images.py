"""Commands that read or write images: encode, reconstruct, import."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from arae.cli.options import Address, app
from arae.config import load_options
from arae.errors import Stopped


@app.command(name="encode")
def encode_command(
    source: Annotated[
        str, typer.Argument(help="An image folder, an .npz file, IMAGES,LABELS idx files, or a catalogue name.")
    ],
    dest: Annotated[Path, typer.Argument(help="The .beton file to write; its manifest lies beside it.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="split=test mode=raw size=256 …")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Encode on this many cores of a Ray cluster.")] = None,
    address: Address = None,
) -> None:
    """Write images as an FFCV .beton file, whole or not at all; killed, the same command goes on."""
    from arae.data.encode import EncodeOptions, encode
    from arae.launch import Where, checkout_module, stop_requested
    from arae.monitor.progress import Progress

    chosen = load_options(EncodeOptions, options or (), where="arae encode")
    where = Where(workers=workers, address=address)
    runner = checkout_module("cluster.encode").OnCluster(where) if workers else None
    with stop_requested() as stop, Progress() as progress:
        pace = Pace()

        def tell(what: str, done: int, total: int) -> None:
            if stop():
                raise Stopped(f"{dest}: stopped; the shards that are done are kept, the same command goes on from them")
            progress.task(what, done, total, pace.rate(what, done))

        manifest = encode(source, dest, chosen, tell, runner=runner, note=progress.note)
    names = ", ".join(manifest.classes[:20]) + (", …" if len(manifest.classes) > 20 else "")
    typer.echo(
        f"{dest}: {manifest.n} images, {manifest.bytes / 2**20:.1f} MiB, {len(manifest.classes)} classes: {names}"
    )
    for name, reason in manifest.skipped:
        typer.echo(f"arae: left out {name}: {reason}", err=True)


class Pace:
    """Images a second of what is being done, from where it began."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[int, float]] = {}

    def rate(self, what: str, done: int) -> str:
        """`812 images/s`; nothing at first."""
        first, start = self._begun.setdefault(what, (done, time.monotonic()))
        seconds = time.monotonic() - start
        return f"{(done - first) / seconds:.0f} images/s" if done > first and seconds > 0 else ""


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
