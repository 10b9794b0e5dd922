"""`python -m benchmarks.scaling` in miniature: real Ray, real runs, the record that it writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import tiny_recipe
from waiting import PATIENCE_S

from arae.config import dump_recipe
from benchmarks.scaled import Scaling

pytestmark = [pytest.mark.cluster]


def test_one_and_two_workers_are_measured_and_what_was_cut_short_goes_on(
    tmp_path: Path, tiny_npz: Path, repository: Path
) -> None:
    written, out = tmp_path / "recipe.yaml", tmp_path / "record.json"
    written.write_text(dump_recipe(tiny_recipe(tiny_npz, precision="fp64")))
    words = [str(written), "--steps", "20", "--out", str(out), "--workers"]
    command = [sys.executable, "-m", "benchmarks.scaling", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ARAE_RUNS": str(tmp_path / "runs")}

    def measured(numbers: str, *more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*command, numbers, *more], cwd=repository, env=env, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode in (0, 1), done.stderr  # speeds depend on what else the machine does
        return done

    measured("1")
    alone = Scaling.model_validate_json(out.read_text())
    assert [(run.kind, run.workers) for run in alone.runs] == [("strong", 1), ("weak", 1)]
    done = measured("1,2", "--kinds", "strong")
    assert " 1 workers …" not in done.stderr, "what was recorded is measured again"
    record = Scaling.model_validate_json(out.read_text())
    assert [(run.kind, run.workers) for run in record.runs] == [
        ("strong", 1),
        ("weak", 1),
        ("strong", 2),
    ]
    assert [stage.batch for run in record.runs for stage in run.stages.values()] == [32] * 6
    assert all(len(stage.losses) == stage.steps == 20 for run in record.runs for stage in run.stages.values())
    assert {check.name: check.passed for check in record.checks if "efficiency" not in check.name}.items() >= {
        "same numbers, encoder, 2 workers": True,
        "same numbers, decoder, 2 workers": True,
        "losses move, encoder, 2 workers": True,
        "losses move, decoder, 2 workers": True,
        "one precision": True,
    }.items()
    assert (done.returncode == 0) == all(check.passed for check in record.checks)
    assert [len(group.places) for group in record.groups] == [1, 2]
    assert all(timing.bus > 0 for timing in record.groups[1].timings)
    assert record.runs[:2] == alone.runs
