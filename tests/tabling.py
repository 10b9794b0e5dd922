"""Small tables and records of one's own."""

from arae.records import Model, Record


def plain() -> dict[str, object]:
    """A table of two rows, one column, one claim."""
    rows = {
        "bad": {"label": "bad", "run": "bad", "paper": {"psnr": 15.0}},
        "good": {"label": "good", "run": "good", "paper": {"psnr": [18.0, 2.0]}},
    }
    return {
        "id": "mine",
        "title": "Mine",
        "source": "nobody",
        "dataset": "blobs",
        "columns": {"psnr": {"label": "PSNR", "metric": "psnr"}},
        "rows": rows,
        "claims": [{"column": "psnr", "order": ["bad", "good"]}],
    }


def record(value: float | None, half: float = 0.1, **more: object) -> Record:
    fields = {
        "metric": "psnr",
        "value": value,
        "unit": "dB",
        "direction": "higher",
        "interval": None if value is None else (value - half, value + half),
        "reason": "no weights" if value is None else None,
        "n": 100,
        "dataset": "blobs",
        "split": "test",
        "protocol": "reconstruction",
        "model": Model(encoder="small-cnn"),
        "digest": "d",
        "stage": "decoder",
        "seed": 0,
        "scale": "small",
        "git": "g",
        "time": "2026-01-01",
    }
    return Record.model_validate(fields | more)
