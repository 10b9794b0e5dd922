"""The Slurm script with stand-ins for Slurm's commands alone: real Ray on two "nodes", a real training."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from groups import train_on
from slurm import SCRIPT, link_python, program, slurm_job
from training import tiny_recipe, weights
from waiting import PATIENCE_S, until

from arae.config import dump_recipe
from arae.runs import RunFolder

pytestmark = [pytest.mark.cluster, pytest.mark.ray]
HERE = Path(sys.executable).parent


def test_a_job_that_is_stopped_is_put_back_and_ends_as_if_it_had_not_been(tmp_path: Path, tiny_npz: Path) -> None:
    from ray.util import get_node_ip_address

    # Long enough that the signal comes in the middle, whatever the machine.
    recipe = tiny_recipe(tiny_npz, name="job", encoder__steps=240, decoder=None, state__every=100)
    written = tmp_path / "recipe.yaml"
    written.write_text(dump_recipe(recipe))
    folder = RunFolder(tmp_path / "runs" / "job")
    env = slurm_job(tmp_path, get_node_ip_address()) | {"OMP_NUM_THREADS": "1"}
    # Two "nodes" on one machine have one address, and Ray's own files are kept apart from other tests'.
    ray = f'#!/bin/bash\nexec {HERE / "ray"} "$@" $([ "$2" = --head ] && echo --temp-dir={short(tmp_path)})\n'
    program(tmp_path / "home" / ".venv" / "bin" / "ray", ray)
    program(tmp_path / "home" / ".venv" / "bin" / "arae", f'#!/bin/bash\nexec {sys.executable} -m arae "$@"\n')
    link_python(tmp_path)

    with batch(written, env, tmp_path / "said-1") as process:
        until(
            lambda: folder.log.exists() and '"interval"' in folder.log.read_text(),
            "training",
            process,
            tmp_path / "said-1",
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 75, (tmp_path / "said-1").read_text()
    asked = (tmp_path / "log").read_text()
    assert asked.count(f"scontrol requeue {env['SLURM_JOB_ID']}") == 1
    with batch(written, env | {"SLURM_RESTART_COUNT": "1"}, tmp_path / "said-2") as process:
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "said-2").read_text()
    assert (tmp_path / "log").read_text().count("scontrol requeue") == 1
    assert "resumed the encoder at step" in folder.log.read_text()
    assert '"world_size": 2' in (folder.model / "config.json").read_text()
    assert not list((tmp_path / "state" / "arae").iterdir()), "the token is still there"

    assert weights(folder) == weights(train_on(2, recipe, tmp_path / "undisturbed"))


class batch:  # noqa: N801 -- a context, used as a function
    """The batch script at work; what is left of it is killed."""

    def __init__(self, recipe: Path, env: dict[str, str], said: Path) -> None:
        self.command, self.env, self.said = [str(SCRIPT), str(recipe), "--device", "cpu"], env, said

    def __enter__(self) -> subprocess.Popen[bytes]:
        with self.said.open("w") as out:
            self.process = subprocess.Popen(
                self.command, env=self.env, cwd=self.said.parent, stdout=out, stderr=out, start_new_session=True
            )
        return self.process

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def short(folder: Path) -> Path:
    """A path for Ray's sockets, which may be 107 bytes long."""
    return Path("/tmp") / f"arae-slurm-{abs(hash(folder)) % 10**6}"
