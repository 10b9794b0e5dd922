"""`arae reproduce`: a small table from images to verdict, stopped and begun again, side by side, refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tabling import plain, record
from training import tiny_recipe
from waiting import PATIENCE_S, until

from arae.adopt import adopt_encoder, finished, has_encoder
from arae.config import dump_recipe
from arae.errors import InputError
from arae.launch import Where
from arae.models.autoencoder import load_autoencoder, read_config
from arae.records import read_records, write_records
from arae.runs import RunFolder
from arae.train.networks import located
from benchmarks.tables import jobs, run
from benchmarks.tables.definition import Trip, find, trips
from benchmarks.tables.reproduce import reproduce

CPU = Where(device="cpu")


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
def test_side_by_side_stopped_and_begun_again(table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", str(table), "--scale", "small", "--jobs", "2", "--device", "cpu", "encoder.steps=60"]
    with subprocess.Popen(
        [sys.executable, "-m", "arae", *command],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until(lambda: list((tmp_path / "runs").rglob("encoder-*.pt")), "state", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, err
    assert "stopped; the same command goes on" in err
    assert list((tmp_path / "runs").rglob("encoder-*.pt"))

    said = list(reproduce(str(table), "small", ["encoder.steps=60"], CPU, 2, tmp_path / "results"))
    assert "[tiny-bad] " in capfd.readouterr().err
    assert said[-2].startswith("mine (small scale): ")
    assert said[-1].startswith("not put among arae's records: encoder.steps=60")
    there = folders(table)
    encoders = {key: (f.model / "encoder.safetensors").read_bytes() for key, f in there.items()}
    assert encoders["good"] == encoders["other"] != encoders["bad"]
    skipped = ['"skipped"' in there[key].log.read_text() for key in ("good", "other")]
    assert sorted(skipped) == [False, True], "one of the two trained the encoder"


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
        ({"table": "arae-main-T8"}, "arae-main-T8 has no small scale: it needs the application anomaly detection"),
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
    there = {trip.key: trip for trip in trips(find("arae-new-A3"), "small")}
    order = list(there.values())
    start = there["eps-1.5"].recipe.encoder.weights
    assert start
    assert located(start) == RunFolder.of(there["eps-1"].recipe).path
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
    tapped = recipe.replace({"encoder.layer": "conv2"})
    deep, shallow = RunFolder(tmp_path / "deep"), RunFolder(tmp_path / "shallow")
    assert adopt_encoder(tapped, shallow, [source.path]) == source.path, "its training depends on no layer"
    assert finished(tapped, shallow)
    assert load_autoencoder(shallow.path).layer == "conv2"
    assert not has_encoder(recipe, shallow), "which was adopted for one layer"
    assert adopt_encoder(recipe, deep, [shallow.path]) is None
    weights = source.model / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert adopt_encoder(recipe, RunFolder(tmp_path / "c"), [source.path]) is None, "a damaged one is left"
    assert not (tmp_path / "c").exists()


def test_a_runs_process_is_told_what_to_run(table: Path) -> None:
    plan = jobs.Plan(str(table), "small", ("seed=1",), Where(device="cpu"))
    trip: Trip = trips(find(str(table)), "small")[0]
    words = plan.command(trip)[1:]
    assert words == ["-m", "benchmarks.tables", "run", str(table), "small", "bad", "seed=1", "--device", "cpu"]
