import json
import signal
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from browser import chromium, keep, served, wait_for_texts, wait_until_down
from tracking import PGD, begin, epoch, interval, recipe, record, stage

from arae.records import Model
from arae.tracking import Tracker
from arae.tracking.mirror import CARD, PENDING

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sqlalchemy"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]


def train(tracker: Tracker, eps: float, psnr: float, robust: float) -> None:
    tracker(stage("started"))
    for step in range(10, 60, 10):
        tracker(interval(step, psnr / step))
    tracker(epoch(1, {"loss": 0.5, "robust_accuracy": robust}))
    tracker(stage("finished"))
    model = Model(encoder="small-cnn", train_norm="l2", train_eps=eps)
    tracker.log_records([record("psnr", psnr, model=model), record("robust_accuracy", robust, threat=PGD, model=model)])


def test_the_pages_compare_the_runs_of_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    names = ["demo/eps-0", "demo/eps-1.5"]
    with begin(tmp_path, recipe("demo")) as parent:
        for name, eps, psnr, robust in zip(names, (0.0, 1.5), (21.375, 23.625), (0.125, 0.625), strict=True):
            child = begin(tmp_path, recipe(name), parent="demo")
            train(child, eps, psnr, robust)
            assert child.close(timeout=90)
        assert parent.close(timeout=90)
    # One more number that MLflow missed: the pages show it all the same.
    pending = tmp_path / names[0] / PENDING
    pending.write_text(json.dumps({"op": "metrics", "step": 0, "time": 1, "values": {"final/late": 4.5}}) + "\n")
    runs = [json.loads((tmp_path / name / CARD).read_text())["run_id"] for name in names]

    with served(tmp_path) as (server, uri):
        assert not pending.exists()
        with chromium(tmp_path / "profile", height=1600) as browser:
            browser.get(f"{uri}/#/compare-runs?runs={quote(json.dumps(runs))}&experiments=%5B%221%22%5D")
            values = ["21.38", "23.63", "0.125", "0.625", "4.5"]  # the page rounds to four digits
            metrics = ["final/psnr.reconstruction", "final/robust_accuracy.l2-1.5.pgd-50x5", "train_eps"]
            wait_for_texts(browser, [*names, *metrics, *values])
            keep(browser, tmp_path, "compare.png")
        url = f"{uri}/ajax-api/2.0/mlflow/artifacts/list?run_uuid={runs[0]}"
        with urlopen(url, timeout=30) as answer:
            assert "recipe.yaml" in answer.read().decode()
        server.send_signal(signal.SIGINT)
        server.wait(30)
        assert server.stderr
        assert uri in server.stderr.read()
        wait_until_down(uri)
