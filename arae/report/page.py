"""The report as one HTML page that needs nothing but itself: no network, no scripts, pictures inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape

from arae.config import Recipe, dump_recipe
from arae.records import Record
from arae.report.style import CSS
from arae.report.table import (
    BASELINES,
    CLASSIFICATION,
    RECONSTRUCTION,
    Column,
    Row,
    Table,
    number_text,
    threat_text,
)
from arae.report.words import convergence, sentences

_NAMES = {
    "clean_accuracy": "Clean accuracy",
    "robust_accuracy": "Robust accuracy",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
}
_PROTOCOLS = {"mean-image": "mean image (baseline)", "other-features": "another image’s features (baseline)"}
_UNITS = {"fraction": "%", "1": ""}
_ARROWS = {"higher": ("↑", "higher is better"), "lower": ("↓", "lower is better")}
_GLOSSARY = (
    ("ε (radius)", "How far an attacker may move an image, in the norm named, with pixels between 0 and 1. Training "
     "radius: the images an encoder was trained on were attacked that hard; ε = 0 is standard training."),
    ("Clean / robust accuracy", "Share of held-out images classified correctly as they are / after an attack (PGD: "
     "several gradient steps that raise the loss; of several restarts, the worst counts for each image)."),
    ("PSNR", "Peak signal-to-noise ratio between reconstruction and original: the mean squared difference on a "
     "logarithmic scale, in dB; mean over images."),
    ("SSIM", "Structural similarity: agreement of local brightness, contrast and structure; 1 is identical."),
    ("LPIPS", "Distance between deep features of the two images; 0 is identical."),
    ("Baselines", "PSNR when the answer is always the mean of the evaluated images, and when the decoder is fed the "
     "features of another image. A decoder that does not beat both has learned nothing about the image at hand."),
    ("95 % interval", "Small numbers and bars: where the value would lie in 95 % of repetitions with other held-out "
     "images. It does not cover training again with another seed."),
)  # fmt: skip


def render(
    table: Table,
    records: Sequence[Record],
    recipe: Recipe | None,
    map_png: bytes,
    grid_png: bytes | None,
    commands: Sequence[tuple[str, str]],
) -> str:
    """The whole page."""
    subject = recipe.name if recipe else ", ".join(sorted({record.dataset for record in records}))
    title = f"Robustness and reconstruction: {subject}"
    body = f"""{_summary(table, records)}
{_map(table, map_png)}
{_reconstructions(grid_png)}
{_tables(table)}
{_glossary()}
{_commands(commands)}
{_recipe(recipe)}
{_provenance(records)}"""
    return document(title, body)


def document(title: str, body: str, css: str = "") -> str:
    """A page that may fetch nothing and run nothing, its style inside; `css` comes after the report's own."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}{css}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
</body>
</html>
"""


def _summary(table: Table, records: Sequence[Record]) -> str:
    small = any(record.scale == "small" for record in records)
    note = (
        '<p class="note">A small run (<code>scale: small</code>): it shows the effect, '
        "and its numbers are not to be compared with those of full-size experiments.</p>"
        if small
        else ""
    )
    seen = "".join(f"<li>{prose(sentence)}</li>" for sentence in sentences(table))
    return f"<section>\n<h2>What one sees</h2>\n<ul>{seen}</ul>\n{note}\n</section>"


def _map(table: Table, png: bytes) -> str:
    threat = table.headline
    under = f"Robust accuracy under {threat_text(threat)}. " if threat else ""
    return f"""<section>
<h2>The map</h2>
<figure>
{_image(png, "map", " ".join(sentences(table)))}
<figcaption>One point a training radius: robust accuracy against <b>a</b> PSNR and <b>b</b> SSIM of the
reconstructions of clean images; up and to the right is better. <b>c</b> Clean accuracy, and robust accuracy at each
radius attacked with, against the training radius. {prose(under)}Bars: 95 % intervals.</figcaption>
</figure>
</section>"""


def _reconstructions(png: bytes | None) -> str:
    if png is None:
        return "<section>\n<h2>Reconstructions</h2>\n<p>No pictures were made in this run.</p>\n</section>"
    alt = "Held-out images in the top row; below, row by row, what each decoder rebuilds from its encoder’s features"
    return f"""<section>
<h2>Reconstructions</h2>
<figure>
{_image(png, "reconstructions", alt)}
<figcaption>Held-out images, and what each decoder rebuilds from its encoder’s features of the clean and of the attacked
image. Under each: PSNR in dB to the original at the top of the column.</figcaption>
</figure>
</section>"""


def _image(png: bytes, name: str, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<div class="scroll"><img id="{name}" alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'


def _tables(table: Table) -> str:
    groups = (
        ("Accuracy and robustness", "accuracy", lambda c: c.protocol == CLASSIFICATION),
        ("Quality of the reconstructions", "quality", lambda c: c.protocol in (RECONSTRUCTION, *BASELINES)),
        ("Other measurements", "other", lambda c: c.protocol not in (CLASSIFICATION, RECONSTRUCTION, *BASELINES)),
    )
    shown = [(title, name, columns) for title, name, of in groups if (columns := [c for c in table.columns if of(c)])]
    notes = "".join(f"<p>{prose(note)}</p>\n" for note in convergence(table))
    body = "\n".join(_table(table.rows, columns, title, name) for title, name, columns in shown)
    return f"""<section>
<h2>The numbers</h2>
<p>One row a training radius. ↑ higher is better, ↓ lower is better; <b class="best">bold</b> is the best value of its
column (intervals may overlap); small print is the 95 % interval; n is the number of held-out images.</p>
{body}
{notes}</section>"""


def _table(rows: Sequence[Row], columns: Sequence[Column], title: str, name: str) -> str:
    notes: list[str] = []
    counts = {c: {row.cells[c].n for row in rows if c in row.cells and row.cells[c].value is not None} for c in columns}
    head = "".join(_heading(c, counts[c]) for c in columns)
    best = {c: _best(rows, c) for c in columns}
    body = "\n".join(
        f'<tr><th scope="row">{escape(row.label)}</th>'
        + "".join(_cell(row.cells.get(c), c, best[c], len(counts[c]) > 1, notes, name) for c in columns)
        + "</tr>"
        for row in rows
    )
    listed = "".join(f'<li id="{name}-note-{i}">{escape(note)}</li>' for i, note in enumerate(notes, 1))
    return f"""<div class="scroll"><table id="{name}">
<caption>{escape(title)}</caption>
<thead><tr><th scope="col">Encoder trained at</th>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
{f'<ol class="notes">{listed}</ol>' if notes else ""}"""


def _heading(column: Column, counts: set[int | None]) -> str:
    name = _NAMES.get(column.metric, column.metric.replace("_", " "))
    arrow, meaning = _ARROWS[column.direction]
    unit = _UNITS.get(column.unit, column.unit)
    how = _PROTOCOLS.get(column.protocol, "")
    if not how and column.protocol not in (CLASSIFICATION, RECONSTRUCTION):
        how = column.protocol
    under = threat_text(column.threat) if column.threat else ""
    if under and column.protocol == RECONSTRUCTION:
        under = f"from attacked images, {under}"
    n = next(iter(counts)) if len(counts) == 1 else None
    small = [part for part in (how, under, f"n = {n:,}" if n else "") if part]
    mark = f'<abbr title="{meaning}">{arrow}</abbr>'
    lines = "".join(f"<small>{prose(part)}</small>" for part in small)
    return f'<th scope="col"><span>{escape(name)} {mark}{f" ({escape(unit)})" if unit else ""}</span>{lines}</th>'


def _cell(record: Record | None, column: Column, best: float | None, show_n: bool, notes: list[str], table: str) -> str:
    if record is None or record.value is None:
        reason = (record.reason if record else None) or "not measured for this encoder"
        if reason not in notes:
            notes.append(reason)
        number = notes.index(reason) + 1
        return f'<td>—<sup><a href="#{table}-note-{number}">{number}</a></sup></td>'
    value = number_text(record.value, record.unit)
    shown = f'<b class="best">{value}</b>' if record.value == best else value
    small = []
    if record.interval:
        small.append(" … ".join(number_text(end, record.unit) for end in record.interval))
    if show_n and record.n:
        small.append(f"n = {record.n:,}")
    data = f'data-metric="{escape(column.metric)}" data-value="{record.value!r}"'
    return f"<td {data}>{shown}{''.join(f'<small>{part}</small>' for part in small)}</td>"


def _best(rows: Sequence[Row], column: Column) -> float | None:
    """The column's best value; None for baselines, and where there is nothing to compare."""
    values = [r.value for row in rows if (r := row.cells.get(column)) and r.value is not None]
    if column.protocol in BASELINES or len(set(values)) < 2:
        return None
    return max(values) if column.direction == "higher" else min(values)


def _glossary() -> str:
    terms = "\n".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in _GLOSSARY)
    return f"<details>\n<summary>What the words mean</summary>\n<dl>\n{terms}\n</dl>\n</details>"


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    if not commands:
        return ""
    items = "\n".join(f"<p>{escape(what)}</p>\n<pre><code>{escape(command)}</code></pre>" for what, command in commands)
    return f'<section id="commands">\n<h2>Going on from here</h2>\n{items}\n</section>'


def _recipe(recipe: Recipe | None) -> str:
    if recipe is None:
        return ""
    text = escape(dump_recipe(recipe))
    return f"""<details id="recipe">
<summary>The recipe <code>{escape(recipe.name)}</code> (YAML)</summary>
<pre><code>{text}</code></pre>
</details>"""


def _provenance(records: Sequence[Record]) -> str:
    facts: list[tuple[str, Iterable[str]]] = [
        ("Time", _first_and_last([r.time for r in records])),
        ("Code", (r.git for r in records)),
        ("Recipe digests", (r.digest[:12] for r in records)),
        ("Seeds", (str(r.seed) for r in records)),
        ("Scale", (r.scale for r in records)),
        ("Data", (f"{r.dataset} ({r.split})" for r in records)),
        ("Hardware", (_flat(r.hardware) for r in records)),
        ("Versions", (_flat(r.versions) for r in records)),
    ]
    rows = "\n".join(
        f'<tr><th scope="row">{name}</th><td>{"<br>".join(escape(v) for v in dict.fromkeys(values) if v)}</td></tr>'
        for name, values in facts
    )
    return f"""<section>
<h2>Where the numbers come from</h2>
<div class="scroll"><table id="provenance" class="facts"><tbody>
{rows}
</tbody></table></div>
<p>All of it, unrounded, is in <code>records.jsonl</code> beside this page.</p>
</section>"""


def _first_and_last(times: list[str]) -> list[str]:
    first, last = min(times), max(times)
    return [first] if first == last else [f"{first} to {last}"]


def prose(text: str) -> str:
    """Escaped, with numbers kept on one line with their symbols and units."""
    text = escape(text)
    for loose in (" = ", " %", " dB"):
        text = text.replace(loose, loose.replace(" ", "\u00a0"))
    return text


def _flat(document: dict[str, object] | dict[str, str]) -> str:
    parts = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in document.items())
    return ", ".join(f"{key} {value}" for key, value in parts)
