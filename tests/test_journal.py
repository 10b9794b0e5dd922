"""What is told to MLflow, and by which names: records, directions; the journal and the card that outlive a kill."""

import threading
from pathlib import Path

import pytest
from tracking import PGD, record

from arae.records import Record
from arae.tracking import metric_name, record_names
from arae.tracking.journal import Card, Journal, is_better
from arae.tracking.mirror import CARD, PENDING, batches

# --- names, directions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (record("clean_accuracy", 0.8), "final/clean_accuracy"),
        (record("robust_accuracy", 0.6, threat=PGD), "final/robust_accuracy.l2-1.5.pgd-50x5"),
        (record("psnr", 23.0), "final/psnr.reconstruction"),
        (record("psnr", 20.0, threat=PGD), "final/psnr.under-l2-1.5.pgd-50x5"),
        (record("psnr", 9.0, protocol="mean image"), "final/psnr.mean image"),
        (record("psnr", 9.0, protocol="upscale-4", threat=PGD), "final/psnr.upscale-4.under-l2-1.5.pgd-50x5"),
        (record("clean_accuracy", 0.9, split="train"), "final/clean_accuracy.train"),
        (record("clean_accuracy", 0.1, dataset="m+nist"), "final/clean_accuracy.m-nist"),
        (
            record("robust_accuracy", 0.6, threat=PGD.model_copy(update={"norm": "linf", "eps": 8 / 255, "steps": 10})),
            "final/robust_accuracy.linf-8of255.pgd-10x5",
        ),
    ],
)
def test_a_record_has_a_readable_name(given: Record, name: str) -> None:
    assert list(record_names([given], "fashion-mnist")) == [name]


def test_records_that_differ_elsewhere_keep_distinct_names() -> None:
    records = [record("psnr", v, threat=PGD.model_copy(update={"step_size": v})) for v in (0.1, 0.2, 0.3)]
    named = record_names(records, "fashion-mnist")
    assert list(named.values()) == records


def test_metric_names_hold_only_what_mlflow_takes() -> None:
    assert metric_name("a+b=c/d e.f:g-h_1(é)") == "a-b-c/d e.f:g-h_1---"


@pytest.mark.parametrize(
    ("name", "value", "than", "better"),
    [
        ("encoder/epoch/loss", 1.0, 2.0, True),
        ("encoder/epoch/loss", 2.0, 1.0, False),
        ("encoder/epoch/loss", 1.0, 1.0, False),
        ("decoder/epoch/lpips", 0.1, 0.2, True),
        ("robust_accuracy", 0.6, 0.5, True),
        ("psnr", 20.0, 21.0, False),
        ("psnr", 20.0, None, True),
        ("psnr", float("nan"), None, False),
        ("lr", 0.1, None, False),
        ("lossy/epoch/psnr", 2.0, 1.0, True),
    ],
)
def test_better_is_by_direction(name: str, value: float, than: float | None, better: bool) -> None:
    assert is_better(name, value, than) is better


# --- the journal and the card -------------------------------------------------------------------------------------


def test_a_journal_is_a_queue_that_leaves_no_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / PENDING)
    journal.append(*({"op": "tag", "n": n} for n in range(5)))
    head = journal.head(limit=3)
    assert [o["n"] for o in head.operations] == [0, 1, 2]
    journal.append({"op": "tag", "n": 5})
    journal.drop(head.size)
    assert [o["n"] for o in journal.all()] == [3, 4, 5]
    journal.drop(journal.head().size)
    assert list(tmp_path.iterdir()) == []
    assert journal.head().size == 0


@pytest.mark.parametrize("torn", [b'{"op": "tag", "n', b"\xff\xfe", b"[1]", b"\n"])
def test_a_torn_line_costs_no_other(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / PENDING
    journal = Journal(path)
    journal.append({"n": 0})
    path.write_bytes(path.read_bytes() + torn)
    journal.append({"n": 1})
    assert [o["n"] for o in journal.all()] == [0, 1]
    journal.drop(journal.head().size)
    assert not path.exists()


def test_nothing_is_lost_between_writers_and_a_sender(tmp_path: Path) -> None:
    path = tmp_path / PENDING
    read: list[tuple[int, int]] = []

    def write(who: int) -> None:
        for n in range(100):
            Journal(path).append({"who": who, "n": n})

    writers = [threading.Thread(target=write, args=(who,)) for who in range(3)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers) or path.exists():
        head = Journal(path).head(limit=7)
        read += [(o["who"], o["n"]) for o in head.operations]
        if head.size:
            Journal(path).drop(head.size)
    assert sorted(read) == [(who, n) for who in range(3) for n in range(100)]
    assert all([n for w, n in read if w == who] == list(range(100)) for who in range(3))


def test_batches_keep_the_order_and_mlflows_limits() -> None:
    many = [{"op": "metrics", "values": dict.fromkeys(map(str, range(400)), 1.0)} for _ in range(6)]
    operations = [{"op": "run"}, *[{"op": "param"}] * 250, *many, {"op": "artifact"}, {"op": "tag"}, {"op": "end"}]
    groups = list(batches(operations))
    assert [o for group in groups for o in group] == operations
    for group in groups:
        assert sum(len(o.get("values", ())) for o in group) <= 1000
        assert sum(o["op"] in ("param", "tag") for o in group) <= 100
        assert len(group) == 1 or not {"run", "artifact", "end"} & {o["op"] for o in group}


def test_a_card_forgets_a_stage_whose_recipe_has_changed() -> None:
    card = Card()
    run = {
        "op": "run",
        "name": "a",
        "experiment": "a",
        "parent": None,
        "time": 1,
        "digests": {"encoder": "1", "decoder": "1"},
    }
    card.absorb(run)
    for series in ("encoder/epoch", "decoder/epoch"):
        card.absorb({"op": "metrics", "series": series, "step": 5, "values": {f"{series}/loss": 1.0}})
    card.absorb(run | {"digests": {"encoder": "1", "decoder": "2"}})
    assert card.reached == {"encoder/epoch/loss": 5}
    assert card.best == card.last == {"encoder/epoch/loss": 1.0}


def test_a_copied_folder_does_not_write_into_the_run_of_the_original() -> None:
    card = Card(run_id="f00", key="k", name="a", reached={"encoder/loss": 9})
    card.absorb({"op": "run", "name": "b", "experiment": "b", "parent": None, "time": 1, "digests": {}})
    assert (card.run_id, card.key, card.name, card.reached) == (None, None, "b", {})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"run_id": "a", "unknown": 1}'])
def test_a_card_that_cannot_be_read_is_blank(tmp_path: Path, text: str) -> None:
    (tmp_path / CARD).write_text(text)
    assert Card.load(tmp_path / CARD).reached == {}
