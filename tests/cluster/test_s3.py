"""Runs and data on an S3 server that is a real one (SeaweedFS), on loopback."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_npz
from s3server import BUCKET, S3Server, s3_server
from training import tiny_recipe, weights
from waiting import PATIENCE_S, until

from arae.config import Recipe, dump_recipe
from arae.data import staging
from arae.data.encode import EncodeOptions, encode
from arae.errors import InputError
from arae.models.autoencoder import load_autoencoder
from arae.runs import RunFolder
from arae.storage import Remote

pytestmark = [pytest.mark.cluster, pytest.mark.integration]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the images and the recipe: enough steps to be caught in the middle of."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "r.yaml").write_text(dump_recipe(recipe(make_tiny_npz(folder))))
    return folder


def recipe(images: Path | str, **overrides: object) -> Recipe:
    return tiny_recipe(Path("x.npz"), data__train=str(images), data__test=str(images)).replace(
        {"encoder.steps": 150, "decoder.steps": 10, "state.every": 5, **overrides}
    )


@pytest.fixture(scope="module")
def local(place: Path) -> RunFolder:
    """The same run on a path, undisturbed."""
    ended(arae(place, {"ARAE_RUNS": str(place / "runs")}, "train", "r.yaml"), 0)
    return RunFolder(place / "runs" / "tiny")


@pytest.fixture
def at_s3(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, str]]:
    """The environment of a machine of this name, with a disk of its own; runs lie under a prefix of the test's own."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)

    def machine(name: str) -> dict[str, str]:
        own = {"ARAE_RUNS": server.url(tmp_path.name), "ARAE_SCRATCH": str(tmp_path / name)}
        return server.environment | own | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}

    return machine


def arae(cwd: Path, env: dict[str, str], *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "arae", *map(str, args)]
    whole = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(command, cwd=cwd, env=whole, text=True, stdout=-1, stderr=-1, start_new_session=True)


def ended(process: subprocess.Popen[str], code: int) -> str:
    """What it said; it must end with this code."""
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, out + err
    return out + err


@contextmanager
def slowed(process: subprocess.Popen[str]) -> Iterator[None]:
    """The process gets a tenth of its time."""
    done = threading.Event()

    def slow() -> None:
        while not done.wait(0.05):
            os.killpg(process.pid, signal.SIGSTOP)
            done.wait(0.45)
            os.killpg(process.pid, signal.SIGCONT)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def newest_whole(remote: Remote) -> int:
    """The step of the newest state that the storage lists; all that it lists must be there, and undamaged."""
    for _ in range(3):
        manifest = remote.read("state/manifest.json")
        listed = json.loads(manifest)["states"] if manifest else []
        found = {each["file"]: remote.read(f"state/{each['file']}") for each in listed}
        if remote.read("state/manifest.json") == manifest:  # else the writer went on while we read
            for each in listed:
                data = found[each["file"]]
                assert data is not None, f"{each['file']} is listed and not there"
                assert hashlib.sha256(data).hexdigest() == each["sha256"]
            return max((each["step"] for each in listed), default=0)
    return 0


def events(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, folder.log.read_text().splitlines()) if e["event"] == kind]


def fetched(env: dict[str, str], url: str) -> RunFolder:
    """The run as a machine sees it that has nothing."""
    code = f"from arae.storage import fetched; print(fetched({url!r}))"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return RunFolder(Path(found.stdout.strip()))


def test_killed_here_it_goes_on_elsewhere(
    server: S3Server, place: Path, local: RunFolder, at_s3: Callable[[str], dict[str, str]]
) -> None:
    first = arae(place, at_s3("a"), "train", "r.yaml")
    url = at_s3("a")["ARAE_RUNS"] + "/tiny"
    remote = Remote(url)
    until(lambda: newest_whole(remote), "state", first)
    with slowed(first):  # or it may be done before the other has looked whether it is alive
        said = ended(arae(place, at_s3("b"), "train", "r.yaml"), 2)
    assert f"another command is at work on this run, process {first.pid} on " in said
    assert until(lambda: newest_whole(remote) >= 15, "state of step 15", first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    killed, reached = time.time(), newest_whole(remote)
    assert 15 <= reached < 150

    ended(arae(place, at_s3("b"), "train", "r.yaml"), 0)
    run = fetched(at_s3("c"), url)
    assert weights(run) == weights(local)
    repeated = [e["step"] for e in events(run, "interval") if e["time"] > killed and e["stage"] == "encoder"]
    assert min(repeated) > reached  # what was saved is not computed again
    assert remote.read("state/manifest.json") is None
    assert remote.read(".lease.json") is None
    model = load_autoencoder(run.path)
    said = ended(arae(place, at_s3("d"), "evaluate", url, "evaluate.lpips=null"), 0)
    assert "PSNR" in said
    assert "tiny" in ended(arae(place, at_s3("e"), "runs"), 0)
    picture = place / "picture.png"
    from arae.pictures import save_png

    save_png(torch.rand(model.image_shape, generator=torch.Generator().manual_seed(0)), picture)
    ended(arae(place, at_s3("f"), "reconstruct", url, picture, "--out", place / "out"), 0)
    ended(arae(place, at_s3("g"), "report", url), 0)
    assert remote.entry("report.html") is not None
    assert remote.entry("records.jsonl") is not None


def test_a_server_that_is_away_for_a_while_stops_nothing(
    server: S3Server, place: Path, local: RunFolder, at_s3: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    process = arae(place, at_s3("a"), "train", "r.yaml")
    url = at_s3("a")["ARAE_RUNS"] + "/tiny"
    remote = Remote(url)
    until(lambda: newest_whole(remote), "state", process)
    (text,) = (tmp_path / "a").rglob("log.txt")
    server.stop()
    try:
        until(lambda: "no answer" in text.read_text(), "word of the storage", process)
    finally:
        server.start()
    said = ended(process, 0)
    assert "what it misses is kept in" in said
    assert "answers again" in said
    run = fetched(at_s3("b"), url)
    assert weights(run) == weights(local)
    here = RunFolder(text.parent)
    assert run.log.read_bytes() == here.log.read_bytes()
    assert {p.name for p in run.images.iterdir()} == {p.name for p in here.images.iterdir()}


def test_a_server_that_stays_away_is_said_and_nothing_is_lost(
    server: S3Server, place: Path, at_s3: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    env = at_s3("a") | {"ARAE_STORAGE_WAIT": "2"}
    short = ("encoder.steps=40", "decoder=null")
    process = arae(place, env, "train", "r.yaml", *short)
    until(lambda: list((tmp_path / "a").rglob("log.jsonl")), "log", process)
    server.stop()
    try:
        said = ended(process, 75)
        (run,) = (tmp_path / "a").rglob("log.jsonl")
        assert f"the end lies in {run.parent} on " in said.splitlines()[-1]
        assert "no answer" in ended(arae(place, env, "train", "r.yaml", *short), 75)  # nor does it begin
    finally:
        server.start()
    ended(arae(place, env, "train", "r.yaml", *short), 0)
    assert weights(fetched(at_s3("b"), env["ARAE_RUNS"] + "/tiny")) == weights(RunFolder(run.parent))


@pytest.mark.parametrize(
    ("runs", "env", "said"),
    [
        ("s3://no-such-bucket/runs", {}, "NO_SUCH_BUCKET"),
        (f"s3://{BUCKET}/x", {"AWS_SECRET_ACCESS_KEY": "VERYSECRET"}, "ACCESS_DENIED"),
        (f"s3://WHO:VERYSECRET@{BUCKET}/x", {}, "refused"),
        (f"s3://{BUCKET}/x", {"MLFLOW_TRACKING_URI": ""}, "set MLFLOW_TRACKING_URI to a server"),
    ],
)
def test_what_the_storage_refuses_is_one_line_without_secrets(
    place: Path, at_s3: Callable[[str], dict[str, str]], runs: str, env: dict[str, str], said: str
) -> None:
    output = ended(arae(place, at_s3("a") | {"ARAE_RUNS": runs} | env, "train", "r.yaml"), 2)
    assert said in output
    assert output.startswith("arae: ")
    assert len(output.splitlines()) == 1
    assert "VERYSECRET" not in output


WORKER = """
import sys
import threading
from pathlib import Path
from torch import distributed as dist
from arae.errors import AraeError
from arae.runs import RunFolder, runs_root
from arae.storage import mirrored
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
folder = RunFolder(runs_root() / "tiny")
try:
    with mirrored(folder, writer=rank == 0):
        print(folder.log.read_text())
        dist.barrier()
        if rank == 0:
            folder.log.write_text("and on")
except AraeError as error:
    print(type(error).__name__)
dist.destroy_process_group()
"""


def test_workers_on_two_machines_begin_with_what_rank_0_has(
    server: S3Server, at_s3: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    def group(number: int, **more: str) -> list[str]:
        meeting = f"file://{tmp_path}/meeting-{number}"
        command = [sys.executable, "-c", WORKER]
        envs = [os.environ | at_s3(name) | {"ARAE_STORAGE_WAIT": "1"} | more for name in "ab"]
        both = [
            subprocess.Popen([*command, str(rank), meeting], env=env, stdout=-1, text=True)
            for rank, env in enumerate(envs)
        ]
        return [process.communicate(timeout=60)[0].strip() for process in both]

    remote = Remote(at_s3("a")["ARAE_RUNS"] + "/tiny")
    remote.write("log.jsonl", b"as it was")
    assert group(1) == ["as it was"] * 2
    assert remote.read("log.jsonl") == b"and on"
    # Rank 0 could not send its end before it was killed; the group is started again where it was.
    (log,) = (tmp_path / "a").rglob("log.jsonl")
    log.write_text("not sent yet")
    assert group(2) == ["not sent yet"] * 2
    assert group(3, AWS_SECRET_ACCESS_KEY="wrong") == ["InputError"] * 2
    server.stop()
    try:
        assert group(4) == ["Stopped"] * 2
    finally:
        server.start()


def test_two_workers_of_ray_with_data_and_runs_at_urls(
    server: S3Server, place: Path, at_s3: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    data = Remote(server.url(f"{tmp_path.name}-data"))
    data.write("tiny.npz", (place / "tiny.npz").read_bytes())
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe(f"{data.url}/tiny.npz", **{"encoder.steps": 20})))
    ended(arae(tmp_path, at_s3("a"), "train", "r.yaml", "--workers", 2), 0)
    run = fetched(at_s3("b"), at_s3("a")["ARAE_RUNS"] + "/tiny")
    load_autoencoder(run.path)
    assert {e["state"] for e in events(run, "stage")} == {"started", "finished"}
    assert [e["step"] for e in events(run, "interval")][-1] == 10
    assert list((tmp_path / "a" / "data").glob("tiny-*/tiny.npz"))


def test_data_from_s3_is_staged_and_checked(
    server: S3Server, place: Path, tmp_path: Path, at_s3: Callable[[str], dict[str, str]], monkeypatch
) -> None:
    monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(staging, "_ready", {})
    encode(str(place / "tiny.npz"), tmp_path / "train.beton", EncodeOptions(split="all", mode="raw"))
    content = (tmp_path / "train.beton").read_bytes()
    for query in (False, True):
        url = server.url(f"{tmp_path.name}/train.beton", query=query)
        Remote(url).write("", content)
        above = Remote(server.url(tmp_path.name, query=query))
        above.write("train.beton.json", (tmp_path / "train.beton.json").read_bytes())
        said: list[str] = []
        path = staging.local(url, "data.train", said.append)
        assert path.read_bytes() == content
        assert said == []
        os.close(staging._ready.pop(url)[1])
    shutil.rmtree(tmp_path / "scratch")
    above.write("train.beton", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="another SHA-256"):
        staging.local(url, "data.train", said.append)
    above.delete("train.beton.json")
    staging.local(url, "data.train", said.append)
    assert "no manifest beside it" in said[-1]
    with pytest.raises(InputError, match="is not there"):
        staging.local(server.url("nothing.beton"), "data.train")
