"""The pictures of a report, as PNG bytes: the robustness-reconstruction map, and the grid of reconstructions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from arae.records import Record, Threat
from arae.report.table import CLASSIFICATION, NORMS, RECONSTRUCTION, Row, Table, radius_text, threat_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK, GREY = "#1a1a1a", "#6b6b6b"
# Okabe & Ito (2008): colours that people with any colour vision tell apart; markers and dashes say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Grid:
    """Pictures for the grid of reconstructions.

    `originals` and the images of every row: float [k, C, H, W] in [0, 1], C = 1 or 3; a row is (label, images),
    such as ("ε = 1.5, attacked", …), its i-th image belonging to the i-th original. Rows whose labels agree up to the
    first comma are drawn as one group.
    """

    originals: Tensor
    rows: Sequence[tuple[str, Tensor]]

    def __post_init__(self) -> None:
        if self.originals.ndim != 4 or self.originals.shape[1] not in (1, 3) or not len(self.originals):
            raise ValueError(f"originals must be [k, 1 or 3, H, W], not {list(self.originals.shape)}")
        for label, images in self.rows:
            if images.shape != self.originals.shape:
                raise ValueError(
                    f"row {label!r} is {list(images.shape)}, but the originals are {list(self.originals.shape)}"
                )


def map_png(table: Table) -> bytes:
    """Robust accuracy against PSNR and SSIM, one point a training radius; and accuracies against that radius."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.4, 5.0), dpi=DPI, layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    _plane(left, table, "psnr", "PSNR of the reconstructions (dB)")
    _plane(middle, table, "ssim", "SSIM of the reconstructions")
    _accuracies(right, table)
    for axes, letter in zip((left, middle, right), "abc", strict=True):
        axes.set_title(letter, loc="left", fontweight="bold", fontsize=13, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    _place_labels(figure, (left, middle))
    return _png(figure)


def grid_png(grid: Grid) -> bytes:
    """Labelled rows of images; the number under each is its PSNR in dB to the original at the top of its column."""
    return _png(grid_figure(grid))


def grid_figure(grid: Grid, width: float | None = None, size: float = 11) -> Figure:
    """The grid of reconstructions, to be written. `width`: inches at most; default: 10.5 for the images of a row.

    size: of the labels, in points; the numbers under the images have 0.77 of it. Images are an inch wide at most.
    """
    from matplotlib.figure import Figure

    rows = [("original", grid.originals), *grid.rows]
    count, _, high, across = grid.originals.shape
    left = 0.25 + 0.085 * size / 11 * max(len(label) for label, _ in rows)  # inches, as everything here
    tile = min(1.0, (10.5 if width is None else (width - left - 0.05) / 1.05) / count)
    tall = tile * high / across
    tops, y = [], 0.1
    for i, (label, _) in enumerate(rows):
        y += 0.16 * (i > 0 and label.split(",")[0] != rows[i - 1][0].split(",")[0])  # a gap before another encoder
        tops.append(y)
        y += tall + 0.22
    figure = Figure(figsize=(left + count * tile * 1.05 + 0.05, y), dpi=DPI, facecolor="white")
    for (label, images), top in zip(rows, tops, strict=True):
        _tiles(figure, label, images, grid.originals, (left, top, tile, tall), size)
    return figure


def _tiles(
    figure: Figure,
    label: str,
    images: Tensor,
    originals: Tensor,
    place: tuple[float, float, float, float],
    points: float,
) -> None:
    """One row of the grid; `place` is (left, top, width, height) of its first tile, in inches from the upper left."""
    left, top, tile, tall = place
    wide, high = figure.get_size_inches()
    size = {"color": INK, "fontsize": points, "fontweight": "bold" if images is originals else "normal"}
    figure.text((left - 0.12) / wide, 1 - (top + tall / 2) / high, label, ha="right", va="center", **size)
    for i, (image, score) in enumerate(zip(images, _psnr(originals, images), strict=True)):
        x = left + i * tile * 1.05
        axes = figure.add_axes((x / wide, 1 - (top + tall) / high, tile / wide, tall / high))
        smooth = "nearest" if image.shape[-1] <= 64 else None
        axes.imshow(_pixels(image), cmap="gray", vmin=0, vmax=1, interpolation=smooth, aspect="auto")
        axes.set_axis_off()
        if images is not originals:
            text = f"{score:.1f}" if np.isfinite(score) else "∞"
            figure.text((x + tile / 2) / wide, 1 - (top + tall + 0.03) / high, text,
                        ha="center", va="top", fontsize=points * 8.5 / 11, color=GREY)  # fmt: skip


def _plane(axes: Axes, table: Table, metric: str, name: str) -> None:
    """One panel of the map, with intervals as bars on both axes."""
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    threat = table.headline
    radii = sorted({row.eps for row in table.rows})
    shades = dict(zip(radii, colormaps["viridis"](np.linspace(0.05, 0.8, len(radii))), strict=True))
    drawn = []
    for i, (label, rows) in enumerate(table.series()):
        points = [p for row in rows if (p := _point(row, table, metric))]
        drawn += points
        line = {"color": "#b0b0b0", "linewidth": 1.4, "linestyle": DASHES[i % len(DASHES)], "zorder": 1}
        axes.plot([100 * _value(x) for _, x, _ in points], [_value(y) for *_, y in points], label=label, **line)
        for row, x, y in points:
            bars = {"xerr": _error(x, 100), "yerr": _error(y, 1), "ecolor": INK, "elinewidth": 1.1, "capsize": 3}
            style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 10, "color": shades[row.eps], "zorder": 3}
            axes.errorbar([100 * _value(x)], [_value(y)], markeredgecolor="white", **style, **bars)
            radius = f"ε = {radius_text(row.eps)}" if row.eps else "standard"
            # Where there is no free place, it is read over a bar.
            halo = [withStroke(linewidth=3, foreground="white")]
            at = (100 * _value(x), _value(y))
            axes.annotate(radius, at, fontsize=11, color=INK, zorder=4, path_effects=halo)
    if len(table.series()) > 1:
        axes.legend(fontsize=8, loc="best", framealpha=0.9)
    if not drawn or threat is None:
        axes.text(0.5, 0.5, f"{metric.upper()} or robust accuracy\nwas not measured", ha="center", va="center",
                  transform=axes.transAxes, color=GREY, fontsize=11)  # fmt: skip
    axes.margins(0.16)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -8), min(high, 108))
    axes.set_ylabel(f"{name}  →  better", fontsize=11)
    axes.set_xlabel(
        f"robust accuracy (%)  →  better\n{threat_text(threat)}" if threat else "robust accuracy (%)", fontsize=11
    )


def _accuracies(axes: Axes, table: Table) -> None:
    """Clean accuracy, and robust accuracy at each radius it was measured at, against the training radius."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    curves = [("clean", "clean_accuracy", None)]
    curves += [(_short(t, table), "robust_accuracy", t) for t in table.strongest]
    for s, (series, rows) in enumerate(table.series()):
        for i, (label, metric, threat) in enumerate(curves):
            points = [(row.eps, r) for row in rows if (r := row.get(metric, CLASSIFICATION, threat))]
            if not points:
                continue
            bars = np.concatenate([_error(r, 100) for _, r in points], axis=1)
            axes.errorbar(
                [eps for eps, _ in points], [100 * _value(r) for _, r in points], yerr=bars, capsize=3, markersize=7,
                color=INK if threat is None else COLOURS[(i - 1) % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                linestyle=DASHES[s % len(DASHES)], linewidth=1.8, label=f"{label}{f' ({series})' if series else ''}",
            )  # fmt: skip
    radii = sorted({row.eps for row in table.rows})
    if len(radii) <= 10:
        axes.xaxis.set_major_locator(FixedLocator(radii))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: radius_text(x)))
    norms = sorted({NORMS[r.model.train_norm] for r in table.rows if r.eps and r.model.train_norm})
    axes.set_xlabel(f"training radius ε ({' or '.join(norms) or 'none'}, images in [0, 1])", fontsize=11)
    axes.set_ylabel("accuracy (%)", fontsize=11)
    axes.set_ylim(-3, 103)
    axes.margins(x=0.06)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9.5, loc="best", framealpha=0.9, edgecolor="#d0d0d0")


def _short(threat: Threat, table: Table) -> str:
    norm = f"{NORMS[threat.norm]} " if len({t.norm for t in table.strongest}) > 1 else ""
    return f"attacked, {norm}ε = {radius_text(threat.eps)}"


def _point(row: Row, table: Table, metric: str) -> tuple[Row, Record, Record] | None:
    robust = row.get("robust_accuracy", CLASSIFICATION, table.headline) if table.headline else None
    quality = row.get(metric, RECONSTRUCTION)
    return (row, robust, quality) if robust and quality else None


def _value(record: Record) -> float:
    assert record.value is not None  # Row.get hands out only records with a value
    return record.value


def _error(record: Record, scale: float) -> np.ndarray:
    """[[below], [above]] of the interval; zero where there is none."""
    low, high = record.interval or (_value(record), _value(record))
    return scale * np.array([[max(_value(record) - low, 0)], [max(high - _value(record), 0)]])


def _place_labels(figure: Figure, panels: Sequence[Axes]) -> None:
    """Put each point's label where it covers least of the points, bars, lines and other labels."""
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    beside = [(9, 8), (9, -18), (12, -4), (18, 22), (18, -32), (26, -4)]
    places = [place for dx, dy in beside for place in ((dx, dy, "left"), (-dx, dy, "right"))]
    for axes in panels:
        labels = [text for text in axes.texts if isinstance(text, Annotation)]
        spots = [axes.transData.transform(label.xy) for label in labels]
        points = [Bbox.from_bounds(x - 13, y - 13, 26, 26) for x, y in spots]
        ink = _ink(axes)
        for label in labels:
            label.anncoords = "offset points"
            choices = []
            for dx, dy, side in places:
                label.set(position=(dx, dy), ha=side)
                box = label.get_window_extent().padded(3)
                outside = not (axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1))
                covered = sum(box.contains(x, y) for x, y in ink)
                choices.append((100 * box.count_overlaps(points) + 100 * outside + covered, dx, dy, side, box))
            _, dx, dy, side, box = min(choices, key=lambda choice: choice[0])
            label.set(position=(dx, dy), ha=side)
            points.append(box)


def _ink(axes: Axes) -> np.ndarray:
    """Points along the lines and bars of a panel, in pixels, some four pixels apart: [n, 2]."""
    from matplotlib.collections import LineCollection

    paths = [np.asarray(line.get_xydata()) for line in axes.lines]
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    paths += [np.asarray(segment) for bar in bars for segment in bar.get_segments()]
    found = [np.empty((0, 2))]
    for path in [axes.transData.transform(p) for p in paths if len(p)]:
        for start, end in pairwise(path):
            found.append(np.linspace(start, end, 2 + int(np.linalg.norm(end - start) / 4)))
    return np.concatenate(found)


def _pixels(image: Tensor) -> np.ndarray:
    """[C, H, W] in [0, 1] as what imshow takes: [H, W] grey or [H, W, 3]."""
    array = image.detach().float().clamp(0, 1).cpu().numpy()
    return array[0] if len(array) == 1 else array.transpose(1, 2, 0)


def _psnr(x: Tensor, y: Tensor) -> list[float]:
    """PSNR of each image in dB, infinite where they are equal."""
    mse = (x.detach().double() - y.detach().double()).square().flatten(1).mean(1)
    return (-10 * mse.log10()).tolist()


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": "arae"})
    return file.getvalue()
