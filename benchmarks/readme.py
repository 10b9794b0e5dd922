"""`python -m benchmarks.readme RUN`: the README's pictures and table from a demo's run, and the records they rest on.

Writes `docs/demo-map.png`, `docs/demo-reconstructions.png`, `benchmarks/results/demo.jsonl` (the records as measured)
and the README's table between its markers.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from arae.errors import InputError
from arae.files import write_text
from arae.records import Record, read_records
from arae.report.table import Column, tabulate, threat_text
from arae.report.words import sentences

ROOT = Path(__file__).resolve().parent.parent
README, RECORDS = ROOT / "README.md", ROOT / "benchmarks" / "results" / "demo.jsonl"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
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
    made = tabulate(records)
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


def shows(column: Column) -> bool:
    """Accuracies, and the quality of clean reconstructions; the page has the rest."""
    return column.protocol == "classification" or column.threat is None


def heading(column: Column) -> str:
    """What a column holds."""
    if column.threat:
        return f"% right under {threat_text(column.threat)}"
    return {"clean_accuracy": "% right", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}[column.metric]


def with_table(page: str, text: str) -> str:
    """The page with the text between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{README}: has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


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
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    try:
        records = read_records(run)
        for name in ("map", "reconstructions"):
            if not (run / f"{name}.png").is_file():
                raise InputError(f"{run}: no {name}.png; `make demo` writes it")
            shrink(run / f"{name}.png", ROOT / "docs" / f"demo-{name}.png")
        write_text(RECORDS, (run / "records.jsonl").read_text())
        write_text(README, with_table(README.read_text(), table(records)))
    except InputError as error:
        sys.exit(f"arae: {error}")


if __name__ == "__main__":
    main()
