"""The paper's tables: definitions, rules, page, and a small table run from images to verdict."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from training import tiny_recipe

from arae.adopt import adopt_encoder, finished, has_encoder
from arae.config import Recipe, dump_recipe
from arae.cost import Networks, parameters
from arae.errors import InputError
from arae.launch import Where
from arae.metrics import METRICS, wilson
from arae.models.autoencoder import read_config
from arae.records import Model, Record, Threat, read_records, write_records
from arae.runs import RunFolder
from benchmarks.tables import jobs, planned, run, show
from benchmarks.tables.definition import FOLDER, PARAMETERS, SCALES, Definition, Trip, definitions, find, load, trips
from benchmarks.tables.reproduce import reproduce
from benchmarks.tables.verdict import UNITS, Cell, difference, judge

DEFINITIONS = {d.id: d for d in definitions()}
SCALED = [(d.id, scale) for d in DEFINITIONS.values() for scale in SCALES if getattr(d, scale)]
IN_SMALL = {"arae-main-T1", "arae-main-T5", "arae-main-T7", "arae-new-A3"}
LATER = {"arae-main-T8", "arae-main-T9", "arae-main-T10", "arae-new-A1"}
CPU = Where(device="cpu")


def mean(figure: float | tuple[float, float]) -> float:
    return figure[0] if isinstance(figure, tuple) else figure


# ---- definitions


def test_every_table_has_a_definition() -> None:
    numbered = {f"arae-main-T{i}" for i in range(1, 11)} | {f"arae-new-A{i}" for i in (1, 2, 3)}
    assert set(DEFINITIONS) == numbered == {path.stem for path in FOLDER.iterdir()}
    assert {d.id for d in DEFINITIONS.values() if d.full is None} == LATER
    assert {d.id for d in DEFINITIONS.values() if d.small is not None} >= IN_SMALL
    assert all(d.needs for d in DEFINITIONS.values() if d.id in LATER)


@pytest.mark.parametrize(("table", "scale"), SCALED)
def test_every_run_is_a_recipe(table: str, scale: str) -> None:
    there = trips(DEFINITIONS[table], scale)
    assert [trip.key for trip in there] == list(DEFINITIONS[table].used)
    for trip in there:
        assert trip.recipe.name == f"tables/{scale}/{trip.name}"
        assert trip.recipe.scale == scale
        assert trip.evaluations
        assert len({r.digest for r in trip.evaluations}) == len(trip.evaluations)
        for recipe in trip.evaluations:  # what is evaluated must be what was trained
            assert recipe.stage_digest("decoder") == trip.recipe.stage_digest("decoder")


@pytest.mark.parametrize("scale", SCALES)
def test_runs_of_one_name_are_one_run(scale: str) -> None:
    """Tables share run folders: what one trains must be what the other would."""
    made: dict[str, Recipe] = {}
    for table, where in SCALED:
        for trip in trips(DEFINITIONS[table], where) if where == scale else ():
            other = made.setdefault(trip.name, trip.recipe)
            assert other.stage_digest("decoder") == trip.recipe.stage_digest("decoder"), trip.name
    assert len({r.stage_digest("decoder") for r in made.values()}) == len(made), "two runs would train the same"


@pytest.mark.parametrize(("table", "scale"), SCALED)
def test_every_cell_is_measured_by_some_evaluation(table: str, scale: str) -> None:
    d = DEFINITIONS[table]
    by_key = {trip.key: trip for trip in trips(d, scale)}
    for key, row in d.rows.items():
        for name in row.paper:
            column, found = d.columns[name], by_key[row.run or ""].evaluations
            if column.metric == PARAMETERS:
                continue
            protocols = {"classification": ("map", "robustness"), "reconstruction": ("map", "reconstruction")}
            asked = row.protocol if row.protocol and column.protocol == "reconstruction" else column.protocol
            kinds = protocols.get(asked, (asked.rpartition("-")[0] if asked.startswith("upscale") else asked,))
            fits = [r for r in found if r.evaluate.protocol in kinds]
            assert fits, (key, name)
            if asked.startswith("upscale"):
                assert any(int(asked.rpartition("-")[2]) in r.evaluate.factors for r in fits)
            if column.attack:
                eps = row.eps if row.eps is not None else d.scale(scale).eps
                attacks = [(a.kind, a.norm, a.eps) for r in fits for a in r.evaluate.attacks]
                assert (column.attack, column.norm, eps) in attacks, (key, name)


@pytest.mark.parametrize("table", [d.id for d in DEFINITIONS.values() if d.claims])
def test_the_papers_own_figures_are_ordered_as_claimed(table: str) -> None:
    d = DEFINITIONS[table]
    for claim in d.claims:
        sign = 1 if UNITS[d.columns[claim.column].metric].direction == "higher" else -1
        figures = [sign * mean(d.rows[key].paper[claim.column]) for key in claim.order]
        assert all(worse < better for worse, better in pairwise(figures)), claim


def test_what_the_paper_prints_twice_is_the_same_here() -> None:
    t1, t5, t7, a2 = (DEFINITIONS[f"arae-{name}"].rows for name in ("main-T1", "main-T5", "main-T7", "new-A2"))
    for key, row in t5.items():
        assert {k: round(mean(v), 3) for k, v in a2[key].paper.items()} == pytest.approx(row.paper, abs=6e-4)
    for run_key, other in (("std", "std-all"), ("ar", "ar-all")):
        assert {k: v for k, v in t7[run_key].paper.items() if k != "parameters"} == t1[other].paper
        assert t5[f"{run_key}-1"].paper == {k: mean(v) for k, v in t1[other].paper.items()}


def test_units_are_those_of_the_metrics() -> None:
    for name in set(UNITS) - {PARAMETERS}:
        assert UNITS[name].direction == METRICS[name].direction
        assert UNITS[name].factor == (100 if METRICS[name].unit == "fraction" else 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": {}}, "unknown key colums"),
        ({"claims": [{"column": "psnr", "order": ["bad", "nosuch"]}]}, "'nosuch' is none of bad, good"),
        ({"claims": [{"column": "ssim", "order": ["bad", "good"]}]}, "'ssim' is none of psnr"),
        ({"full": {"says": "x", "evaluations": [{}]}}, "give recipe and prefix, or runs_of"),
    ],
)
def test_a_definition_that_can_not_be_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(plain() | change))
    with pytest.raises(InputError, match=message):
        load(path)


# ---- rules


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


@pytest.mark.parametrize(
    ("bad", "good", "scale", "outcome", "verdict"),
    [
        ((15.2, 0.1), (17.5, 0.1), "full", "holds", "reproduced"),
        ((15.2, 0.1), (17.5, 0.1), "small", "holds", "same direction"),
        ((15.2, 0.1), (16.8, 0.1), "full", "holds", "same direction"),  # 18 is more than 1 dB above 16.9
        ((15.2, 0.1), (16.8, 0.21), "full", "holds", "reproduced"),  # but not above 17.01
        ((18.0, 0.1), (15.0, 0.1), "full", "contradicted", "not reproduced"),
        ((16.0, 0.3), (16.4, 0.3), "small", "undecided", "not reproduced"),  # 0.4 is within hypot(0.3, 0.3)
        ((16.0, 0.3), (16.43, 0.3), "small", "holds", "same direction"),
        ((None, 0), (17.5, 0.1), "small", "not measured", "not run"),
        (None, (17.5, 0.1), "small", "not measured", "not run"),
        (None, None, "full", "not measured", "not run"),
    ],
)
def test_a_verdict_follows_its_rules(
    bad: tuple[float | None, float] | None, good: tuple[float, float] | None, scale: str, outcome: str, verdict: str
) -> None:
    made = {key: [record(*given)] if given else [] for key, given in (("bad", bad), ("good", good))}
    judged = judge(Definition.model_validate(plain()), scale, [], made)
    assert [each.outcome for each in judged.orderings] == [outcome]
    assert judged.verdict == verdict
    assert judged.said.startswith(verdict)


def test_one_contradiction_outweighs_what_holds() -> None:
    document = plain() | {
        "claims": [{"column": "psnr", "order": order} for order in (["bad", "good"], ["good", "bad"])]
    }
    judged = judge(Definition.model_validate(document), "full", [], {"bad": [record(15)], "good": [record(18)]})
    assert judged.verdict == "not reproduced"
    assert judged.said == "not reproduced (1 of 2 orderings hold, 1 contradicted)"


def test_a_count_alone_is_no_run() -> None:
    d = DEFINITIONS["arae-main-T7"]
    judged = judge(d, "small", trips(d, "small"), {})
    assert "holds" in [each.outcome for each in judged.orderings], "the parameters are ordered as the paper has them"
    assert judged.said == "not run"


def test_an_order_undecided_in_part_is_not_reproduced_in_full() -> None:
    document = plain()
    document["rows"]["best"] = {"label": "best", "run": "best", "paper": {"psnr": 18.1}}
    document["claims"] = [{"column": "psnr", "order": ["bad", "good", "best"]}]
    made = {"bad": [record(15)], "good": [record(18)], "best": [record(18.05)]}
    judged = judge(Definition.model_validate(document), "full", [], made)
    assert all(cell.agrees for cell in judged.cells.values())
    assert judged.said == "same direction (1 of 2 orderings hold, 1 undecided)"


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """56 of 70 against 48 of 80, in Newcombe (1998), table II, method 10: 0.0524 to 0.3339."""
    a, b = (Cell(None, None, right / n, wilson(right, n)) for right, n in ((56, 70), (48, 80)))
    assert difference(a, b) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_cell_takes_the_strongest_attack_at_its_own_radius() -> None:
    def under(eps: float, steps: int, value: float, **more: object) -> Record:
        threat = Threat(norm="l2", eps=eps, steps=steps, step_size=0.1)
        more = {"metric": "robust_accuracy", "protocol": "classification", "unit": "fraction", "threat": threat} | more
        return record(value, 0.01, **more)

    document = plain() | {"claims": []}
    document["columns"] = {
        "robust": {
            "label": "r",
            "metric": "robust_accuracy",
            "protocol": "classification",
            "attack": "pgd",
            "norm": "l2",
        }
    }
    document["rows"] = {"one": {"label": "one", "run": "one", "eps": 0.5, "paper": {"robust": 40}}}
    there = [under(0.5, 50, 0.4), under(0.5, 10, 0.5), under(1.0, 99, 0.1), record(0.9, metric="robust_accuracy")]
    judged = judge(Definition.model_validate(document), "full", [], {"one": there})
    assert judged.cells["one", "robust"].value == pytest.approx(40)
    assert judged.records == (there[0],)


# ---- the page and the list


def test_the_page_is_that_of_the_records() -> None:
    assert show.PAGE.read_text() == show.page(), "python -m benchmarks.tables makes docs/tables.md anew"


def test_the_list_has_every_table_with_state_and_cost() -> None:
    text = "\n".join(show.listing())
    for table in DEFINITIONS:
        assert f"{table}: " in text
    assert text.count("which is not built yet") == len(LATER)
    assert text.count("GPU-hours") == len(DEFINITIONS) - len(LATER) + 1


@pytest.mark.parametrize(("table", "scale"), SCALED)
def test_every_table_is_planned(table: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "count", lambda definition, scale: pytest.fail("counted.json is of other recipes"))
    made = planned.planned(DEFINITIONS[table], scale)
    assert min(made.encoders, made.decoders, made.evaluation) > 0
    assert set(made.parameters) == set(DEFINITIONS[table].used)
    low, high = (10, 5000) if scale == "full" else (0.05, 20)
    assert low < made.hours(scale) < high


def test_what_was_counted_is_what_plan_counts() -> None:
    d = DEFINITIONS["arae-new-A3"]
    there = {trip.key: trip.recipe for trip in trips(d, "small")}
    networks = Networks(there["eps-1"], (3, 32, 32), 10)
    kept = planned.planned(d, "small")
    at_zero, under_attack = (networks.encoder_step(there[key].encoder.attack) for key in ("eps-0", "eps-1"))
    passes = 40_000 * (3 * at_zero + (3 + 6) * under_attack)  # 3 epochs at 0 and 0.5, 1 at each of six further radii
    assert kept.encoders == pytest.approx(passes, rel=1e-3)
    assert kept.decoders == pytest.approx(8 * 40_000 * networks.decoder_step(1), rel=1e-3)
    assert networks.decoder is not None
    assert set(kept.parameters.values()) == {parameters(networks.decoder)}


# ---- running


@pytest.fixture
def table(tiny_npz: Path, tmp_path: Path) -> Path:
    """A table of three runs on the blobs, of which two share an encoder."""
    base = tmp_path / "base.yaml"
    losses = {"pixel": 1.0, "feature": 0.1, "adversarial": 0.0}
    recipe = tiny_recipe(tiny_npz, encoder__steps=4, decoder__steps=3, decoder__losses=losses, state__every=2)
    base.write_text(dump_recipe(recipe))
    document = plain()
    document["rows"]["other"] = {"label": "other", "run": "other", "paper": {"psnr": 16.0}}
    document["small"] = {
        "says": "blobs",
        "recipe": str(base),
        "prefix": "tiny",
        "runs": {
            "bad": {"encoder.attack.eps": 0},
            "good": {},
            "other": {"decoder.losses.feature": 0},
        },
        "evaluations": [
            {"set": {"evaluate.protocol": "reconstruction", "evaluate.attacks": []}},
            {"runs": ["good"], "set": {"evaluate.protocol": "robustness"}},
        ],
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def folders(table: Path) -> dict[str, RunFolder]:
    return {trip.key: RunFolder.of(trip.recipe) for trip in trips(find(str(table)), "small")}


def written(root: Path) -> dict[Path, int]:
    kinds = ("*.safetensors", "evaluations/*.jsonl")
    return {path: path.stat().st_mtime_ns for kind in kinds for path in root.rglob(kind)}


def test_a_table_from_images_to_verdict(table: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    said = list(reproduce(str(table), "small", [], CPU, 1, tmp_path / "results"))
    assert said[0] == "mine (small scale): 3 runs, of which 0 are made already"
    assert said[-1].startswith("mine (small scale): ")
    assert sum("paper 18 ± 2" in line and " small " in line for line in said) == 1
    there = folders(table)
    assert {f.path.name for f in there.values()} == {"tiny-bad", "tiny-good", "tiny-other"}
    encoders = {key: (f.model / "encoder.safetensors").read_bytes() for key, f in there.items()}
    assert encoders["good"] == encoders["other"] != encoders["bad"]
    stages = [json.loads(line) for line in there["other"].log.read_text().splitlines()]
    assert [(e["stage"], e["state"]) for e in stages if e["event"] == "stage"] == [
        ("encoder", "skipped"),
        ("decoder", "started"),
        ("decoder", "finished"),
    ]
    records = run.measured(trips(find(str(table)), "small"))
    assert {r.protocol for r in records["good"]} >= {"classification", "reconstruction"}
    assert "classification" not in {r.protocol for r in records["bad"]}
    assert {r.scale for each in records.values() for r in each} == {"small"}
    assert not (tmp_path / "results").exists(), "a table of one's own is not one of arae's"

    before = written(tmp_path / "runs")
    again = list(reproduce(str(table), "small", [], CPU, 1, tmp_path / "results"))
    assert again[0] == "mine (small scale): 3 runs, of which 3 are made already"
    assert again[1:] == said[1:]
    assert written(tmp_path / "runs") == before

    next(path for path in before if path.suffix == ".jsonl").unlink()  # one evaluation is missing: only that is made
    assert list(reproduce(str(table), "small", [], CPU, 1, tmp_path / "results"))[1:] == said[1:]
    after = written(tmp_path / "runs")
    assert sum(after[path] != before[path] for path in before) == 1


@pytest.mark.integration
def test_side_by_side_killed_and_begun_again(table: Path, tmp_path: Path, run_arae) -> None:
    command = ("reproduce", str(table), "--scale", "small", "--jobs", "2", "--device", "cpu")
    with subprocess.Popen(
        [sys.executable, "-m", "arae", *command, "encoder.steps=400"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.time() + 120
        while not list((tmp_path / "runs").rglob("encoder-*.pt")):
            assert process.poll() is None, process.stderr.read()
            assert time.time() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped; the same command goes on" in err
    assert list((tmp_path / "runs").rglob("encoder-*.pt"))
    done = run_arae(*command, "encoder.steps=400", timeout=180)
    assert done.returncode == 0, done.stderr
    assert "[tiny-bad] " in done.stderr
    assert "mine (small scale): " in done.stdout.splitlines()[-2]
    assert done.stdout.splitlines()[-1].startswith("not put among arae's records: encoder.steps=400")
    there = folders(table)
    encoders = {key: (f.model / "encoder.safetensors").read_bytes() for key, f in there.items()}
    assert encoders["good"] == encoders["other"] != encoders["bad"]
    log = there["other"].log.read_text()
    assert ('"skipped"' in log) != ('"skipped"' in there["good"].log.read_text()), "one of the two trained the encoder"


def test_publishing_replaces_what_was_measured_again(table: Path, tmp_path: Path) -> None:
    (trip, *_) = trips(find(str(table)), "small")
    results, path = tmp_path / "results", run.kept(trip.evaluations[0])
    path.parent.mkdir(parents=True)
    write_records(path, [record(15.0), record(0.3, metric="ssim", unit="1")])
    assert run.publish([trip], results) == [results / "small" / "tiny-bad.jsonl"]
    write_records(path, [record(16.0, time="2026-01-02")])
    run.publish([trip], results)
    assert {r.metric: r.value for r in run.committed([trip], results)["bad"]} == {"psnr": 16.0, "ssim": 0.3}
    assert read_records(results / "small" / "tiny-bad.jsonl")[0].scale == "small"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"table": "arae-main-T11"}, "no table 'arae-main-T11'; there are arae-main-T1, "),
        ({"scale": "tiny"}, "--scale tiny: write full or small"),
        ({"scale": "full"}, "mine has no full scale: there is --scale small"),
        ({"table": "arae-main-T8"}, "arae-main-T8 has no small scale: the application anomaly detection"),
        ({"jobs": 0}, "--jobs 0: at least 1"),
        ({"overrides": ["name=x"]}, "override name: a table's runs have their own"),
        ({"overrides": ["encoder.stepss=3"]}, "unknown key encoder.stepss; did you mean encoder.steps"),
        ({"overrides": ["data.train=nosuch.beton"]}, "data.train: nosuch.beton is not there; `arae encode"),
    ],
)
def test_what_can_not_be_run_is_refused_at_once(table: Path, given: dict[str, object], message: str) -> None:
    asked = {"table": str(table), "scale": "small", "overrides": [], "where": CPU, "jobs": 1} | given
    with pytest.raises(InputError) as error:
        list(reproduce(**asked))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_waits_for_the_encoder_that_another_trains(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good, other = trips(find(str(table)), "small")
    waiting = [good, other]
    assert jobs.next_ready(waiting, [bad]) is good
    assert jobs.next_ready([other], [bad, good]) is None
    monkeypatch.setattr(jobs, "_trained", lambda trip: trip is good)
    assert jobs.next_ready([other], [bad, good]) is other


def test_a_run_waits_for_the_encoder_that_it_starts_from(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {trip.key: trip for trip in trips(DEFINITIONS["arae-new-A3"], "small")}
    order = list(there.values())
    start = there["eps-1.5"].recipe.encoder.weights
    assert start
    assert Path(start).absolute() == RunFolder.of(there["eps-1"].recipe).path
    assert jobs.next_ready(order, []) is there["eps-0"]
    assert jobs.next_ready(order[1:], order[:1]) is there["eps-0.5"]
    assert jobs.next_ready(order[2:], order[:2]) is None
    monkeypatch.setattr(jobs, "_trained", lambda trip: trip.key in ("eps-0", "eps-0.5"))
    assert jobs.next_ready(order[2:], order[:2]) is there["eps-1"]
    assert jobs.next_ready(order[3:], order[:3]) is None


def test_an_encoder_is_adopted_whole_or_not_at_all(tiny_npz: Path, tmp_path: Path) -> None:
    from arae.train.run import train

    torch.set_num_threads(1)
    recipe = tiny_recipe(tiny_npz, encoder__steps=2, decoder=None)
    source, target = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    source.create(recipe)
    train(recipe, source, CPU.torch_device())
    other = recipe.replace({"encoder.steps": 3})
    assert has_encoder(recipe, source)
    assert finished(recipe, source)
    assert not has_encoder(other, source)
    assert adopt_encoder(other, target, [source.path]) is None
    assert adopt_encoder(recipe, target, [tmp_path / "nothing", target.path, source.path]) == source.path
    assert finished(recipe, target)
    assert read_config(target.model) == read_config(source.model)
    assert adopt_encoder(recipe, target, [source.path]) is None, "it has one already"
    weights = source.model / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert adopt_encoder(recipe, RunFolder(tmp_path / "c"), [source.path]) is None, "a damaged one is left"
    assert not (tmp_path / "c").exists()


def test_a_runs_process_is_told_what_to_run(table: Path) -> None:
    plan = jobs.Plan(str(table), "small", ("seed=1",), Where(device="cpu"))
    trip: Trip = trips(find(str(table)), "small")[0]
    words = plan.command(trip)[1:]
    assert words == ["-m", "benchmarks.tables", "run", str(table), "small", "bad", "seed=1", "--device", "cpu"]
