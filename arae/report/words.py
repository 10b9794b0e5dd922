"""What the numbers say, in sentences: every claim is worked out from the records, whichever way they point."""

from __future__ import annotations

from collections.abc import Iterable

from arae.records import Record, Threat
from arae.report.table import (
    BASELINES,
    CLASSIFICATION,
    NORMS,
    RECONSTRUCTION,
    Row,
    Table,
    number_text,
    radius_text,
    tabulate,
    threat_text,
)

_BASELINE_NAMES = ("the mean image", "itself fed another image’s features")


def sentences(table: Table) -> list[str]:
    """What a newcomer sees on the map, in a few sentences; what was not measured is not mentioned."""
    said: list[str] = []
    for _, rows in table.series():
        several = len(table.series()) > 1
        found = [
            _subject(rows),
            _accuracy(rows),
            _robustness(rows, table.headline),
            _quality(rows),
            _under_attack(rows, table.headline),
            _against_baselines(rows),
        ]
        said += [s for s in (found[:4] if several else found) if s]
    return list(dict.fromkeys(said))


def convergence(table: Table) -> list[str]:
    """How far attacks of different strength at one norm and radius differ: has the attack converged?"""
    notes = []
    attacks = [c.threat for c in table.columns if c.metric == "robust_accuracy" and c.threat]
    for strong in table.strongest:
        for weak in [t for t in attacks if (t.norm, t.eps) == (strong.norm, strong.eps) and t != strong]:
            pairs = [
                (a.value, b.value)
                for row in table.rows
                if (a := row.get("robust_accuracy", CLASSIFICATION, weak))
                and (b := row.get("robust_accuracy", CLASSIFICATION, strong))
            ]
            if pairs:
                most = max(abs(a - b) for a, b in pairs if a is not None and b is not None)
                notes.append(
                    f"{threat_text(weak)} and {threat_text(strong)} differ by at most {number_text(most, 'fraction')} "
                    f"points of robust accuracy over {len(pairs)} encoder{'s' * (len(pairs) > 1)}."
                )
    return notes


def summary(records: Iterable[Record]) -> list[str]:
    """Every value, its interval and its n as lines for a terminal."""
    table, lines = tabulate(records), []
    for row in table.rows:
        lines.append(row.label)
        for column in [c for c in table.columns if c in row.cells]:
            record = row.cells[column]
            name = column.metric.replace("_", " ") if column.metric.endswith("accuracy") else column.metric.upper()
            how = "" if column.protocol in (CLASSIFICATION, RECONSTRUCTION) else f" ({column.protocol})"
            under = f" under {threat_text(column.threat)}" if column.threat else ""
            value = f"not measured: {record.reason}" if record.value is None else _number(record)
            low_high = [number_text(end, record.unit) for end in record.interval or ()]
            small = [" … ".join(low_high), f"n = {record.n:,}" if record.n and record.value is not None else ""]
            lines.append("; ".join([f"  {name}{how}{under}: {value}", *filter(None, small)]))
        lines += [f"  note: {flag}" for flag in dict.fromkeys(flag for r in row.cells.values() for flag in r.flags)]
    return lines


def _subject(rows: list[Row]) -> str:
    model = next((r.model for r in rows if r.model.decoder), rows[0].model)
    radii = [radius_text(r.eps) if r.eps else "0 (standard training)" for r in rows]
    norms = {NORMS[r.model.train_norm] for r in rows if r.eps and r.model.train_norm}
    counts = sorted({c.n for r in rows for c in r.cells.values() if c.n})
    what = f"{len(rows)} encoders ({model.encoder})" if len(rows) > 1 else f"One encoder ({model.encoder})"
    decoder = ""
    if model.decoder:
        layer = f" at layer {model.layer}" if model.layer else ""
        decoder = f"; for each, a decoder ({model.decoder}) learned to rebuild the image from its features{layer}"
        decoder = decoder if len(rows) > 1 else decoder.replace("for each, ", "")
    measured = f", measured on {_span(counts)} {rows[0].split} images" if counts else ""
    return (
        f"{what} trained on {rows[0].dataset} at radi{'i' if len(rows) > 1 else 'us'} ε = {_listed(radii)}"
        f"{f' in {_listed(sorted(norms))}' if norms else ''}{decoder}{measured}."
    )


def _accuracy(rows: list[Row]) -> str | None:
    first, last = _ends(rows, "clean_accuracy", CLASSIFICATION, None)
    if not first:
        return None
    said = f"On clean images {_name(first[0])} classifies {_number(first[1])} correctly"
    if not last:
        return f"{said}."
    return f"{said} and {_name(last[0])} classifies {_number(last[1])}: {_change(first[1], last[1])}."


def _robustness(rows: list[Row], threat: Threat | None) -> str | None:
    if threat is None:
        return None
    first, last = _ends(rows, "robust_accuracy", CLASSIFICATION, threat)
    if not first:
        return None
    said = (
        f"If an attacker may move every image by up to {NORMS[threat.norm]} ε = {radius_text(threat.eps)} "
        f"({threat_text(threat).split(',')[0]}), {_name(first[0])} is still right on {_number(first[1])}"
    )
    if not last:
        return f"{said}."
    return f"{said}, {_name(last[0])} on {_number(last[1])}: {_change(first[1], last[1])}."


def _quality(rows: list[Row]) -> str | None:
    said = []
    for metric, name in (("psnr", "PSNR"), ("ssim", "SSIM"), ("lpips", "LPIPS")):
        found = _with(rows, metric, RECONSTRUCTION, None)
        if len(found) < 2:
            continue
        sign = 1 if found[0][1].direction == "higher" else -1
        row, best = max(found, key=lambda f: sign * _value(f[1]))
        other = next((f for f in found if f[0].eps == 0), found[0])
        if other[0] is row:
            other = max((f for f in found if f[0] is not row), key=lambda f: sign * _value(f[1]))
        said.append(f"{name} is best for {_name(row)} ({_number(best)}; {_name(other[0])}: {_number(other[1])}"
                    f"{_caution(best, other[1])})")  # fmt: skip
    return f"Of the reconstructions, {'; '.join(said)}." if said else None


def _under_attack(rows: list[Row], threat: Threat | None) -> str | None:
    if threat is None:
        return None
    said = []
    for row in dict.fromkeys(r.label for r in (rows[0], rows[-1])):
        member = next(r for r in rows if r.label == row)
        clean, attacked = member.get("psnr", RECONSTRUCTION), member.get("psnr", RECONSTRUCTION, threat)
        if clean and attacked:
            verb = "falls" if _value(attacked) < _value(clean) else "goes"
            said.append(f"{verb} from {_number(clean)} to {_number(attacked)} for {_name(member)}")
    return f"Rebuilt from the attacked images, PSNR against the clean ones {' and '.join(said)}." if said else None


def _against_baselines(rows: list[Row]) -> str | None:
    said = []
    for protocol, name in zip(BASELINES, _BASELINE_NAMES, strict=True):
        gains = [
            (_value(own) - _value(base), row)
            for row in rows
            if (own := row.get("psnr", RECONSTRUCTION)) and (base := row.get("psnr", protocol))
        ]
        if not gains:
            continue
        least, row = min(gains, key=lambda g: g[0])
        beaten = sum(gain > 0 for gain, _ in gains)
        margin = f" by {number_text(least, 'dB')} dB or more" if beaten == len(gains) else ""
        who = "every decoder beats" if beaten == len(gains) else f"only {beaten} of {len(gains)} decoders beat"
        worst = "" if margin else f" (worst: {_name(row)}, {number_text(least, 'dB')} dB)"
        said.append(f"{who} {name}{margin}{worst}")
    return _capital(f"{', and '.join(said)}, in PSNR.") if said else None


def _with(rows: list[Row], metric: str, protocol: str, threat: Threat | None) -> list[tuple[Row, Record]]:
    return [(row, record) for row in rows if (record := row.get(metric, protocol, threat))]


def _ends(
    rows: list[Row], metric: str, protocol: str, threat: Threat | None
) -> tuple[tuple[Row, Record] | None, tuple[Row, Record] | None]:
    """The smallest and the largest radius at which the metric has a value."""
    found = _with(rows, metric, protocol, threat)
    return (found[0] if found else None, found[-1] if len(found) > 1 else None)


def _name(row: Row) -> str:
    return f"the encoder trained at ε = {radius_text(row.eps)}" if row.eps else "the standard encoder"


def _number(record: Record) -> str:
    unit = {"fraction": " %", "dB": " dB", "1": ""}.get(record.unit, f" {record.unit}")
    return number_text(_value(record), record.unit) + unit


def _change(a: Record, b: Record) -> str:
    """Fractions in points: how much more or less b is than a."""
    gap = _value(b) - _value(a)
    points = number_text(abs(gap), "fraction")
    if float(points) == 0:
        return "no difference"
    return f"{points} points {'more' if gap > 0 else 'less'}{_caution(a, b)}"


def _caution(a: Record, b: Record) -> str:
    if a.interval and b.interval and a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]:
        return ", within overlapping 95 % intervals"
    return ""


def _value(record: Record) -> float:
    assert record.value is not None  # Row.get hands out only records with a value
    return record.value


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _span(counts: list[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
