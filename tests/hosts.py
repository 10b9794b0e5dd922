"""Three hosts on one machine: network namespaces behind a switch, a real `ray start` on each.

Every host has a network, a name, an `/etc/hosts` and a `/tmp/ray` of its own; the disk is shared, as by NFS. Nothing
outside the namespaces is touched. What a test run that was killed has left is removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "arae-"  # of all namespaces made here
SWITCH = f"{PREFIX}switch"
ADDRESSES = {"head": "10.77.0.1", "host2": "10.77.0.2", "host3": "10.77.0.3"}
INTERFACE = "eth0"
NETNS = Path("/etc/netns")
BIN = Path(sys.executable).parent
START_S = 90.0
OBJECT_STORE = 100 * 2**20  # batches never go through Ray

# Ray's health checks are patient (a dead node is noticed after some 15 s); here they need not be.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
# Enters a host: a name and a /tmp/ray of its own, then the command in place of this shell.
_ENTER = 'hostname "$1"; mount --bind "$2" /tmp/ray; shift 2; exec "$@"'


def reason_to_skip() -> str | None:
    """Why there can be no hosts on this machine; None where there can."""
    if os.geteuid() != 0:
        return "hosts of one's own (network namespaces) need root"
    missing = [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"hosts of one's own need {', '.join(missing)} (packages iproute2, util-linux, hostname)"
    probe = f"{PREFIX}probe"
    commands = (
        f"ip netns add {probe}",
        f"ip -n {probe} link add br0 type bridge",
        f"ip -n {probe} link add eth0 type veth peer name eth1",
        f"ip netns exec {probe} unshare --mount --uts hostname probe",
    )
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20, check=False)
            if done.returncode:
                return f"hosts of one's own are not permitted here ({command}: {done.stderr.strip()})"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=20, check=False)
    return None


@dataclass(frozen=True)
class Host:
    """One host: `run` and `start` put a process on it."""

    name: str
    folder: Path
    environment: Mapping[str, str]

    @property
    def address(self) -> str:
        """Its address in the namespaces' own network."""
        return ADDRESSES[self.name]

    @property
    def namespace(self) -> str:
        """Its network namespace."""
        return PREFIX + self.name

    def command(self, words: Sequence[object]) -> list[str]:
        """The command line that runs `words` on this host."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "--", "sh", "-ec", _ENTER, "sh"]
        return [*enter, self.name, str(self.folder / "ray"), *map(str, words)]

    def start(self, words: Sequence[object], **settings: str) -> subprocess.Popen[str]:
        """Start a command; output and errors go to a file each in the host's folder (`NAME.out`, `NAME.err`).

        `settings` are added to the environment.
        """
        stem = f"{time.monotonic_ns()}-{Path(str(words[0])).name}"
        with (self.folder / f"{stem}.out").open("w") as out, (self.folder / f"{stem}.err").open("w") as err:
            return subprocess.Popen(
                self.command(words),
                env={**self.environment, **settings},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )

    def run(self, words: Sequence[object], timeout: float = START_S) -> str:
        """Run a command to its end and return what it said; AssertionError, with that, where it fails."""
        with (self.folder / "run.log").open("w+") as log:  # a pipe would stay open in the daemons that it leaves
            done = subprocess.run(
                self.command(words),
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
            log.seek(0)
            said = log.read()
        assert done.returncode == 0, f"{self.name}: {' '.join(map(str, words))} ended with {done.returncode}:\n{said}"
        return said

    def pids(self) -> list[int]:
        """The processes on it, every one."""
        return _pids(self.namespace)

    def has(self, name: str) -> bool:
        """Whether a process with this in its command line runs on it."""
        return any(name in _command(pid) for pid in self.pids())

    def kill(self) -> None:
        """SIGKILL to every process on it, as when its power goes; the network stays."""
        _kill(self.namespace)


@dataclass
class Cluster:
    """The three hosts; Ray runs on those that were joined."""

    hosts: dict[str, Host]
    cpus: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(ADDRESSES, 1))

    @property
    def head(self) -> Host:
        """The host of Ray's head, and of the drivers."""
        return self.hosts["head"]

    def join(self, name: str) -> None:
        """Start Ray on a host; its head on the head."""
        role = ["--head", "--port=6379"] if name == "head" else [f"--address={ADDRESSES['head']}:6379"]
        limits = [f"--num-cpus={self.cpus[name]}", f"--object-store-memory={OBJECT_STORE}"]
        self.hosts[name].run([BIN / "ray", "start", f"--node-ip-address={ADDRESSES[name]}", *role, *limits])

    def kill(self, name: str) -> None:
        """SIGKILL to a host's raylet, its workers, everything."""
        self.hosts[name].kill()


@contextmanager
def three_hosts(folder: Path, **settings: str) -> Iterator[Cluster]:
    """The hosts, without Ray yet (see `Cluster.join`); removed at the end, whatever happens.

    `folder` takes their temporary folders; `settings`, such as those of `secured`, are added to the environment of all
    their processes. A second caller waits until the first has removed its hosts.
    """
    with Path("/tmp/arae-hosts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove()
        try:
            _build()
            environment = {**_environment(), **settings}
            hosts = {name: Host(name, folder / name, environment) for name in ADDRESSES}
            for host in hosts.values():
                (host.folder / "ray").mkdir(parents=True)
            Path("/tmp/ray").mkdir(exist_ok=True)  # what the hosts' own are put over
            yield Cluster(hosts)
        finally:
            _remove()


def secured(folder: Path) -> dict[str, str]:
    """Settings of a cluster that only those with its token may use; the token is made in `folder`."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(os.urandom(32).hex())
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }


def _environment() -> dict[str, str]:
    """What all their processes see: this shell's variables, but none that are about Ray or arae."""
    own = ("RAY_", "GLOO_", "ARAE_", "MLFLOW_")
    outer = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    path = f"{BIN}{os.pathsep}{outer['PATH']}"
    return {**outer, **QUICK, "PATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}


def _build() -> None:
    """A switch with a bridge; hosts on it."""
    _ip("netns", "add", SWITCH)
    _ip("-n", SWITCH, "link", "add", "br0", "type", "bridge")
    _ip("-n", SWITCH, "link", "set", "br0", "up")
    names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    for name, address in ADDRESSES.items():
        inside = PREFIX + name
        etc = NETNS / inside
        etc.mkdir(parents=True)
        # Debian's installer has a host's own name mean 127.0.1.1, where no other host can reach it.
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{names}")
        # There is no name server; an answer at once is better than ten seconds of waiting for one.
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        _ip("netns", "add", inside)
        _ip("-n", inside, "link", "add", INTERFACE, "type", "veth", "peer", "name", name, "netns", SWITCH)
        _ip("-n", SWITCH, "link", "set", name, "master", "br0", "up")
        _ip("-n", inside, "addr", "add", f"{address}/24", "dev", INTERFACE)
        _ip("-n", inside, "link", "set", "lo", "up")
        _ip("-n", inside, "link", "set", INTERFACE, "up")
        _ip("-n", inside, "route", "add", "default", "via", "10.77.0.254")  # Ray finds its address by a route


def _remove() -> None:
    """Kill what runs in our namespaces and remove them; there may be none."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for namespace in (line.split()[0] for line in listed.splitlines() if line.startswith(PREFIX)):
        _kill(namespace)
        _ip("netns", "del", namespace)
    for etc in NETNS.glob(f"{PREFIX}*"):
        shutil.rmtree(etc)


def _kill(namespace: str) -> None:
    deadline = time.monotonic() + 20
    while pids := _pids(namespace):  # again, for what was being forked
        assert time.monotonic() < deadline, f"{namespace}: processes {pids} don't die"
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _pids(namespace: str) -> list[int]:
    """Processes in a network namespace, without zombies, which nobody can kill."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True).stdout
    return [pid for pid in map(int, listed.split()) if _state(pid) not in ("Z", "X", "")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
