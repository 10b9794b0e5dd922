"""The Slurm script with stand-ins for Slurm, Ray and arae: the order of its steps, signals, requeue, exit codes."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm import SCRIPT, link_python, program, slurm_job
from waiting import PATIENCE_S, until

ADDRESS = "0.0.0.0"  # connecting to it reaches this machine
RAY = """#!/bin/bash
echo "ray $* token=$(stat -c %a "$RAY_AUTH_TOKEN_PATH") mode=$RAY_AUTH_MODE" >>"$STUB_LOG"
trap 'echo "ray stopped" >>"$STUB_LOG"; kill $pid 2>/dev/null; exit 0' TERM
if [ "$2" = --head ]; then
  while [ -n "${STUB_HOLD:-}" ] && [ ! -e "$STUB_HOLD" ]; do sleep 0.05; done
  port=$(grep -oP -- '--port=\\K[0-9]+' <<<"$*")
  python -c "import socket, time; s = socket.create_server(('$ADDRESS', $port)); time.sleep(60)" & pid=$!
else
  sleep 60 & pid=$!
fi
wait
""".replace("$ADDRESS", ADDRESS)
ENDS = """#!/bin/bash
echo "arae $*" >>"$STUB_LOG"
until [ "$(grep -c '^ray start' "$STUB_LOG")" = 2 ]; do sleep 0.05; done
exit {code}
"""
SAVES = """#!/bin/bash
trap 'sleep 0.2; echo "arae saved" >>"$STUB_LOG"; exit 75' TERM
echo "arae $*" >>"$STUB_LOG"
while true; do sleep 0.05; done
"""
DEAF = '#!/bin/bash\necho "arae $*" >>"$STUB_LOG"\nexec sleep 60\n'


@dataclass(frozen=True)
class Case:
    arae: str
    code: int
    requeued: bool
    asked: str = ""
    """The line of the log after which SIGTERM is sent."""
    env: tuple[tuple[str, str], ...] = ()


CASES = {
    "done": Case(ENDS.format(code=0), 0, False),
    "bad input": Case(ENDS.format(code=2), 2, False),
    "failed": Case(ENDS.format(code=1), 1, False),
    "gave up waiting": Case(ENDS.format(code=75), 75, True),
    "time is up": Case(SAVES, 75, True, asked="arae train"),
    "before arae could listen": Case(DEAF, 75, True, asked="arae train"),
    "before arae was there": Case(SAVES, 75, True, asked="ray start --head", env=(("STUB_HOLD", "hold"),)),
    "cancelled": Case(SAVES, 75, False, asked="arae train", env=(("STUB_STATE", "CANCELLED"),)),
    "too often": Case(ENDS.format(code=75), 75, False, env=(("SLURM_RESTART_COUNT", "20"),)),
    "often": Case(ENDS.format(code=75), 75, True, env=(("SLURM_RESTART_COUNT", "19"),)),
}


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script with words and environment; kills what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, env: dict[str, str]) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([SCRIPT, *words], env=env, cwd=tmp_path, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.communicate()


def wait_for(log: Path, text: str, process: subprocess.Popen[str]) -> None:
    until(lambda: text in log.read_text(), repr(text), process, log, pause=0.02)


@pytest.mark.parametrize("name", CASES)
def test_a_job_ends_as_its_training_does(
    name: str, tmp_path: Path, batch: Callable[..., subprocess.Popen[str]]
) -> None:
    case, log = CASES[name], tmp_path / "log"
    env = slurm_job(tmp_path, ADDRESS, gpus=8) | dict(case.env)
    link_python(tmp_path)
    for program_name, text in (("ray", RAY), ("arae", case.arae)):
        program(tmp_path / "home" / ".venv" / "bin" / program_name, text)
    process = batch("demo", "name=mine", env=env)
    if case.asked:
        wait_for(log, f"\n{case.asked}", process)
        if case.asked == "arae train":
            wait_for(log, "\nray start --address", process)
        process.send_signal(signal.SIGTERM)  # to the batch script alone, as --signal=B: does
        (tmp_path / "hold").touch()
    said, _ = process.communicate(timeout=PATIENCE_S)
    lines = log.read_text().splitlines()
    assert process.returncode == case.code, said
    requeue = f"scontrol requeue {env['SLURM_JOB_ID']}"
    assert (requeue in lines) == case.requeued, said
    where = f"{ADDRESS}:{20000 + int(env['SLURM_JOB_ID'])}"
    ray = [line for line in lines if line.startswith("ray start")]
    trained = [line for line in lines if line.startswith("arae train")]
    assert ray[0].startswith(f"ray start --head --node-ip-address={ADDRESS}")
    assert "--include-dashboard=false" in ray[0]
    assert all(line.endswith("--block token=600 mode=token") and "--num-gpus=8" in line for line in ray)
    assert [line.split()[2] for line in ray[1:]] == ([f"--address={where}"] if trained else [])
    assert lines.count("ray stopped") == len(ray)
    assert not list((tmp_path / "state" / "arae").iterdir()), "the token is still there"
    if name == "before arae was there":
        assert trained == []
    else:
        assert trained == [f"arae train demo name=mine --workers 16 --address {where}"]
    if case.arae == SAVES and trained:
        assert lines.index("arae saved") < lines.index("ray stopped"), "Ray went before the state was saved"
    if case.requeued:
        assert lines[-1] == requeue, "requeueing ends the job: nothing may come after it"


@pytest.mark.parametrize(
    ("words", "without", "said"),
    [
        ((), None, "name a recipe"),
        (("demo",), "ARAE_RUNS", "ARAE_RUNS is not set"),
        (("demo",), "SLURM_JOB_ID", "start it by sbatch"),
        (("demo",), "home", "no .venv/bin/arae there"),
    ],
)
def test_what_can_not_work_is_refused_at_once(
    words: tuple[str, ...], without: str | None, said: str, tmp_path: Path, batch: Callable[..., subprocess.Popen[str]]
) -> None:
    env = slurm_job(tmp_path, ADDRESS)
    if without != "home":
        program(tmp_path / "home" / ".venv" / "bin" / "arae", DEAF)
    process = batch(*words, env={name: value for name, value in env.items() if name != without})
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    (line,) = out.splitlines()
    assert said in line
    assert (tmp_path / "log").read_text() == ""


def test_slurm_is_asked_for_time_to_save() -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SCRIPT.read_text(), re.M))
    assert options["signal"] == "B:TERM@120"
    assert "requeue" in options
    assert options["open-mode"] == "append", "a job that is put back would write over its own log"
    assert options["ntasks-per-node"] == "1"
