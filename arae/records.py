"""Records: everything that ends in a number ends as one JSON object on a line of `records.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from arae.errors import InputError
from arae.files import write_text


class Model(BaseModel):
    """Which networks were measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str
    layer: str | None = None
    decoder: str | None = None
    train_norm: Literal["l2", "linf"] | None = None
    train_eps: FiniteFloat = 0.0
    """Radius the encoder was trained at, for images in [0, 1]."""
    losses: dict[str, FiniteFloat] | None = None
    """Weights of the decoder's losses, mean-reduced."""


class Threat(BaseModel):
    """What the metric was measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: Literal["l2", "linf"]
    eps: FiniteFloat
    attack: str = "pgd"
    """The kind, as recipes write it: `pgd`, `apgd-ce`, `apgd-dlr`, `apgd-t`, `cascade`, `autoattack`."""
    steps: int
    step_size: FiniteFloat
    """Of PGD, every step's; of the others, the first step's, which they halve on their way."""
    restarts: int = 1
    random_start: bool = False


class Record(BaseModel):
    """One measured value and all that is needed to say where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    value: float | None
    unit: str
    direction: Literal["higher", "lower"]
    interval: tuple[FiniteFloat, FiniteFloat] | None = None
    """[low, high] at 95 %."""
    n: int | None = None
    """Samples behind the value."""
    reason: str | None = None
    """Why `value` is null."""
    flags: tuple[str, ...] = ()
    """Remarks on how far the value can be trusted, one line each: signs of masked gradients, images left out."""
    dataset: str
    split: str
    protocol: str
    model: Model
    threat: Threat | None = None
    digest: str
    training: str | None = None
    """Digest of the trained model's recipe, its evaluation apart: what the records of several protocols share."""
    stage: str
    seed: int
    scale: Literal["full", "small"]
    git: str
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict)
    time: str

    @model_validator(mode="after")
    def _a_number_or_a_reason(self) -> Record:
        if self.value is None and not self.reason:
            raise ValueError("a record without a value needs a reason")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a record can't hold {self.value}: write value=None and the reason")
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise ValueError(f"an interval is [low, high], not {list(self.interval)}")
        return self


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace the file by these records, all or nothing."""
    write_text(path, "".join(record.model_dump_json() + "\n" for record in records))


def read_records(path: Path) -> list[Record]:
    """The records of a file or a run folder; InputError names the line that is none."""
    if path.is_dir():
        path = path / "records.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"{path}: no records ({error.strerror}); `arae evaluate` writes them") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not records, which are JSON in UTF-8 ({error})") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record.model_validate(json.loads(line)))
        except ValueError as error:
            raise InputError(f"{path}:{number}: not a record ({' '.join(str(error).split())[:200]})") from None
    return records
