"""`docs/cluster.md`, followed to the letter on three hosts: from nothing to a run on two nodes."""

import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from cluster_page import names, steps
from hosts import ADDRESSES, INTERFACE, Cluster, Host, reason_to_skip, three_hosts

from arae.runs import RunFolder

BLOCK_S = 180.0
DONE = "-- done --"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """The three hosts, with nothing on them."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    with three_hosts(tmp_path / "hosts") as cluster:
        yield cluster


class Reader:
    """Somebody in front of a host, with a shell that stays open from one step to the next."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.shell = subprocess.Popen(
            host.command(["bash", "--norc"]),
            env=dict(host.environment),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
        )

    def types(self, text: str) -> str:
        """Type the text line by line and return what it said; AssertionError where a line fails or takes too long."""
        assert self.shell.stdin
        assert self.shell.stdout
        # What is typed is read whole before it is run, and no command reads what was typed after it.
        self.shell.stdin.write(
            f"trap 'echo {DONE} $?; exit 1' ERR\n{{\n{text}\n}} </dev/null\necho {DONE} 0\n".encode()
        )
        said, deadline = b"", time.monotonic() + BLOCK_S
        while DONE.encode() not in said or not said.endswith(b"\n"):
            ready = select.select([self.shell.stdout], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"{self.host.name}, after {BLOCK_S:g} s of:\n{text}\n{said.decode()}"
            read = os.read(self.shell.stdout.fileno(), 65536)
            assert read, f"{self.host.name}'s shell has ended:\n{text}\n{said.decode()}"
            said += read
        whole, _, code = said.decode().rpartition(DONE)
        assert code.split()[0] == "0", f"{self.host.name}:\n{text}\n{whole}"
        return whole

    def leaves(self) -> None:
        """Close the shell; what it started in the background stays, as daemons do."""
        self.shell.kill()
        self.shell.wait(10)
        for pipe in (self.shell.stdin, self.shell.stdout):
            if pipe:
                pipe.close()


@pytest.mark.cluster
@pytest.mark.ray
def test_from_nothing_to_a_run_on_two_nodes(cluster: Cluster, tmp_path: Path, repository: Path) -> None:
    shared = tmp_path / "shared"
    own = {"10.77.0.1": ADDRESSES["head"], "eth0": INTERFACE, "/mnt/arae": str(shared), "/opt/arae": str(repository)}
    assert set(own) == set(names())
    readers = {name: Reader(host) for name, host in cluster.hosts.items()}
    said = {}
    try:
        for block in steps():
            text = block.text
            for name, mine in own.items():
                text = text.replace(name, mine)
            there = [reader for name, reader in readers.items() if (name == "head") == (block.where == "head")]
            with ThreadPoolExecutor() as pool:  # the nodes side by side
                said[block.text] = "".join(pool.map(partial(Reader.types, text=text), there))
    finally:
        for reader in readers.values():
            reader.leaves()
    (trained,) = (text for typed, text in said.items() if "arae train" in typed)
    (looked,) = (text for typed, text in said.items() if "arae status" in typed)
    assert "two-nodes: trained" in trained
    assert "finished" in looked
    folder = RunFolder(shared / "runs" / "two-nodes")
    group = next(e for e in lines(folder.log) if e["event"] == "group")
    assert group["world_size"] == 2
    assert len(set(group["hosts"])) == 2
    assert {"clean_accuracy", "psnr"} <= {
        json.loads(line)["metric"] for line in folder.records.read_text().splitlines()
    }
    assert (shared / "token").stat().st_mode & 0o077 == 0


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
