"""The demo, cut short: Fashion-MNIST through FFCV, two Ray Train workers, two radii, the report in a real browser."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from browser import chromium, find_by_scrolling, text_of, wait_until_up
from PIL import Image
from tracking import free_port

from arae.data.encode import EncodeOptions, encode
from arae.demo import demo_recipe, pick
from arae.errors import InputError
from arae.tracking.mirror import CARD

SHORT = (
    "map.radii=[0,1.5]",
    "encoder.steps=40",
    "decoder.steps=20",
    "encoder.attack.steps=2",
    "evaluate.n=100",
    "evaluate.attacks.2.steps=10",
    "evaluate.attacks.2.restarts=2",
    "data.limit=4000",
)


@pytest.mark.integration
def test_the_demo_in_short(run_arae: Callable[..., object], fashion_mnist: Path, tmp_path: Path) -> None:
    runs = Path(os.environ["ARAE_RUNS"])
    done = run_arae("demo", *SHORT)
    assert done.returncode == 0, done.stderr
    run = runs / "demo"
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert {r["model"]["train_eps"] for r in records} == {0.0, 1.5}
    assert {r["hardware"]["world_size"] for r in records} == {2}
    assert {r["scale"] for r in records} == {"small"}
    assert (run / "data" / "train.beton").stat().st_size > 60_000 * 28 * 28 * 3
    for name in ("map.png", "reconstructions.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200
    assert (runs / "mlflow.db").is_file()
    assert not list(runs.rglob("mlflow.pending.jsonl"))
    stages = [json.loads(line) for line in (run / "eps-0" / "log.jsonl").read_text().splitlines()]
    told = [e["step"] for e in stages if e["event"] == "interval" and e["stage"] == "encoder"]
    assert told == sorted(set(told))  # one worker tells

    with chromium(tmp_path / "profile") as browser:
        browser.get((run / "report.html").as_uri())
        text = text_of(browser)
        assert "1.5" in text
        assert "PSNR" in text
        shown = "return [...document.images].map(i => i.naturalWidth)"
        widths = browser.execute_script(shown)
        assert len(widths) == 2
        assert min(widths) > 200
        assert browser.execute_script("return document.querySelectorAll('table').length") >= 1
    compare_in_the_ui(runs, records, tmp_path)


def compare_in_the_ui(runs: Path, records: list[dict], tmp_path: Path) -> None:
    """`arae ui` on the demo's own runs, in a real browser: both runs and what was measured of them."""
    names = ["demo/eps-0", "demo/eps-1.5"]
    ids = [json.loads((runs / name / CARD).read_text())["run_id"] for name in names]
    clean = [r["value"] for r in records if (r["metric"], r["protocol"]) == ("clean_accuracy", "classification")]
    psnr = [
        r["value"] for r in records if (r["metric"], r["protocol"], r["threat"]) == ("psnr", "reconstruction", None)
    ]
    port = free_port()
    command = [sys.executable, "-m", "arae", "ui", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            wait_until_up(server, f"http://127.0.0.1:{port}/health")
            with chromium(tmp_path / "second profile", height=1600) as browser:
                page = f"compare-runs?runs={quote(json.dumps(ids))}&experiments=%5B%221%22%5D"
                browser.get(f"http://127.0.0.1:{port}/#/{page}")
                shown = [f"{value:.4g}" for value in (*clean, *psnr)]  # the page rounds to four digits
                metrics = ["final/clean_accuracy", "final/psnr.reconstruction", "train_eps"]
                find_by_scrolling(browser, [*names, *metrics, *shown])
        finally:
            server.send_signal(signal.SIGINT)


@pytest.mark.integration
def test_the_demo_on_a_folder_of_ones_own(run_arae: Callable[..., object], tmp_path: Path) -> None:
    """In this process and without Ray: the folder becomes two classes of 32-px RGB images."""
    random = np.random.default_rng(0)
    for name, place in (("left", 8), ("right", 40)):
        for i in range(60):
            image = random.integers(0, 60, (48, 64, 3), dtype=np.uint8)
            image[:, place : place + 16] += 150
            (tmp_path / "mine" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "mine" / name / f"{i}.jpg")
    short = [*SHORT[1:], f"data.source={tmp_path / 'mine'}", "map.radii=[0,0.5]", "decoder.steps=4", "encoder.steps=4"]
    done = run_arae("demo", "--workers", 0, *short)
    assert done.returncode == 0, done.stderr
    run = Path(os.environ["ARAE_RUNS"]) / "demo-images"
    assert (run / "report.html").is_file()
    manifest = json.loads((run / "data" / "test.beton.json").read_text())
    assert manifest["classes"] == ["left", "right"]


def test_the_demo_takes_the_recipe_for_the_images() -> None:
    assert demo_recipe([]).name == "demo"
    assert demo_recipe(["data.source=/x"]).name == "demo-images"
    assert demo_recipe(["data.name=mnist", "data.source=/x"]).name == "demo"


def test_the_grid_shows_different_classes_first() -> None:
    labels = np.array([0, 0, 0, 1, 2, 1, 2, 0])
    assert labels[pick(labels)[:8]].tolist() == labels.tolist()
    many = np.repeat(np.arange(20), 5)
    assert len(set(many[pick(many)])) == 10


def test_a_demo_without_radii_or_folder_is_refused(tmp_path: Path) -> None:
    from arae.demo import demo
    from arae.launch import Where

    with pytest.raises(InputError, match=r"map\.radii"):
        demo(demo_recipe(["map=null"]), Where())
    with pytest.raises(InputError, match="nowhere"):
        encode(str(tmp_path / "nowhere"), tmp_path / "x.beton", EncodeOptions())
