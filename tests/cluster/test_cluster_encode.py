"""`arae encode` on a Ray cluster: workers and drivers that are killed, and a node that does not see the storage."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from PIL import Image
from waiting import PATIENCE_S, until

from arae.data import beton
from arae.data.encode import EncodeOptions, encode

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("ffcv", reason="FFCV is not installed")
pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.integration]

N, SHARD, SIDE = 60, 3, 1600
OPTIONS = ("split=all", "mode=jpg", "size=512", f"shard={SHARD}")
LOOPBACK = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture, large enough to keep a worker busy, under many names, with a broken one among them."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8))
    coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(root / "one.png", compress_level=1)
    for i in range(N):
        (root / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        os.link(root / "one.png", root / "set" / "ab"[i % 2] / f"{i:03}.png")
    (root / "set" / "b" / "033.png").unlink()
    (root / "set" / "b" / "033.png").write_bytes(b"no image")
    return root / "set"


class Start(Protocol):
    def __call__(self, *words: object) -> subprocess.Popen[str]: ...


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `arae encode …`; killed at the end of the test where it is at work still."""
    running: list[subprocess.Popen[str]] = []

    def one(*words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "arae", "encode", *map(str, words)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield one
    for each in running:
        with each:  # closes its pipe
            each.kill()


def below(pid: int, name: bytes = b"") -> list[int]:
    """The processes under `pid` with this in their command line."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(entry.name)] = (entry / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue

    def is_below(child: int) -> bool:
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return [child for child, line in names.items() if name in line and is_below(child)]


def encoders(pid: int) -> list[int]:
    """The workers under `pid` that encode a shard at this moment."""
    return below(pid, b"ray::encode_shard")


def finished(parts: Path) -> set[tuple[str, int]]:
    """The shards that are there, each with its place on the disk, which another writing would change."""
    return {(path.name, path.stat().st_ino) for path in parts.glob("0*.json")}


def test_killed_workers_and_a_killed_driver_cost_only_the_shards_in_work(
    tmp_path: Path, pictures: Path, start: Start
) -> None:
    dest, parts = tmp_path / "x.beton", tmp_path / "x.beton.parts"
    first = start(pictures, dest, *OPTIONS, "--workers", 2)
    until(lambda: len(finished(parts)) >= 2 and encoders(first.pid), "two shards", first, pause=0.02)
    os.kill(encoders(first.pid)[0], signal.SIGKILL)
    before = finished(parts)
    until(lambda: len(finished(parts)) >= len(before) + 4, "further four shards", first, pause=0.02)
    assert first.poll() is None
    assert not dest.exists()
    first.kill()
    first.wait(PATIENCE_S)

    second = start(pictures, dest, *OPTIONS, "--workers", 2)
    until(lambda: encoders(second.pid), "worker of the second command", second, pause=0.02)
    kept = finished(parts)
    assert len(kept) >= len(before) + 4
    until(lambda: len(finished(parts)) > len(kept), "further shard", second, pause=0.02)
    second.send_signal(signal.SIGTERM)
    said = second.communicate(timeout=PATIENCE_S)[1]
    assert second.returncode == 75, said
    assert "the same command goes on from them" in said
    assert kept < finished(parts)

    third = start(pictures, dest, *OPTIONS)  # without the cluster
    said = third.communicate(timeout=PATIENCE_S)[1]
    assert third.returncode == 0, said
    assert "of the images are encoded already" in said
    assert "left out b/033.png" in said
    assert "Traceback" not in said
    here = tmp_path / "here.beton"
    encode(str(pictures), here, EncodeOptions(split="all", mode="jpg", size=512))
    assert dest.read_bytes() == here.read_bytes()
    assert beton.check(dest).n == N - 1
    assert not parts.exists()


@pytest.fixture
def blind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray node that sees another, empty `tmp_path/shared`, as if it were not mounted there."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own (unshare -m, as root)")
    (tmp_path / "shared").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=1", f"--port={port}"]
    ray += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--object-store-memory=100000000"]
    for name, value in LOOPBACK.items():
        monkeypatch.setenv(name, value)
    hidden = ["unshare", "-m", "sh", "-ec", 'mount -t tmpfs tmpfs "$0" && exec "$@"', tmp_path / "shared", *ray]
    log = tmp_path / "ray.log"
    with log.open("w") as out:
        node = subprocess.Popen(list(map(str, hidden)), stdout=out, stderr=out, start_new_session=True)
    try:
        until(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None, "Ray", pause=0.02)
        assert node.poll() is None, log.read_text()
        yield f"127.0.0.1:{port}"
    finally:
        for pid in below(node.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait(PATIENCE_S)


def test_a_node_that_does_not_see_the_storage_is_refused(
    tmp_path: Path, pictures: Path, blind: str, start: Start
) -> None:
    dest = tmp_path / "shared" / "x.beton"
    run = start(pictures, dest, *OPTIONS, "--workers", 1, "--address", blind)
    _, said = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 2, said
    line = said.splitlines()[-1]
    assert "does not see" in line
    assert str(dest.with_name("x.beton.parts")) in line
    assert "NFS" in line
    assert "Traceback" not in said
