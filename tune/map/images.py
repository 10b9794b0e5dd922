"""The grid of reconstructions: a row a training radius, a column a held-out image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from arae.data.augment import to_float
from arae.demo import pick
from arae.errors import AraeError
from arae.evaluate import held_out
from arae.models.autoencoder import load_autoencoder
from arae.report.figures import Grid, grid_figure
from arae.report.table import NORMS, radius_text
from arae.runs import runs_root
from tune.map.draw import DPI, WIDTH, Drawn, LeftOut, Picture, style
from tune.map.table import Group, Line, MapTable, Measure, listed
from tune.store import stages_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Reconstructions"
PSNR = Measure("psnr")
MOST = 8
"""Rows."""
SIZE = 9.2
"""Of labels, in points: the numbers under the images are then in 7."""


def draw_images(table: MapTable) -> Picture:
    """Held-out images, one of each class, and what the decoder of each radius makes of their features."""
    chosen = _chosen(table)
    if chosen is None:
        return LeftOut("reconstructions", TITLE, "no finished trial has a decoder whose PSNR was measured")
    said, groups = chosen
    try:
        grid, missing = _grid(groups, table)
    except (AraeError, OSError) as error:
        where = str(error).replace(f"{runs_root()}/", "")
        return LeftOut("reconstructions", TITLE, f"weights or images are not there any more ({where})")
    with style():
        figure = grid_figure(grid, WIDTH, SIZE)
        pdf, png = (_bytes(figure, kind) for kind in ("pdf", "png"))
    seeds = sorted({group.trials[0].recipe.seed for group in groups})
    seed = listed(map(str, seeds))
    caption = (
        f"Held-out images, and what each decoder rebuilds from its encoder’s features of them: {said}, seed {seed}. "
        "Under each: PSNR in dB to the original at the top of the column, worked out from the two anew: no record."
    )
    if missing:
        caption += f" Not shown, for their weights are not there any more: {', '.join(missing)}."
    return Drawn("reconstructions", TITLE, caption, pdf, png)


def _chosen(table: MapTable) -> tuple[str, Sequence[Group]] | None:
    """The line whose mean PSNR is best, or with one radius the best points of all lines; and which it is, in words."""
    lines = [Line(line.label, tuple(g for g in line.groups if g.cell(PSNR))) for line in table.lines]
    lines = [line for line in lines if line.groups]
    if not lines:
        return None
    if len(table.radii) == 1:
        every = sorted((g for line in lines for g in line.groups), key=lambda g: -_psnr(g))[:MOST]
        said = f"the {len(every)} points with the highest PSNR" if len(table.groups) > len(every) else "every point"
        return said, sorted(every, key=lambda g: g.number)
    best = max(lines, key=lambda line: (len({g.eps for g in line.groups}), fmean(map(_psnr, line.groups))))
    by_radius: dict[tuple[str, float], Group] = {}
    for group in best.groups:
        place = (group.norm or "", group.eps)
        if place not in by_radius or _psnr(group) > _psnr(by_radius[place]):
            by_radius[place] = group
    several = " (of the lines with the most radii, the one whose mean PSNR is highest)" if len(lines) > 1 else ""
    return (f"{best.label}{several}" if best.label else "every radius"), list(by_radius.values())[:MOST]


def _grid(groups: Sequence[Group], table: MapTable) -> tuple[Grid, list[str]]:
    """The pictures, and the labels of points whose weights are gone; raises the first error where all are."""
    rows, missing, originals, errors = list[tuple[str, torch.Tensor]](), list[str](), None, list[Exception]()
    for group in groups:
        recipe, label = group.trials[0].recipe, _label(group, table)
        try:
            model = load_autoencoder(stages_of(recipe)[-1].folder.path)
            if originals is None:
                images, labels = held_out(recipe, model, torch.device("cpu"))
                originals = to_float(images[torch.from_numpy(pick(labels.numpy()))])
            rows.append((label, model.reconstruct(originals)))
        except (AraeError, OSError) as error:
            errors.append(error)
            missing.append(label)
    if originals is None or not rows:
        raise errors[0]
    return Grid(originals, rows), missing


def _label(group: Group, table: MapTable) -> str:
    if len(table.radii) == 1:
        return f"point {group.number}"
    several = len({g.norm for g in table.groups if g.norm}) > 1
    return f"{f'{NORMS[group.norm]} ' if several and group.norm else ''}ε = {radius_text(group.eps)}"


def _bytes(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    metadata = {"CreationDate": None, "Creator": "arae"} if kind == "pdf" else {"Software": "arae"}
    figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    return file.getvalue()


def _psnr(group: Group) -> float:
    cell = group.cell(PSNR)
    assert cell is not None  # only groups that have one are asked
    return cell.value
