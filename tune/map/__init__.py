"""The map of a sweep: one self-contained page, figures for a paper, and every number traced to its record."""

from __future__ import annotations

from pathlib import Path

from arae.files import write_bytes
from arae.runs import RunFolder
from arae.storage import fetched, shared
from arae.tracking.mirror import log_note
from tune.map.cost import draw_cost, draw_growth
from tune.map.curves import draw_curves
from tune.map.draw import Drawn, Picture, style
from tune.map.heat import draw_heat
from tune.map.images import draw_images
from tune.map.page import render
from tune.map.paper import paper_of
from tune.map.plane import draw_map
from tune.map.rows import table_csv
from tune.map.table import MapTable, map_table
from tune.results import load_sweep

__all__ = ["write_map"]


def write_map(folder: Path) -> Path:
    """Write `report.html`, its figures as PDF and PNG, and `table.csv` into a sweep's folder; returns the page's path.

    A figure that there is nothing to draw of is left out, and the page says why; one of an earlier report is removed.
    Each file is replaced all or nothing, the page last. InputError: no sweep there, or a damaged one.
    """
    folder = fetched(folder)
    with shared(RunFolder(folder), log_note):
        table = map_table(load_sweep(folder))
        pictures = draw(table)
        page = render(table, pictures)
        _clear(folder)
        for picture in pictures:
            if isinstance(picture, Drawn):
                write_bytes(folder / f"{picture.name}.pdf", picture.pdf)
                write_bytes(folder / f"{picture.name}.png", picture.png)
        write_bytes(folder / "table.csv", table_csv(table).encode())
        write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"


def draw(table: MapTable) -> list[Picture]:
    """All figures, in the order of the page."""
    with style():
        return [
            *draw_map(table),
            draw_curves(table, paper_of(table)),
            draw_heat(table),
            draw_images(table),
            draw_cost(table.sweep),
            draw_growth(table),
        ]


def _clear(folder: Path) -> None:
    """Remove what an earlier report drew: of a sweep that went on, there may be other figures."""
    for name in ("map", "map-[0-9]*", "curves", "heat", "reconstructions", "cost", "hypervolume"):
        for path in (*folder.glob(f"{name}.pdf"), *folder.glob(f"{name}.png")):
            path.unlink()
