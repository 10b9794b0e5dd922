"""Every record of every finished trial as a row of a CSV file: where it lies, and what it was measured of."""

from __future__ import annotations

import csv
import io
import json

from tune.map.table import MapTable

FIELDS = (
    "point", "trial", "file", "line", "training_norm", "training_eps", "seed", "metric", "protocol", "value", "low",
    "high", "n", "unit", "reason", "threat", "digest", "training", "scale", "git", "time",
)  # fmt: skip


def table_csv(table: MapTable) -> str:
    """The rows, with a column for each axis; accuracies are fractions, values are unrounded."""
    axes = list(table.sweep.space.axes)
    named = {axis: axis if axis not in FIELDS else f"axis {axis}" for axis in axes}
    file = io.StringIO()
    writer = csv.DictWriter(file, [*FIELDS, *named.values()], lineterminator="\n")
    writer.writeheader()
    for group in table.groups:
        for trial in group.trials:
            values = {named[axis]: value for axis, value in trial.point.values.items()}
            for line, record in enumerate(trial.records, 1):
                low, high = record.interval or (None, None)
                told = {key: getattr(record, key) for key in FIELDS if hasattr(record, key)}
                own = {
                    "point": group.number,
                    "trial": trial.id,
                    "file": f"{trial.id}/records.jsonl",
                    "line": line,
                    "training_norm": record.model.train_norm,
                    "training_eps": record.model.train_eps,
                    "low": low,
                    "high": high,
                    "threat": json.dumps(record.threat.model_dump()) if record.threat else None,
                }
                writer.writerow(values | told | own)
    return file.getvalue()
