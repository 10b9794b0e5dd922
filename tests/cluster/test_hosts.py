"""A host dies in the middle of training: it goes on by itself, from the last state, to the right weights."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from groups import train_on
from hosts import BIN, Cluster, Host, reason_to_skip, secured, three_hosts
from safetensors.torch import load_file
from training import tiny_recipe, weights
from waiting import PATIENCE_S, until

from arae.config import Recipe, dump_recipe
from arae.runs import RunFolder
from arae.train.run import train

STEPS, EVERY = 150, 30  # of the encoder; between states
INTERVAL = 3  # steps between lines of the log: a fiftieth of the encoder's
TOLERANCE = 1e-8  # of a tensor's largest entry, in fp64, where another number of workers sums in another order
# Ray finds out that it can't have the workers of before only when this long has passed; its default is a minute.
PATIENCE = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The three hosts, without Ray."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    with three_hosts(folder, **secured(folder), **PATIENCE) as cluster:
        yield cluster


@pytest.fixture
def cluster(hosts: Cluster) -> Cluster:
    """The same with Ray on every host; one that died is back."""
    for name, host in hosts.hosts.items():
        if not host.pids():
            hosts.join(name)
    return hosts


@pytest.mark.cluster
@pytest.mark.ray
def test_who_has_not_the_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    empty = tmp_path / "token"
    empty.touch()
    join = f"import ray; ray.init('{cluster.head.address}:6379', log_to_driver=False); print('in')"
    host = cluster.hosts["host2"]
    process = host.start([BIN / "python", "-c", join], RAY_AUTH_TOKEN_PATH=str(empty))
    assert process.wait(PATIENCE_S) == 1, said(host, "python", "out")
    assert "token" in said(host, "python")


@pytest.mark.cluster
@pytest.mark.ray
def test_with_as_many_workers_as_before_the_weights_are_bit_for_bit_the_same(
    cluster: Cluster, tmp_path: Path, tiny_npz: Path
) -> None:
    recipe = tiny_recipe(tiny_npz, encoder__steps=STEPS, decoder__steps=20, state__every=EVERY)
    expected = train_on(2, recipe, tmp_path / "undisturbed")
    folder, victim = train_and_lose_a_host(cluster, recipe, tmp_path, "2")
    check_one_restart(folder, victim)
    assert weights(folder) == weights(expected)


@pytest.mark.cluster
@pytest.mark.ray
def test_an_elastic_group_goes_on_with_those_that_are_left(cluster: Cluster, tmp_path: Path, tiny_npz: Path) -> None:
    small = {f"{stage}__micro_batch": 8 for stage in ("encoder", "decoder")}  # four a step: three workers share them
    recipe = tiny_recipe(
        tiny_npz, precision="fp64", encoder__steps=STEPS, decoder__steps=20, state__every=EVERY, **small
    )
    expected = RunFolder(tmp_path / "undisturbed")
    expected.create(recipe)
    train(recipe, expected, torch.device("cpu"))  # by one
    folder, victim = train_and_lose_a_host(cluster, recipe, tmp_path, "2:3")
    check_one_restart(folder, victim)
    assert [event["world_size"] for event in told(folder, "group")] == [3, 2]
    for path in sorted(expected.model.glob("*.safetensors")):
        there = load_file(folder.model / path.name)
        for name, tensor in load_file(path).items():
            wide, scale = tensor.double(), tensor.double().abs().max()
            assert torch.allclose(there[name].double(), wide, rtol=0, atol=TOLERANCE * float(scale)), name


def train_and_lose_a_host(cluster: Cluster, recipe: Recipe, tmp_path: Path, workers: str) -> tuple[RunFolder, Host]:
    """Train on the cluster, kill a host half way between two states, and wait for the end; the host, too."""
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    folder = RunFolder(tmp_path / "runs" / recipe.name)
    process = cluster.head.start(
        [BIN / "arae", "train", file, "--workers", workers, "--address", "auto", "--placement", "spread"],
        ARAE_RUNS=str(folder.path.parent),
    )
    try:
        # A state is written while training goes on: the one of two intervals is on disk when the log says so.
        until(lambda: any(state["step"] >= 2 * EVERY for state in told(folder, "state")), "state", process)
        until(lambda: reached(folder) >= 2 * EVERY + EVERY // 2, "training", process)
        assert cluster.head.has("ray::Desk")  # beside the driver: it must not go with another host
        victim = next(host for host in (cluster.hosts["host3"], cluster.hosts["host2"]) if host.has("RayTrainWorker"))
        cluster.kill(victim.name)
        code = process.wait(PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    assert code == 0, said(cluster.head, "arae")
    return folder, victim


def check_one_restart(folder: RunFolder, victim: Host) -> None:
    """One line says what happened, and no more than the steps since the last state were computed again."""
    events = [json.loads(line) for line in folder.log.read_text().splitlines()]
    (at,) = [i for i, event in enumerate(events) if event["event"] == "restart"]
    restart = events[at]
    assert victim.name in restart["reason"] or victim.address in restart["reason"]
    assert "\n" not in restart["reason"]
    assert restart["world_size"] == 2
    before, safe = (max(e["step"] for e in events[:at] if e["event"] == kind) for kind in ("interval", "state"))
    assert restart["step"] % EVERY == 0
    assert safe <= restart["step"] < before
    after = [event["step"] for event in events[at:] if event["event"] == "interval" and event["stage"] == "encoder"]
    assert after == list(range(restart["step"] + INTERVAL, STEPS + 1, INTERVAL))


def told(folder: RunFolder, event: str) -> list[dict]:
    """The log's events of a kind; none where there is no log yet."""
    lines = folder.log.read_text().splitlines() if folder.log.exists() else []
    return [e for e in (json.loads(line) for line in lines if line.endswith("}")) if e["event"] == event]


def reached(folder: RunFolder) -> int:
    """The last step that the log knows of; 0 where there is none."""
    return max((event["step"] for event in told(folder, "interval")), default=0)


def said(host: Host, program: str, stream: str = "err") -> str:
    """What the program wrote that was started last on the host."""
    newest = max(host.folder.glob(f"*-{program}.{stream}"), key=lambda path: path.stat().st_mtime)
    return newest.read_text()[-4000:]
