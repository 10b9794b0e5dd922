"""The page of a sweep: one HTML file that needs nothing but itself, in which every number leads to its record."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from arae.config import dump_recipe
from arae.report.page import document, prose
from arae.report.table import number_text
from arae.runs import RunFolder
from tune.map.draw import Drawn, Picture
from tune.map.marks import told
from tune.map.spent import planned_and_spent
from tune.map.table import Group, MapTable, Measure
from tune.map.words import left_objectives, place_of, sentences
from tune.results import Trial

OWN_CSS = """
figure svg { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
figure #reconstructions { min-width: 34rem; max-width: 62rem; width: 100%; max-height: none; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg .hover:hover { opacity: .6; cursor: help; }
td a { color: inherit; text-decoration: none; border-bottom: 1px dotted var(--soft); }
td.words, th.words { text-align: left; white-space: normal; min-width: 7rem; }
td.keys { text-align: left; white-space: nowrap; }
#points thead span { white-space: normal; }
#points thead th, #points th small { min-width: 0; }
#provenance td { text-align: left; overflow-wrap: anywhere; }
:target { background: var(--box); outline: 2px solid var(--link); }
.front th:first-child, .front td { font-weight: 600; }
@media print {
  figure svg, figure #reconstructions { min-width: 0 !important; max-width: 100%; }
  th:first-child, td.keys { white-space: normal; min-width: 5.5rem; }
  td.words, th.words { min-width: 4rem; overflow-wrap: anywhere; }
  #points small { font-size: 6.5pt; }
}
"""
_STATES = {"finished": "finished", "stopped": "cut short", "failed": "failed", None: "not at its end"}


def render(table: MapTable, pictures: Sequence[Picture]) -> str:
    """The whole page."""
    title = f"Map of the sweep {table.sweep.name}"
    parts = [_summary(table), *map(_figure, pictures), _table(table), _spent(table), _trials(table), _files(pictures),
             _recipe(table), _provenance(table)]  # fmt: skip
    return document(title, "\n".join(parts), OWN_CSS)


def _summary(table: MapTable) -> str:
    asked = f"<p>{prose(table.sweep.space.about)}</p>\n" if table.sweep.space.about else ""
    seen = "".join(f"<li>{prose(sentence)}</li>" for sentence in sentences(table))
    small = (
        '<p class="note">A small sweep (<code>scale: small</code>): it shows the effect, and its numbers are not to be '
        "compared with those of full-size experiments.</p>"
        if table.small
        else ""
    )
    return f"<section>\n{asked}<h2>What one sees</h2>\n<ul>{seen}</ul>\n{small}\n</section>"


def _figure(picture: Picture) -> str:
    head = f"<h2>{escape(picture.title)}</h2>"
    if not isinstance(picture, Drawn):
        return f'<section>\n{head}\n<p id="no-{picture.name}">Left out: {prose(picture.why)}.</p>\n</section>'
    shown = picture.svg
    if not shown:
        data = base64.b64encode(picture.png).decode()
        shown = f'<img id="{picture.name}" alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
    return f"""<section>
{head}
<figure>
<div class="scroll">{shown}</div>
<figcaption>{prose(picture.caption)}</figcaption>
</figure>
</section>"""


def _table(table: MapTable) -> str:
    if not table.groups:
        return "<section>\n<h2>The numbers</h2>\n<p>No trial is finished.</p>\n</section>"
    notes: list[str] = []
    head = "".join(_heading(table, measure) for measure in table.measures)
    body = "\n".join(_row(group, table, notes) for group in table.groups)
    listed = "".join(f'<li id="note-{i}">{escape(note)}</li>' for i, note in enumerate(notes, 1))
    left = "".join(f" Not part of the front: {escape(each)}." for each in left_objectives(table))
    return f"""<section>
<h2>The numbers</h2>
<p>One row a place of the space; the value is the mean over its seeds, and small print goes from the lowest to the
highest end of their 95 % intervals (of device-hours: from the least to the most). Each number leads to the trials that
it is from, and tells its records where it is hovered. The front is that of the sweep’s objectives.{left}</p>
<div class="scroll"><table id="points">
<thead><tr><th scope="col">Point</th>{head}<th scope="col" class="words">Place</th></tr></thead>
<tbody>
{body}
</tbody>
</table></div>
{f'<ol class="notes">{listed}</ol>' if notes else ""}
</section>"""


def _heading(table: MapTable, measure: Measure) -> str:
    arrow = "↑" if measure.sign > 0 else "↓"
    unit = {"fraction": " (%)", "dB": " (dB)"}.get(measure.unit, "")
    attack = f"<small>{prose(table.attack(measure))}</small>" if measure.eps is not None else ""
    name = measure.label.partition(" at ")[0]
    return f'<th scope="col"><span>{escape(name[:1].upper() + name[1:])} {arrow}{unit}</span>{attack}</th>'


def _row(group: Group, table: MapTable, notes: list[str]) -> str:
    cells = "".join(_cell(group, measure, notes) for measure in table.measures)
    place, best = place_of(group, table), group.number in table.standing.front
    seeds = f"<small>{len(group.trials)} seeds</small>" if len(group.trials) > 1 else ""
    return (
        f'<tr{" class=front" if best else ""}><th scope="row">{group.number}. {escape(group.label)}{seeds}</th>'
        f'{cells}<td class="words">{escape(place)}</td></tr>'
    )


def _cell(group: Group, measure: Measure, notes: list[str]) -> str:
    cell = group.cell(measure)
    if cell is None:
        reason = group.reason(measure)
        if reason not in notes:
            notes.append(reason)
        number = notes.index(reason) + 1
        return f'<td>—<sup><a href="#note-{number}">{number}</a></sup></td>'
    shown = number_text(cell.value, measure.unit)
    ends = [number_text(end, measure.unit) for end in (cell.low, cell.high)]
    small = f"<small>{ends[0]} … {ends[1]}</small>" if cell.low < cell.high else ""
    lines = "&#10;".join(escape(line) for line in told(group, (measure, cell)).splitlines())
    return (
        f'<td data-metric="{measure.metric}" data-value="{cell.value!r}" title="{lines}">'
        f'<a href="#trial-{group.trials[0].id}">{shown}</a>{small}</td>'
    )


def _spent(table: MapTable) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(what)}</th><td>{escape(planned)}</td><td>{escape(spent)}</td></tr>'
        for what, planned, spent in planned_and_spent(table.sweep)
    )
    without = "" if table.sweep.plan else "<p>No plan was written before this sweep.</p>\n"
    return f"""<section>
<h2>Planned and spent</h2>
{without}<div class="scroll"><table id="spent">
<thead><tr><th scope="col"></th><th scope="col">planned</th><th scope="col">spent</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
</section>"""


def _trials(table: MapTable) -> str:
    points = {trial.id: group.number for group in table.groups for trial in group.trials}
    rows = "\n".join(_trial(trial, points.get(trial.id)) for trial in table.sweep.trials)
    return f"""<section>
<h2>The trials</h2>
<p>Each with the file of its records, as a path beside this page; <code>table.csv</code> has every record of every
trial with its file, its line and its recipe’s digest.</p>
<div class="scroll"><table id="trials">
<thead><tr><th scope="col">Trial</th><th scope="col">Point</th><th scope="col" class="words">Values</th>
<th scope="col" class="words">State</th><th scope="col" class="words">Stages</th><th scope="col" class="words">Recipe’s
digest</th><th scope="col" class="words">Records</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
</section>"""


def _trial(trial: Trial, point: int | None) -> str:
    state = _STATES[trial.entry.state] + (f": {trial.entry.reason}" if trial.entry.reason else "")
    file = f"{trial.id}/records.jsonl"
    records = f'<a href="{file}">{file}</a> ({len(trial.records)})' if trial.records else "none"
    stages = "<br>".join(
        f"{outcome.stage}-{outcome.key}{'' if outcome.trained or outcome.measured else ' (taken over)'}"
        for outcome in trial.outcomes
    )
    digest = "<br>".join(dict.fromkeys(escape(record.digest[:12]) for record in trial.records))
    words = f'<td class="words">{prose(state)}</td><td class="keys">{stages}</td><td class="keys">{digest}</td>'
    return (
        f'<tr id="trial-{trial.id}"><th scope="row">{trial.id}</th><td>{point or "—"}</td>'
        f'<td class="words">{escape(trial.point.label)}</td>{words}<td class="words">{records}</td></tr>'
    )


def _files(pictures: Sequence[Picture]) -> str:
    names = [picture.name for picture in pictures if isinstance(picture, Drawn)]
    if not names:
        return ""
    links = ", ".join(f'{name} (<a href="{name}.pdf">PDF</a>, <a href="{name}.png">PNG</a>)' for name in names)
    return f"<section>\n<h2>For a paper</h2>\n<p>The figures beside this page: {links}. The numbers: " \
           '<a href="table.csv">table.csv</a>.</p>\n</section>'  # fmt: skip


def _recipe(table: MapTable) -> str:
    space = RunFolder(table.sweep.folder).space.read_text()
    return f"""<details id="recipe">
<summary>The space, and the recipe <code>{escape(table.sweep.name)}</code> that its trials vary (YAML)</summary>
<pre><code>{escape(space)}</code></pre>
<pre><code>{escape(dump_recipe(table.sweep.recipe))}</code></pre>
</details>"""


def _provenance(table: MapTable) -> str:
    records = [record for trial in table.sweep.finished for record in trial.records]
    if not records:
        return ""
    times = sorted(record.time for record in records)
    facts = {
        "Measured": [times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"],
        "Code": [record.git for record in records],
        "Data": [f"{record.dataset} ({record.split})" for record in records],
        "Seeds": [str(record.seed) for record in records],
        "Scale": [record.scale for record in records],
        "Device": [str(record.hardware.get("evaluated_on", record.hardware.get("device", ""))) for record in records],
        "Versions": [", ".join(f"{name} {version}" for name, version in record.versions.items()) for record in records],
    }
    rows = "\n".join(
        f'<tr><th scope="row">{name}</th><td>{"<br>".join(escape(v) for v in dict.fromkeys(values) if v)}</td></tr>'
        for name, values in facts.items()
    )
    return f"""<section>
<h2>Where the numbers come from</h2>
<div class="scroll"><table id="provenance" class="facts"><tbody>
{rows}
</tbody></table></div>
</section>"""
