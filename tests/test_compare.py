"""`arae compare`: what differs beyond its intervals is found, what does not is not, and the sides are alike."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import tiny_recipe

from arae.cli import main
from arae.compare import compare
from arae.config import Recipe, dump_recipe
from arae.differences import DIFFERS, LARGEST, NAMED, Comparison, Measured, Pair
from arae.errors import InputError
from arae.records import Model, Record, Threat, write_records
from tune.journal import Entry, Journal
from tune.space import Space

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
PGD = Threat(norm="l2", eps=0.5, steps=2, step_size=0.625)
EPS, FEATURE = "encoder.attack.eps", "decoder.losses.feature"


def record(
    metric: str = "clean_accuracy", value: float | None = 0.5, half: float | None = 0.05, **other: Any
) -> Record:
    """A record whose interval reaches `half` to both sides."""
    attacked = metric == "robust_accuracy"
    kind = {"psnr": ("dB", "higher"), "lpips": ("1", "lower")}.get(metric, ("fraction", "higher"))
    document = {
        "metric": metric,
        "value": value,
        "reason": None if value is not None else "no weights",
        "unit": kind[0],
        "direction": kind[1],
        "interval": (value - half, value + half) if half is not None and value is not None else None,
        "n": 100,
        "dataset": "images",
        "split": "test",
        "protocol": "classification" if metric.endswith("accuracy") else "reconstruction",
        "model": Model(encoder="small-cnn", layer="conv4"),
        "threat": PGD if attacked else None,
        "digest": "d" * 64,
        "stage": "encoder",
        "seed": 1,
        "scale": "small",
        "git": "0123456789abcdef",
        "time": "2026-01-01T00:00:00+00:00",
    }
    return Record.model_validate(document | other)


Write = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Write:
    """Writes a run folder of records, and returns its name."""

    def write(name: str, *records: Record, recipe: Recipe | None = None) -> str:
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "records.jsonl", records)
        if recipe is not None:
            (tmp_path / name / "recipe.yaml").write_text(dump_recipe(recipe))
        return str(tmp_path / name)

    return write


@pytest.fixture
def sweep(tmp_path: Path, tiny_npz: Path) -> Write:
    """Writes a sweep's folder: a trial for each of (values, records), those without records not at their end."""

    def write(name: str, axes: dict[str, Any], trials: list[tuple[dict[str, Any], list[Record]]], **keys: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(dump_recipe(tiny_recipe(tiny_npz, **keys)))
        Space.model_validate({"axes": axes})
        (folder / "space.yaml").write_text(yaml.safe_dump({"axes": axes}, sort_keys=False))
        journal = Journal(folder)
        for number, (values, records) in enumerate(trials):
            entry = Entry(f"trial{number}", values, number)
            journal.begin(entry)
            if records:
                entry.state = "finished"
                journal.end(entry)
                (folder / entry.id).mkdir()
                write_records(folder / entry.id / "records.jsonl", records)
        return str(folder)

    return write


def verdicts(found: Comparison) -> dict[tuple[str, str], str]:
    return {(pair.where, pair.what): pair.verdict for pair in found.pairs}


def check_mirror(a: str, b: str) -> Comparison:
    """The comparison; the other way round it must say the same with the sides exchanged."""
    found, mirrored = compare(a, b), compare(b, a)
    assert {pair.swapped() for pair in mirrored.pairs} == set(found.pairs)
    assert sorted(mirrored.only_b) == sorted(found.only_a)
    assert sorted(mirrored.only_a) == sorted(found.only_b)
    assert {pair.swapped() for pair in mirrored.differing} == set(found.differing)
    for one in (a, b):
        same = compare(one, one)
        assert not same.differing
        assert not same.only_a + same.only_b
        assert all(pair.difference in (0, None) for pair in same.pairs)
    return found


MANY = [record(), record("robust_accuracy", 0.3), record("psnr", 20.0, 0.2), record("lpips", 0.4, 0.01)]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ((0.5, (0.45, 0.55)), (0.5, (0.45, 0.55)), "not told apart"),
        ((0.5, (0.45, 0.55)), (0.6, (0.55, 0.65)), "not told apart"),  # they touch
        ((0.5, (0.45, 0.55)), (0.61, (0.56, 0.66)), DIFFERS),
        ((0.61, (0.56, 0.66)), (0.5, (0.45, 0.55)), DIFFERS),
        ((0.5, (0.1, 0.9)), (0.6, (0.59, 0.61)), "not told apart"),  # one inside the other
        ((0.5, None), (0.9, (0.85, 0.95)), "no interval"),
        ((0.5, (0.45, 0.55)), (0.9, None), "no interval"),
        ((0.5, None), (0.5, None), "no interval"),
        ((None, None), (0.9, (0.85, 0.95)), "not measured"),
        ((0.0, (0.0, 0.0)), (0.0, (0.0, 0.0)), "not told apart"),
        ((0.0, (0.0, 0.0)), (1.0, (1.0, 1.0)), DIFFERS),
    ],
)
def test_a_verdict_is_that_of_the_intervals(a: Any, b: Any, verdict: str) -> None:
    pair = Pair("", "x", "1", "higher", Measured(*a), Measured(*b))
    assert pair.verdict == pair.swapped().verdict == verdict
    assert (pair.separation > 1 + 1e-9) == (verdict == DIFFERS)
    assert pair.separation == pair.swapped().separation


@pytest.mark.parametrize("number", range(len(MANY)))
@pytest.mark.parametrize("shift", [0.9, 1.1, -0.9, -1.1, 3.0])
def test_a_shift_beyond_both_half_widths_is_found_and_no_other(run: Write, number: int, shift: float) -> None:
    one = MANY[number]
    assert one.value is not None
    assert one.interval is not None
    by = shift * (one.interval[1] - one.interval[0])
    moved = one.model_copy(update={"value": one.value + by, "interval": tuple(end + by for end in one.interval)})
    others = [*MANY[:number], moved, *MANY[number + 1 :]]
    found = check_mirror(run("a", *MANY), run("b", *others))
    assert len(found.pairs) == len(MANY)
    assert [pair.difference for pair in found.differing] == ([pytest.approx(by)] if abs(shift) > 1 else [])
    words = "\n".join(found.words())
    if abs(shift) > 1:
        assert f"{'higher' if by > 0 else 'lower'} in B" in words
        assert ("B is better" in words) == ((by > 0) == (one.direction == "higher"))
        assert "4 values were compared; 1 differs beyond their intervals; 3 not told apart" in words
    assert "95 % intervals do not overlap" in words


@pytest.mark.parametrize(
    "change",
    [
        {"threat": PGD.model_copy(update={"eps": 0.6})},
        {"threat": PGD.model_copy(update={"steps": 3})},
        {"threat": PGD.model_copy(update={"step_size": 0.6})},
        {"threat": PGD.model_copy(update={"restarts": 2})},
        {"threat": PGD.model_copy(update={"random_start": True})},
        {"threat": PGD.model_copy(update={"attack": "apgd-ce"})},
        {"threat": PGD.model_copy(update={"norm": "linf"})},
        {"dataset": "others"},
        {"split": "train"},
        {"protocol": "upscale-2"},
        {"model": Model(encoder="small-cnn", layer="conv3")},
        {"model": Model(encoder="small-cnn", layer="conv4", train_norm="l2", train_eps=0.5)},
        {"model": Model(encoder="small-cnn", layer="conv4", decoder="mirror", losses={"pixel": 1})},
        {"unit": "%"},
    ],
)
def test_what_was_measured_otherwise_is_never_matched(run: Write, change: dict[str, Any]) -> None:
    one = record("robust_accuracy", 0.3)
    found = check_mirror(run("a", one, record()), run("b", one.model_copy(update=change), record()))
    assert [pair.what for pair in found.pairs] == ["clean accuracy"]
    assert len(found.only_a) == len(found.only_b) == 1
    if "unit" not in change:
        assert found.only_a != found.only_b, "the names tell them apart"
    words = "\n".join(found.words())
    assert found.only_a[0] in words
    assert "In A alone, so not compared (1)" in words


def test_another_n_is_said(run: Write) -> None:
    found = check_mirror(run("a", record()), run("b", record(n=1000)))
    assert "1 pair was measured with different n" in "\n".join(found.words())
    assert "100 / 1,000" in "\n".join(found.table())


def test_seeds_tell_records_apart_where_a_side_has_several(run: Write) -> None:
    a = run("a", *(record(value=0.1 * seed, half=0.01, seed=seed) for seed in (1, 2, 3)))
    b = run("b", *(record(value=0.1 * seed, half=0.01, seed=seed) for seed in (2, 3, 4)))
    found = check_mirror(a, b)
    assert verdicts(found) == {(f"seed {n}", "clean accuracy"): "not told apart" for n in (2, 3)}
    assert (found.only_a, found.only_b) == (("seed 1: clean accuracy",), ("seed 4: clean accuracy",))
    one, other = run("one", record(seed=1)), run("other", record(seed=2))
    assert len(compare(one, other).pairs) == 1
    assert "seeds: 1 in A, 2 in B" in compare(one, other).notes


def test_one_measurement_twice_is_refused(run: Write) -> None:
    a = run("a", record(), record(value=0.9, digest="e" * 64))
    with pytest.raises(InputError, match=r"clean accuracy is there twice, .*ddddddd and eeeeeee"):
        compare(a, run("b", record()))


def test_recipes_that_differ_are_told(run: Write, tiny_npz: Path) -> None:
    first, second = tiny_recipe(tiny_npz), tiny_recipe(tiny_npz, encoder__lr=0.2, name="other")
    a, b = run("a", record(), recipe=first), run("b", record(), recipe=second)
    assert compare(a, b).notes == ("The recipes differ in encoder.lr: 0.05 / 0.2 (A / B).",)
    assert compare(a, a).notes == ("The recipes are the same.",)


def test_the_clearest_differences_come_first_and_the_rest_is_in_the_table(run: Write) -> None:
    sides = [[record(value=0.1, half=0.01, dataset=f"d{i}") for i in range(9)]]
    sides.append([record(value=0.1 + 0.03 * (i + 1), half=0.01, dataset=f"d{i}") for i in range(9)])
    found = check_mirror(run("a", *sides[0]), run("b", *sides[1]))
    sentences = [line for line in found.words() if line.startswith("  ")]
    assert len(sentences) == LARGEST
    assert [line.split()[0] for line in sentences] == [f"d{i}" for i in reversed(range(4, 9))]
    assert sentences[0] == (
        "  d8 test: clean accuracy is 27.0 points higher in B (37.0 [36.0, 38.0] against 10.0 [9.0, 11.0]): "
        "B is better."
    )
    assert len(found.table()) == 1 + 9


def test_long_lists_of_names_are_cut(run: Write) -> None:
    found = compare(run("a", *(record(dataset=f"d{i}") for i in range(NAMED + 3))), run("b", record()))
    words = "\n".join(found.words())
    assert f"In A alone, so not compared ({NAMED + 3})" in words
    assert "; and 3 more" in words
    assert "nothing is compared" in words
    assert not found.table()


POINTS = {EPS: {"grid": [0, 0.5]}, "loss": {"grid": {"pixel": {FEATURE: 0}, "all": {FEATURE: 0.1}}}}


def trials(shift: float = 0.0, **other: Any) -> list[tuple[dict[str, Any], list[Record]]]:
    """Of every point: its encoder's accuracy, shared by two of them, and its own PSNR."""
    return [
        ({EPS: eps, "loss": loss}, [record(value=0.5 - eps / 2 + shift, **other), record("psnr", psnr + eps, 0.1)])
        for eps in (0, 0.5)
        for loss, psnr in (("pixel", 20.0), ("all", 19.0))
    ]


def test_trials_are_matched_by_their_points(sweep: Write) -> None:
    a = sweep("a", POINTS, trials())
    b = sweep("b", POINTS, list(reversed(trials(0.2))), encoder__lr=0.2)
    found = check_mirror(a, b)
    assert found.kind == "sweeps"
    psnr = {(f"eps={eps:g}, loss={loss}", "PSNR"): "not told apart" for eps in (0, 0.5) for loss in ("pixel", "all")}
    shared = {(f"eps={eps:g}, 2 trials", "clean accuracy"): DIFFERS for eps in (0, 0.5)}
    assert verdicts(found) == psnr | shared
    assert found.notes[0] == "The base recipes differ in encoder.lr: 0.05 / 0.2 (A / B)."
    assert "6 values were compared; 2 differ beyond their intervals" in "\n".join(found.words())


def test_an_encoder_that_only_one_side_shares_is_compared_with_each(sweep: Write) -> None:
    apart = [(values, [records[0].model_copy(update={"n": 90 + i}), records[1]])
             for i, (values, records) in enumerate(trials())]  # fmt: skip
    found = check_mirror(sweep("a", POINTS, trials()), sweep("b", POINTS, apart))
    assert len(found.pairs) == 8


def test_what_is_not_finished_or_not_there_is_named(sweep: Write) -> None:
    done = trials()
    a = sweep("a", POINTS, [*done[:3], (done[3][0], [])])
    b = sweep("b", POINTS, done[1:])
    found = compare(a, b)
    assert {pair.where for pair in found.pairs} == {"eps=0, loss=all", "eps=0.5, loss=pixel"}
    assert found.only_a == ("eps=0, loss=pixel", "eps=0.5, loss=all (not finished)")
    assert found.only_b == ("eps=0.5, loss=all",)


def test_whole_numbers_and_fractions_are_one_value(sweep: Write) -> None:
    a = sweep("a", {EPS: {"grid": [0, 1]}}, [({EPS: 1}, [record()])])
    b = sweep("b", {EPS: {"grid": [0.5, 1.0]}}, [({EPS: 1.0}, [record()])])
    assert len(check_mirror(a, b).pairs) == 1


def test_a_name_that_means_something_else_is_warned_of(sweep: Write) -> None:
    other = POINTS | {"loss": {"grid": {"pixel": {FEATURE: 0}, "all": {FEATURE: 0.2}}}}
    notes = compare(sweep("a", POINTS, trials()), sweep("b", other, trials())).notes
    assert [note for note in notes if "Beware" in note] == [
        f"Beware: at eps=0.5, loss=all, the two spaces set {FEATURE} differently."
    ]


def test_other_axes_have_no_points_in_common(sweep: Write) -> None:
    seeds = {"seed": {"grid": [1, 2]}}
    found = compare(sweep("a", POINTS, trials()), sweep("b", seeds, [({"seed": 1}, [record()])]))
    assert not found.pairs
    assert len(found.only_a) == 4
    assert f"The axes are {EPS}, loss in A, seed in B." in found.notes


@pytest.fixture
def benchmark(tmp_path: Path) -> Write:
    """Writes a changed copy of a shipped result."""

    def write(file: str, **changes: Any) -> str:
        document = json.loads((RESULTS / "encoder-small.json").read_text())
        for variant, factor in changes.pop("factors", {}).items():
            document["seconds"][variant] = [factor * one for one in document["seconds"][variant]]
        path = tmp_path / f"{file}.json"
        path.write_text(json.dumps(document | changes))
        return str(path)

    return write


@pytest.mark.parametrize("path", sorted(path for path in RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_result_is_like_itself(path: Path) -> None:
    found = check_mirror(str(path), str(path))
    assert found.pairs


def test_a_machine_that_is_faster_at_one_variant(benchmark: Write) -> None:
    """Three times as long in one variant: its time, and the two ratios that it is in, and none else."""
    hardware = {"device": "another", "cores": 64, "torch_threads": 1}
    a, b = benchmark("a"), benchmark("b", factors={"arae fp32": 3}, hardware=hardware)
    found = check_mirror(a, b)
    assert {pair.what for pair in found.differing} == {
        "time: arae fp32",
        "ratio: network itself over its copy, fp32",
        "ratio: arae fp32 over bf16",
    }
    (ratio,) = [pair for pair in found.pairs if pair.what == "ratio: arae fp32 over bf16"]
    assert ratio.a.value is not None
    assert ratio.b.value == pytest.approx(3 * ratio.a.value)
    assert ratio.b.interval == pytest.approx([3 * end for end in ratio.a.interval or ()])
    words = "\n".join(found.words())
    assert "A: device AMD EPYC" in words
    assert "B: device another, cores 64" in words
    assert "ranges over the rounds do not overlap" in words
    (time,) = [pair for pair in found.pairs if pair.what == "time: arae fp32"]
    assert f"time: arae fp32 is {2 * (time.a.value or 0):.3f} ms an image higher in B" in words
    assert "A is better" in words


def test_what_benchmarks_have_not_in_common_is_said(benchmark: Write) -> None:
    seconds = {"clean bf16": [1.0, 2.0], "other": [1.0]}
    only = benchmark("b", seconds=seconds, images=32, clock="CUDA events", about="Else.", name="encoder-small-cuda")
    found = check_mirror(benchmark("a"), only)
    assert [pair.what for pair in found.pairs] == ["time: clean bf16"]
    assert "time: other" in found.only_b
    assert "ratio: PGD-7 over clean, bf16" in found.only_a
    assert any("measure other things" in note for note in found.notes)
    assert any("CPU seconds for 64 images, B's CUDA events for 32" in note for note in found.notes)


def test_sides_that_can_not_be_compared(run: Write, sweep: Write, benchmark: Write, tmp_path: Path) -> None:
    records, trial, timing = run("run", record()), sweep("sweep", POINTS, trials()), benchmark("timing")
    empty, odd, broken = tmp_path / "empty", tmp_path / "odd.json", tmp_path / "broken.jsonl"
    empty.mkdir()
    odd.write_text("{}")
    broken.write_text("{}\n")
    table = [
        (records, trial, ["a run's records", "a sweep", "compare two of one kind"]),
        (trial, timing, ["a sweep", "a benchmark's result", "compare two of one kind"]),
        (records, "nosuch", ["nosuch: neither a folder or file", "arae runs"]),
        (records, str(empty), [f"{empty}: no records.jsonl", "arae evaluate"]),
        (timing, str(odd), ["odd.json: not a benchmark's result", "python -m benchmarks"]),
        (records, str(broken), ["broken.jsonl:1: not a record"]),
        (timing, str(RESULTS / "decoder.json"), ["encoder-small", "decoder", "compare two results of one"]),
    ]
    for a, b, said in table:
        for sides in ((a, b), (b, a)):
            with pytest.raises(InputError) as error:
                compare(*sides)
            assert all(part in str(error.value) for part in said)


def test_the_command(run: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run("a", *MANY), run("b", record(value=0.9), *MANY[1:3], record("lpips", None))

    def arae(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["arae", "compare", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    code, out, _ = arae(a, b)
    assert code == 0, "to differ is no error"
    assert out.splitlines() == compare(a, b).lines()
    code, out, _ = arae(a, b, "--json")
    document = json.loads(out)
    assert (code, document["compared"], document["differ"]) == (0, 4, 1)
    (one,) = [pair for pair in document["pairs"] if pair["verdict"] == DIFFERS]
    assert one["a"] == {"value": 0.5, "interval": [0.45, 0.55], "n": 100}
    assert one["difference"] == pytest.approx(0.4)
    assert {pair["verdict"] for pair in document["pairs"]} == {DIFFERS, "not told apart", "not measured"}
    code, out, error = arae(a, "nosuch")
    assert (code, out) == (2, "")
    assert error.startswith("arae: nosuch: ")
    assert error.count("\n") == 1


def test_a_run_is_found_by_its_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_records(tmp_path / "runs" / name / "records.jsonl", [record()])
    assert len(compare("one", "two").pairs) == 1
