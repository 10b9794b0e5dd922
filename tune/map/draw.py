"""What all figures of a sweep share: their size and type, hover values, and how they are written."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.0
"""Inches: both columns of a page."""
DPI = 300
SOFT = "#9a9a9a"
_STYLE: Any = {
    "font.size": 7.5, "axes.labelsize": 7.5, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "font.family": "DejaVu Sans", "axes.linewidth": 0.6, "axes.edgecolor": "#444444",
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.5, "lines.linewidth": 1.1, "hatch.linewidth": 0.6,
    "pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "arae", "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
}  # fmt: skip


class Named(Protocol):
    """An artist, as far as hovering needs it."""

    def set_gid(self, gid: str, /) -> None:
        """Name its group in the SVG."""
        ...


@dataclass
class Hover:
    """What is shown where one hovers an artist: its text by the artist's id in the SVG."""

    texts: dict[str, str] = field(default_factory=dict)

    def add(self, artist: Named, text: str) -> None:
        """Show this text over the artist."""
        gid = f"hover-{len(self.texts)}"
        artist.set_gid(gid)
        self.texts[gid] = text


@dataclass(frozen=True)
class Drawn:
    """A figure, drawn."""

    name: str
    title: str
    caption: str
    pdf: bytes
    png: bytes
    svg: str = ""
    """For the page, with hover values; without it the page shows the PNG."""


@dataclass(frozen=True)
class LeftOut:
    """A figure that there is nothing to draw of."""

    name: str
    title: str
    why: str


Picture = Drawn | LeftOut


@contextmanager
def style() -> Iterator[None]:
    """In the block, figures are made and written in the house style."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of so many inches, which makes room for its labels itself."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.04, h_pad=0.05, wspace=0.03, hspace=0.04)
    return figure


def written(name: str, title: str, caption: str, figure: Figure, hover: Hover) -> Drawn:
    """The figure as PDF with embedded fonts, PNG, and SVG that belongs into a page."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once: it is what takes the time
    pdf = _bytes(figure, "pdf", {"CreationDate": None, "Creator": "arae"})
    png = _bytes(figure, "png", {"Software": "arae"})
    svg = _bytes(figure, "svg", {"Date": None, "Creator": None}).decode()
    return Drawn(name, title, caption, pdf, png, inline_svg(svg, name, title, hover.texts))


def _bytes(figure: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    return file.getvalue()


def inline_svg(svg: str, name: str, title: str, texts: dict[str, str]) -> str:
    """An SVG file as an element of a page: its ids are its own there, hover texts are titles, nothing lies outside."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _plain(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _plain(element.tag)
        element.attrib = {_plain(key): _own(_plain(key), value, name) for key, value in element.attrib.items()}
        text = texts.get(element.get("id", "").removeprefix(f"{name}-"))
        if text is not None:
            told = ElementTree.Element("title")
            told.text = text
            element.insert(0, told)
            element.set("class", "hover")
    wide = float(root.attrib["viewBox"].split()[2]) / (72 * WIDTH)  # all figures at one scale
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"id": name, "role": "img", "aria-label": title}
    root.attrib["style"] = f"max-width: {62 * wide:.1f}rem; min-width: {34 * wide:.1f}rem"
    return ElementTree.tostring(root, encoding="unicode")


def _plain(name: str) -> str:
    return name.rpartition("}")[2]


def _own(key: str, value: str, name: str) -> str:
    """An attribute with the ids in it prefixed by the figure's name."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    return re.sub(r"url\(#", f"url(#{name}-", value)
