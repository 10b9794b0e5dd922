"""Records to pictures and one self-contained page. Every number on the page is a record's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arae.config import Recipe
from arae.errors import InputError
from arae.files import write_bytes
from arae.records import Record, read_records
from arae.report.figures import Grid, grid_png, map_png
from arae.report.page import render
from arae.report.table import tabulate
from arae.report.words import summary

__all__ = ["Grid", "collect", "summary", "write_report"]


def write_report(
    folder: Path,
    records: Sequence[Record],
    recipe: Recipe | None,
    grid: Grid | None,
    commands: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write `map.png`, `reconstructions.png` and `report.html` into the folder; returns the page's path.

    Without a grid the folder's own `reconstructions.png`, where there is one, is shown again. `commands` are
    (what it does, the command) pairs for whoever wants to go on. Each file is replaced all or nothing, the page last.
    InputError: no records at all.
    """
    if not records:
        raise InputError(f"{folder}: no records to report; `arae evaluate` writes them")
    table = tabulate(records)
    picture = folder / "reconstructions.png"
    map_bytes = map_png(table)
    grid_bytes = grid_png(grid) if grid else picture.read_bytes() if picture.is_file() else None
    page = render(table, records, recipe, map_bytes, grid_bytes, commands)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "map.png", map_bytes)
    if grid_bytes:
        write_bytes(picture, grid_bytes)
    write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"


def collect(folder: Path) -> list[Record]:
    """The records of a run folder; where it has none of its own, those of the runs inside it, in order of their names.

    InputError: no such folder, no records anywhere in it, or a line that is no record.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder; `arae runs` lists those there are")
    if (folder / "records.jsonl").is_file():
        return read_records(folder)
    files = sorted(folder.glob("**/records.jsonl"))
    if not files:
        raise InputError(f"{folder}: no records.jsonl in it or in its sub-folders; `arae evaluate` writes them")
    return [record for file in files for record in read_records(file)]
