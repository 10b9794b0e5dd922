"""Records: round trips, what they refuse, and errors that name the line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from arae.errors import InputError
from arae.records import Record, read_records, write_records

WHOLE: dict[str, Any] = {
    "metric": "robust_accuracy",
    "value": 0.626,
    "unit": "fraction",
    "direction": "higher",
    "interval": [0.596, 0.655],
    "n": 1000,
    "reason": None,
    "dataset": "fashion-mnist",
    "split": "test",
    "protocol": "reconstruction",
    "model": {
        "encoder": "small-cnn",
        "layer": "conv4",
        "decoder": "mirror",
        "train_norm": "l2",
        "train_eps": 1.5,
        "losses": {"pixel": 1.0, "feature": 0.1},
    },
    "threat": {"norm": "l2", "eps": 1.5, "attack": "pgd", "steps": 10, "step_size": 0.375, "restarts": 1},
    "digest": "ab" * 32,
    "stage": "encoder",
    "seed": 0,
    "scale": "small",
    "git": "0123abc+dirty",
    "versions": {"torch": "2.14.1"},
    "hardware": {"device": "cpu", "world_size": 2, "cpus": ["x86"]},
    "time": "2026-01-02T03:04:05+00:00",
}


def changed(**changes: Any) -> dict[str, Any]:
    return WHOLE | changes


def record(**changes: Any) -> Record:
    return Record.model_validate(changed(**changes))


MANY = [
    record(),
    record(value=None, interval=None, n=None, reason="no backbone weights", threat=None),
    record(value=-1e-300, metric="psnr", unit="dB"),
    record(value=0.1 + 0.2, interval=[0.1 + 0.2, 1 / 3]),
    record(dataset='Bilder – größer ∞ "quoted"\n', hardware={"nested": {"deep": [1, None, "x"]}}),
]


@pytest.mark.parametrize("each", MANY)
def test_one_round_trip(each: Record, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [each])
    assert read_records(path) == [each]


def test_many_round_trips(tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", MANY)
    assert read_records(tmp_path) == MANY  # a run folder stands for its file
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == len(MANY)
    assert [json.loads(line)["metric"] for line in lines] == [each.metric for each in MANY]


def test_the_keys_are_the_published_ones() -> None:
    written = json.loads(record().model_dump_json())
    assert set(written) == {*WHOLE, "flags", "training"}
    assert set(written["model"]) == set(WHOLE["model"])
    assert set(written["threat"]) >= set(WHOLE["threat"])


def test_writing_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, MANY)
    write_records(path, MANY[:1])
    assert read_records(path) == MANY[:1]
    assert [each.name for each in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, MANY)

    def breaks_off():
        yield MANY[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_records(path, breaks_off())
    assert read_records(path) == MANY


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "place", ["value", "interval", "model.train_eps", "model.losses", "threat.eps", "threat.step_size"]
)
def test_what_is_not_finite_is_refused(bad: float, place: str) -> None:
    changes = {
        "value": {"value": bad},
        "interval": {"interval": [0.0, bad]},
        "model.train_eps": {"model": WHOLE["model"] | {"train_eps": bad}},
        "model.losses": {"model": WHOLE["model"] | {"losses": {"pixel": bad}}},
        "threat.eps": {"threat": WHOLE["threat"] | {"eps": bad}},
        "threat.step_size": {"threat": WHOLE["threat"] | {"step_size": bad}},
    }[place]
    with pytest.raises(ValidationError, match=r"finite|can't hold"):
        record(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"value": None}, "needs a reason"),
        ({"value": None, "reason": ""}, "needs a reason"),
        ({"interval": [0.7, 0.6]}, "interval"),
        ({"interval": [0.7]}, "interval"),
        ({"direction": "up"}, "direction"),
        ({"scale": "tiny"}, "scale"),
        ({"valeu": 1}, "valeu"),
        ({"model": {"encoder": "x", "epsilon": 1}}, "epsilon"),
        ({"model": {}}, "encoder"),
        ({"threat": {"norm": "l2"}}, "eps"),
        ({"threat": WHOLE["threat"] | {"norm": None}}, "norm"),
        ({"threat": WHOLE["threat"] | {"radius": 1}}, "radius"),
    ],
)
def test_a_record_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        record(**changes)


@pytest.mark.parametrize(
    "key", [key for key in WHOLE if key not in ("interval", "n", "reason", "threat", "versions", "hardware")]
)
def test_every_other_key_is_required(key: str) -> None:
    document = {name: value for name, value in WHOLE.items() if name != key}
    with pytest.raises(ValidationError, match=key):
        Record.model_validate(document)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "",
        "[]",
        "null",
        '{"metric": "psnr"}',
        record().model_dump_json()[:-9],  # cut short
        record().model_dump_json().replace('"higher"', '"up"'),
        record().model_dump_json().replace("0.626", "NaN"),
    ],
)
def test_the_bad_line_is_named(line: str, tmp_path: Path) -> None:
    good = record().model_dump_json()
    path = tmp_path / "records.jsonl"
    path.write_text(f"{good}\n{good}\n{line}\n{good}\n")
    with pytest.raises(InputError, match=r"records\.jsonl:3: ") as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_file_of_bytes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="arae evaluate"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_records(tmp_path)


def test_records_of_the_same_content_are_equal_and_frozen() -> None:
    assert record() == record()
    with pytest.raises(ValidationError, match="frozen"):
        record().value = 1.0  # pyright: ignore[reportAttributeAccessIssue]
