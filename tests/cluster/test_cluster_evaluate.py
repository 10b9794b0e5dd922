"""`arae evaluate --workers`: the records of one process, also where a worker is killed on the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluating import CPU, run_folder
from test_cluster_encode import below
from waiting import PATIENCE_S, until

from arae.evaluate import evaluate
from arae.records import Record, read_records

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.integration]

PGD = {"norm": "l2", "eps": 0.5, "steps": 40}
APGD = {"kind": "apgd-ce", "norm": "linf", "eps": 0.03, "steps": 40}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "map": {"evaluate__n": 60, "evaluate__attacks": [PGD, APGD]},
    "inversion": {"evaluate__n": 12, "evaluate__inversion": {"steps": 20}},
    "upscale": {"evaluate__factors": [1, 2]},
}


def command(folder: Path, *words: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "arae", "evaluate", str(folder), "--device", "cpu", *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(records: list[Record]) -> list[tuple[object, ...]]:
    """What was measured, up to what a descent makes of the rounding that threads and kernels differ by."""
    values = [None if r.value is None else pytest.approx(r.value, rel=1e-2) for r in records]
    return [(r.metric, r.protocol, r.threat, v, r.n, r.reason) for r, v in zip(records, values, strict=True)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_records_are_those_of_one_process(protocol: str, tiny_npz: Path) -> None:
    recipe, folder = run_folder(
        tiny_npz, evaluate__protocol=protocol, evaluate__batch=3, evaluate__lpips=None, **PROTOCOLS[protocol]
    )
    folder.create(recipe)
    alone = evaluate(recipe, folder, CPU)
    folder.records.unlink()
    with command(folder.path, "--workers", 2) as process:
        if protocol == "map":  # one of the workers does not live to see the end
            workers = until(lambda: below(process.pid, b"ray::Measurer.do"), "worker", process, pause=0.02)
            os.kill(workers[0], signal.SIGKILL)
        said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    found = [(r.metric, r.protocol, r.threat, r.value, r.n, r.reason) for r in read_records(folder.records)]
    assert found == told(alone)
    assert {r.hardware["evaluated_on"] for r in read_records(folder.records)} == {"cpu"}


def test_files_at_their_own_size_are_for_one_process(tiny_npz: Path, tmp_path: Path) -> None:
    changes = {"evaluate__protocol": "high-resolution", "evaluate__images": str(tmp_path)}
    recipe, folder = run_folder(tiny_npz, **changes)
    folder.create(recipe)
    with command(folder.path, "--workers", 2) as process:
        _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert "high-resolution takes its files one by one" in error
