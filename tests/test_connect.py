"""Starting a Ray cluster on a busy machine: by a stand-in for Ray's own start, that starts a process and is late."""

import subprocess
import sys
from typing import Any

import pytest

from arae.errors import AraeError
from cluster.connect import LATE, STARTS, start_alone

SLEEP = "import time; time.sleep(600)"


class Late:
    """`ray.init` that is late the first times; each start leaves a process behind, as Ray's does."""

    def __init__(self, times: int, said: str = f"The current node {LATE[0]}.") -> None:
        self.times, self.said, self.started = times, said, list[subprocess.Popen[bytes]]()
        self.beside, self.bystanders = list[str](), list[subprocess.Popen[bytes]]()

    def __call__(self, address: str, **options: Any) -> None:
        assert (address, options) == ("local", {"num_cpus": 2})
        self.started.append(subprocess.Popen([sys.executable, "-c", SLEEP + "  # /ray/raylet"]))
        if self.beside:
            self.bystanders.append(subprocess.Popen(self.beside))
        if len(self.started) <= self.times:
            raise Exception(self.said)

    def alive(self) -> list[bool]:
        """Of each start's process, whether it is left; a killed one ends at once."""
        for process in self.started[: self.times]:
            process.wait(60)
        return [process.poll() is None for process in self.started]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    import ray

    made = Late(*request.param)
    monkeypatch.setattr(ray, "init", made)
    yield made
    for process in made.started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("late", [(0,), (1,), (2, f"{LATE[1]} gcs_server_port.")], indirect=True)
def test_a_node_that_is_late_is_started_again(late: Late) -> None:
    """And what the late one has left is killed: nothing from before it, and nothing that is not Ray's."""
    before = subprocess.Popen([sys.executable, "-c", SLEEP + "  # /ray/raylet"])
    late.beside = [sys.executable, "-c", SLEEP]
    try:
        start_alone(num_cpus=2)
        assert late.alive() == [False] * late.times + [True]
        assert before.poll() is None
        assert all(each.poll() is None for each in late.bystanders)
    finally:
        for each in (before, *late.bystanders):
            each.kill()
            each.wait()


@pytest.mark.parametrize("late", [(STARTS,)], indirect=True)
def test_one_that_is_always_late_is_said(late: Late) -> None:
    with pytest.raises(AraeError, match=f"started {STARTS} times .*too busy"):
        start_alone(num_cpus=2)
    assert late.alive() == [False] * STARTS


@pytest.mark.parametrize("late", [(1, "no such option")], indirect=True)
def test_another_error_is_handed_on(late: Late) -> None:
    with pytest.raises(Exception, match="no such option"):
        start_alone(num_cpus=2)
    assert len(late.started) == 1
