"""The command line: one line for what is wrong, the promised exit codes, no traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from disks import on_a_small_disk
from PIL import Image
from training import tiny_recipe

from arae.cli import main
from arae.config import dump_recipe

Run = Callable[..., subprocess.CompletedProcess[str]]


def refused(done: subprocess.CompletedProcess[str], *said: str, code: int = 2) -> None:
    """Ended with the code and one line on stderr that says all of this."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("arae: ")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for part in said:
        assert part in lines[0]


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_npz: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_recipe(tiny_recipe(tiny_npz)))
    return path


@pytest.fixture
def beton(tmp_path: Path, tiny_npz: Path) -> Path:
    """The tiny images as a real .beton file."""
    from arae.data.encode import EncodeOptions, encode

    path = tmp_path / "tiny.beton"
    encode(str(tiny_npz), path, EncodeOptions(split="all", workers=1))
    return path


@pytest.fixture
def arae_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: the same `main`, without seconds of imports each time."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        argv = ["arae", *map(str, arguments)]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(argv, int(ended.value.code or 0), out, err)

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["validate", "demo", "encoder.attack.epss=1"], ["encoder.attack.epss", "did you mean encoder.attack.eps?"]),
        (["validate", "demmo"], ["demmo", "did you mean 'demo'?"]),
        (["train", "demo", "encoder.attack.norm=null", "map=null"], ["encoder.attack", "1.5", "norm"]),
        (["train", "demo"], ["3 radii", "arae demo", "map=null"]),
        (["train", "demo", "map=null", "--device", "tpu"], ["--device tpu", "cuda"]),
        (["train", "demo", "map=null", "evaluate.attacks=[{eps: 0}]"], ["attacks.0", "norm"]),
        (["train", "demo", "name=2024-13-01", "seed=-1"], ["seed"]),
        (["train", "demo", "--workers", "two"], ["--workers two", "write a number", "MIN:MAX"]),
        (["trian", "demo"], ["trian", "--help"]),
        (["train"], ["RECIPE", "--help"]),
        (["train", "demo", "encoder.attack.eps=-1"], ["encoder.attack.eps", "-1", "negative"]),
        (["train", "demo", "--workers", "0"], ["--workers 0", "at least 1"]),
        (["train", "demo", "--address", "auto"], ["--address auto", "--workers"]),
        (["train", "demo", "--device", "cuda:99"], ["cuda:99", "CUDA devices"]),
        (["train", "demo", "map=null", "data.train=nowhere.beton"], ["data.train", "nowhere.beton", "arae encode"]),
        (
            ["train", "demo", "map=null", "data.test=nowhere.beton"],
            ["data.test", "arae encode fashion-mnist nowhere.beton split=test"],
        ),
        (["evaluate", "demo", "map=null", "name=never-trained"], ["never-trained", "arae train"]),
        (["reconstruct", "nowhere", "x.png"], ["nowhere", "arae train"]),
        (["ls", "nothing"], ["nothing", "recipes"]),
        (["encode", "nowhere", "x.beton"], ["nowhere"]),
        (["encode", "nowhere", "x.beton", "modus=raw"], ["modus", "did you mean mode?"]),
        (["report", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arae_here: Run, arguments: list[str], said: list[str]) -> None:
    refused(arae_here(*arguments), *said)


def test_a_truncated_beton_is_refused_before_training(run_arae: Run, recipe_file: Path, beton: Path) -> None:
    data = beton.read_bytes()
    beton.write_bytes(data[: len(data) // 2])
    refused(run_arae("train", recipe_file, f"data.train={beton}"), "data.train", "tiny.beton")


def test_held_out_images_of_another_kind_are_refused(run_arae: Run, recipe_file: Path, tmp_path: Path) -> None:
    for name, size, classes in (("classes", 16, 5), ("shape", 20, 3)):
        labels = np.arange(20) % classes
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((20, size, size, 3), np.uint8), labels=labels)
    refused(run_arae("train", recipe_file, f"data.test={tmp_path}/classes.npz"), "data.test: 5 classes", "has 3")
    shape = run_arae("train", recipe_file, f"data.test={tmp_path}/shape.npz", "data.size=null")
    refused(shape, "data.test", "(3, 20, 20)", "(3, 16, 16)")
    assert not (Path(os.environ["ARAE_RUNS"]) / "tiny").exists()


def test_a_folder_that_can_not_be_written_is_one_line(run_arae: Run, recipe_file: Path) -> None:
    refused(run_arae("train", recipe_file, env={"ARAE_RUNS": "/proc/nowhere"}), "/proc/nowhere")


def test_no_image_given_is_written_over(run_arae: Run, recipe_file: Path, tmp_path: Path, tiny_npz: Path) -> None:
    from arae.pictures import free_name

    taken = {tmp_path / "a-reconstruction.png", tmp_path / "a-reconstruction-2.png"}
    assert free_name(tmp_path, "a-reconstruction", taken) == tmp_path / "a-reconstruction-3.png"
    assert free_name(tmp_path, "b", taken) == tmp_path / "b.png"


def test_labels_out_of_range_are_refused(run_arae: Run, recipe_file: Path, beton: Path) -> None:
    manifest = beton.with_name(beton.name + ".json")
    document = json.loads(manifest.read_text())
    document["classes"] = document["classes"][:2]
    manifest.write_text(json.dumps(document))
    refused(run_arae("train", recipe_file, f"data.train={beton}"), "data.train", "label")


@pytest.mark.integration
@pytest.mark.parametrize(("size", "code", "said"), [("64k", 2, "make room"), ("5m", 75, "same command")])
def test_a_full_disk_is_one_line(tmp_path: Path, recipe_file: Path, size: str, code: int, said: str) -> None:
    """64 KiB: no state ever fits. 5 MiB: the encoder's states fit, the decoder's do not."""
    runs = Path(os.environ["ARAE_RUNS"])
    command = [sys.executable, "-m", "arae", "train", recipe_file]
    refused(on_a_small_disk(size, runs, command), "disk is full", said, code=code)


@pytest.mark.integration
def test_train_evaluate_reconstruct_report(run_arae: Run, recipe_file: Path, tiny_npz: Path, tmp_path: Path) -> None:
    """The everyday way, whole commands on a tiny set."""
    run = Path(os.environ["ARAE_RUNS"]) / "tiny"
    trained = run_arae("train", recipe_file)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count("decoder 7/7") == 1  # told once
    assert "images/s" in (run / "log.txt").read_text()
    again = run_arae("train", recipe_file)
    assert again.returncode == 0
    assert "encoder 1/7" not in again.stderr

    measured = run_arae("evaluate", recipe_file)
    assert measured.returncode == 0, measured.stderr
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert {r["metric"] for r in records} == {"clean_accuracy", "robust_accuracy", "psnr", "ssim"}
    assert all(r["n"] == 96 and r["hardware"]["world_size"] == 1 for r in records)
    under = [r for r in records if r["metric"] == "psnr" and r["protocol"] == "reconstruction"]
    assert [r["threat"] and r["threat"]["eps"] for r in under] == [None, 0.5]

    photo = tmp_path / "photo.png"
    Image.fromarray(np.load(tiny_npz)["images"][0]).resize((40, 30)).save(photo)
    shown = run_arae("reconstruct", run, photo, "--out", tmp_path / "out")
    assert shown.returncode == 0, shown.stderr
    with Image.open(tmp_path / "out" / "photo-reconstruction.png") as picture:
        assert picture.size == (2 * 16 + 2, 16)
    assert run_arae("report", run).returncode == 0
    assert "<table" in (run / "report.html").read_text()
    assert run_arae("runs").stdout.count("tiny") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls", "recipes"], "imagenet-alexnet"),
        (["ls", "data"], "fashion-mnist"),
        (["ls", "encoders"], "resnet18-cifar"),
        (["ls", "decoders"], "alexnet-conv5"),
        (["ls", "discriminators"], "alexnet-conv5"),
        (["ls", "metrics"], "ssim"),
        (["show"], "encoder.attack.eps"),
        (["show", "demo", "encoder.attack.eps=0.25"], "eps: 0.25"),
        (["plan", "RECIPE"], "FLOP"),
        (["validate", "RECIPE"], "valid"),
    ],
)
def test_verbs_that_only_tell(arae_here: Run, recipe_file: Path, arguments: list[str], said: str) -> None:
    told = arae_here(*(recipe_file if a == "RECIPE" else a for a in arguments))
    assert told.returncode == 0
    assert said in told.stdout
    assert told.stderr == ""
