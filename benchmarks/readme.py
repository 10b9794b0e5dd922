"""`python -m benchmarks.readme RUN`: the README's pictures and table from a demo's run, and the records they rest on.

Writes `docs/demo-map.png`, `docs/demo-reconstructions.png`, `benchmarks/results/demo.jsonl` (the records as measured)
and the README's table between its markers. `python -m benchmarks.readme RUN cifar10-radii` does so with the map of a
sweep over radii on CIFAR-10, once `arae report RUN` has drawn it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from arae.errors import InputError
from arae.files import write_text
from arae.records import Record, write_records
from arae.report import collect
from arae.report.table import Column, tabulate, threat_text
from arae.report.words import sentences

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
SHOWN = {"demo": ("map", "reconstructions"), "cifar10-radii": ("curves", "map")}
"""What the README shows, and the pictures of each."""
WIDTH = 1200  # pixels


def shown(record: Record | None) -> str:
    """A cell: the value and its 95 % interval."""
    if record is None or record.value is None or record.interval is None:
        return "–"
    factor, digits = {"fraction": (100, 1), "dB": (1, 2)}.get(record.unit, (1, 3))
    value, low, high = (f"{factor * v:.{digits}f}" for v in (record.value, *record.interval))
    return f"{value} ({low} to {high})"


def table(records: list[Record]) -> str:
    """Markdown: what is seen, in words; one row a training radius, accuracies in per cent, PSNR in dB."""
    made = tabulate(in_one_row(records))
    columns = [c for c in made.columns if c.protocol in ("classification", "reconstruction") and shows(c)]
    columns = [c for c in columns if any(row.get(c.metric, c.protocol, c.threat) for row in made.rows)]
    head = ["encoder", *(heading(c) for c in columns)]
    lines = [head, ["---"] * len(head)]
    lines += [[row.label, *(shown(row.cells.get(c)) for c in columns)] for row in made.rows]
    one = records[0]
    hardware = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in one.hardware.items() if key != "seconds")
    measured = f"n = {one.n} held-out images of {one.dataset}; 95 % intervals"
    tail = f"{measured}; {one.time[:10]}, revision {one.git[:12]}; {hardware}."
    said = "\n".join(f"- {sentence}" for sentence in sentences(made))
    return said + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{tail}\n"


def in_one_row(records: Sequence[Record]) -> list[Record]:
    """A sweep measures an encoder once for all its decoders; where it has one alone, they are one row of the table."""
    decoders: dict[tuple[str, str | None, float], dict[str | None, Record]] = {}
    for record in records:
        if record.model.decoder:
            decoders.setdefault(trained(record), {})[record.training] = record
    alone = {key: next(iter(found.values())) for key, found in decoders.items() if len(found) == 1}
    return [
        record
        if record.model.decoder or (other := alone.get(trained(record))) is None
        else record.model_copy(update={"model": other.model, "training": other.training})
        for record in records
    ]


def trained(record: Record) -> tuple[str, str | None, float]:
    """Which encoder a record is of."""
    return record.model.encoder, record.model.train_norm, record.model.train_eps


def shows(column: Column) -> bool:
    """Accuracies, and the quality of clean reconstructions; the page has the rest."""
    return column.protocol == "classification" or column.threat is None


def heading(column: Column) -> str:
    """What a column holds."""
    if column.threat:
        return f"% right under {threat_text(column.threat)}"
    return {"clean_accuracy": "% right", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}[column.metric]


def with_table(page: str, name: str, text: str) -> str:
    """The page with the text between the markers of that name."""
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise InputError(f"{README}: has no {first} … {last}")
    return f"{before}{first}\n\n{text}\n{last}{after}"


def records_of(name: str) -> Path:
    """Where the records lie that the README's table of this name is made of."""
    return RESULTS / f"{name}.jsonl"


def shrink(source: Path, target: Path) -> None:
    """A picture small enough to commit."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((WIDTH, WIDTH))
    buffer = io.BytesIO()
    picture.quantize(128).save(buffer, format="PNG", optimize=True)
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(buffer.getvalue())


def main() -> None:
    """Renew the README from the run named on the command line."""
    given = sys.argv[1:]
    run, name = Path(given[0] if given else "runs/demo"), given[1] if len(given) > 1 else "demo"
    try:
        if name not in SHOWN:
            raise InputError(f"{name}: the README shows no such thing, but {', '.join(SHOWN)}")
        records = sorted(collect(run), key=lambda record: record.model.train_eps)
        for picture in SHOWN[name]:
            if not (run / f"{picture}.png").is_file():
                raise InputError(f"{run}: no {picture}.png; `make demo`, or `arae report` of a sweep, writes it")
            shrink(run / f"{picture}.png", ROOT / "docs" / f"{name}-{picture}.png")
        write_records(records_of(name), records)
        write_text(README, with_table(README.read_text(), name, table(records)))
    except InputError as error:
        sys.exit(f"arae: {error}")


if __name__ == "__main__":
    main()
