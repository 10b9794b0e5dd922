"""What clusters do to workers and drivers, done for real to a run of two workers on one machine's Ray cluster.

Each fault: what is said, how the command ends, and what is left behind. Machines that die: `test_hosts.py`.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from disks import on_a_small_disk
from driving import ARAE, EVERY, STEPS, Run, end_of, last_words
from training import weights
from waiting import PATIENCE_S, until

from arae.train.state import list_states, read_state

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.integration]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray cluster of two CPUs on loopback, behind a token; the environment to join it."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
    }
    env.pop("RAY_AUTH_TOKEN", None)
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    quiet = ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--object-store-memory=100000000"]
    start = {k: v for k, v in env.items() if k != "RAY_ADDRESS"}
    with subprocess.Popen(
        [*command, *quiet], env=start, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            for line in process.stdout or ():
                if "--block" in line or "Ray runtime started" in line:
                    break
            yield env
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # nothing of it is worth the time of an orderly end


@pytest.fixture(scope="module")
def undisturbed(head: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of a run to which nothing happens."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), head)
    done = run.finish("--workers", 2)
    assert done.returncode == 0, done.stderr
    assert not run.told("restart")
    return weights(run.folder)


@pytest.fixture
def run(head: dict[str, str], tmp_path: Path) -> Run:
    return Run(tmp_path / "home", head)


def test_workers_that_die_hang_fail_or_stand_still_are_replaced_and_cost_no_bit(
    run: Run, undisturbed: dict[str, bytes]
) -> None:
    """One after the other, in one run."""
    with run.start("--workers", 2, "--timeout", 10) as process:
        for count, (number, said) in enumerate(
            ((signal.SIGKILL, "was killed or crashed"), (signal.SIGSTOP, "did not answer for")), start=1
        ):
            until(lambda count=count: run.at_step(12 * count), f"step {12 * count}", process)
            safe = max(e["step"] for e in run.told("state"))
            victim = run.workers()[-1]
            os.kill(victim, number)
            until(lambda count=count: len(run.told("restart")) == count, "restart", process)
            restart = run.told("restart")[-1]
            assert said in restart["reason"]
            if seconds := re.search(r"did not answer for (\d+) s", restart["reason"]):
                assert 10 <= int(seconds[1]) < 150  # of --timeout 10, and not of the default's 600
            assert f"(pid {victim})" in restart["reason"]
            assert (restart["count"], restart["world_size"]) == (count, 2)
            reached = max(e["step"] for e in run.told("interval") if e["time"] < restart["time"])
            assert safe <= restart["step"] <= reached + EVERY
            assert not Path(f"/proc/{victim}").exists()
        an_error(run, process)
        standing_still(run, process)
        done = end_of(process)
    assert done.returncode == 0, done.stderr
    reasons = [restart["reason"] for restart in run.told("restart")]
    assert all(done.stderr.count(reason) == 1 for reason in reasons)
    assert any("worker 0" in reason and "IsADirectoryError" in reason for reason in reasons[2:]), reasons
    assert any("lost the others" in reason for reason in reasons[3:]), reasons
    assert weights(run.folder) == undisturbed


def an_error(run: Run, process: subprocess.Popen[str]) -> None:
    """Rank 0 can't open its log, for there is a folder in its place: an error that is tried again."""
    log, aside = run.folder.log, run.folder.path / "aside"
    until(lambda: run.at_step(36), "step 36", process)
    before = run.workers()
    log.rename(aside)
    log.mkdir()
    until(lambda: not set(before) & set(run.workers()), "end of the workers", process)
    log.rmdir()
    aside.rename(log)


def standing_still(run: Run, process: subprocess.Popen[str]) -> None:
    """Rank 0 waits for ever to open its log, as on a file server that hangs: here a pipe that nobody reads. It still
    shows that it is there; the other waits for it in a collective until the time limit."""
    log, aside = run.folder.log, run.folder.path / "aside"
    until(lambda: run.at_step(48), "step 48", process)
    before, begun = run.workers(), time.monotonic()
    os.mkfifo(run.folder.path / "pipe")
    log.rename(aside)
    (run.folder.path / "pipe").rename(log)
    until(lambda: not set(before) & set(run.workers()), "end of the workers", process)
    assert time.monotonic() - begun < PATIENCE_S / 2  # of --timeout 10, and not of the default's 600
    log.unlink()
    aside.rename(log)


def test_a_driver_that_is_killed_takes_its_workers_along_and_the_same_command_goes_on(
    run: Run, undisturbed: dict[str, bytes]
) -> None:
    with run.start("--workers", 2) as process:
        until(lambda: run.at_step(25), "step 25", process)
        process.kill()
        process.wait(10)
    until(lambda: not run.workers(), "end of the workers")
    assert run.states()[-1] >= 20
    done = run.finish("--workers", 2)
    assert done.returncode == 0, done.stderr
    assert any("resumed the encoder at step" in e["text"] for e in run.told("note"))
    assert weights(run.folder) == undisturbed


def test_after_the_last_restart_the_state_is_kept_and_the_command_says_75(run: Run) -> None:
    with run.start("--workers", 2, "--restarts", 0) as process:
        until(lambda: run.at_step(25), "step 25", process)
        victim = run.workers()[0]
        os.kill(victim, signal.SIGKILL)
        done = end_of(process)
    assert done.returncode == 75, done.stderr
    line = last_words(done)
    assert f"(pid {victim}) was killed or crashed" in line
    assert f"the encoder's state of step {run.states()[-1]} is kept" in line


def test_a_run_that_can_not_get_its_workers_gives_up_in_time_or_when_told_to(run: Run) -> None:
    """A step has two micro-batches, and the cluster two CPUs: two workers of two CPUs each are too many."""
    lacking = "2 are wanted, of 2 CPU each; the 1 host(s) that answer have room for 1"
    done = run.finish("--workers", 2, "--cpus", 2, "--wait", 0.2)
    assert done.returncode == 75, done.stderr
    assert f"gave up after 0.2 min: {lacking}" in last_words(done)
    assert "goes on" in last_words(done)
    said = "waiting for workers"
    before = run.folder.text.read_text().count(said)
    with run.start("--workers", 2, "--cpus", 2) as process:
        until(lambda: run.folder.text.read_text().count(said) > before, "word of the waiting", process)
        process.terminate()
        done = end_of(process)
    assert done.returncode == 75, done.stderr
    assert lacking in done.stderr
    assert "no workers were at work" in last_words(done)


def test_a_loss_that_is_no_number_ends_the_launch_without_another_try(run: Run) -> None:
    done = run.finish("--workers", 2, "encoder.lr=1e30")
    assert done.returncode == 1, done.stderr
    assert "lower encoder.lr" in last_words(done)
    assert not run.told("restart")


def test_sigterm_saves_and_what_a_worker_finds_wrong_is_bad_input(run: Run, undisturbed: dict[str, bytes]) -> None:
    with run.start("--workers", 2) as process:
        until(lambda: run.at_step(5), "step 5", process)
        process.terminate()
        stopped = end_of(process)
    assert stopped.returncode == 75, stopped.stderr
    assert f"stopped at step {run.states()[-1]} of {STEPS}" in last_words(stopped)

    file = run.home / "tiny.npz"
    images = file.read_bytes()
    loaded = dict(np.load(file))
    np.savez(file, images=255 - loaded["images"], labels=loaded["labels"])
    refused = run.finish("--workers", 2)  # only a worker compares the images with those that the state was made on
    assert refused.returncode == 2, refused.stderr
    assert "other images" in last_words(refused)
    assert not run.told("restart")

    file.write_bytes(images)
    done = run.finish("--workers", "1:9")  # elastic, and no more than there are micro-batches
    assert done.returncode == 0, done.stderr
    assert weights(run.folder) == undisturbed


def test_a_run_folder_that_goes_away_stops_the_run(run: Run) -> None:
    aside = run.home / "aside"
    with run.start("--workers", 2) as process:
        until(lambda: run.at_step(25), "step 25", process)
        run.folder.path.rename(aside)
        done = end_of(process)
    assert done.returncode == 75, done.stderr
    assert str(run.folder.path) in last_words(done)
    shutil.rmtree(run.folder.path, ignore_errors=True)
    aside.rename(run.folder.path)
    assert run.states()[-1] >= 20


def test_a_full_disk_under_a_worker_ends_the_group_and_keeps_the_state(tmp_path: Path) -> None:
    """Of 5 MiB: the encoder's states fit, the decoder's do not."""
    run = Run(tmp_path / "home", {**os.environ, "OMP_NUM_THREADS": "1"})
    runs = run.folder.path.parent
    command = [*ARAE, "train", run.recipe, "--workers", "2"]
    done = on_a_small_disk("5m", runs, command, env={**run.env, "ARAE_RUNS": str(runs)}, cwd=run.home)
    assert done.returncode == 75, done.stderr
    assert "the disk is full" in last_words(done)
    assert "make room and run the same command again" in last_words(done)
    notes: list[str] = []
    left = list_states(run.folder.state)
    assert {s.stage for s in left} == {"encoder"} or not left
    assert all(read_state(run.folder.state, s, notes.append) for s in left), notes
    assert left or (run.folder.model / "encoder.safetensors").is_file()
