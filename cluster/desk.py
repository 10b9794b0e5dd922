"""The desk: where the driver and the workers of one launch leave each other word.

Rank 0 tells it the run's events and the driver collects them; the driver leaves word that the run is to stop and every
worker asks for it; a worker that can't go on leaves its verdict, which ends the launch; the workers show that they are
there, so that of a failed group it can be told which worker went first. It lives as an actor beside the driver, and
ends with it. Nothing here is needed to go on: what counts is in the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from arae.errors import AraeError, InputError, Stopped
from arae.train.log import Event

SILENT_S = 2.0  # without a sign while others still give some: the worker went first
REPEATS = 3  # the same place reached so often and an error raised each time: the next time will be no other

Kind = Literal["died", "memory", "silent", "raised", "lost"]


@dataclass(frozen=True)
class Verdict:
    """How a launch ends before the training does: an exit code and its line."""

    code: int
    line: str

    def error(self) -> AraeError:
        """The error that ends a command so."""
        kinds: dict[int, type[AraeError]] = {InputError.exit_code: InputError, Stopped.exit_code: Stopped}
        return kinds.get(self.code, AraeError)(self.line)


@dataclass(frozen=True)
class Member:
    """One worker of one group; `group` names the group, a restarted one is another."""

    group: str
    rank: int
    size: int
    host: str
    pid: int
    node: str
    """Ray's id of the machine."""

    def __str__(self) -> str:
        return f"worker {self.rank} on {self.host} (pid {self.pid})"


@dataclass(frozen=True)
class Failure:
    """What Ray Train saw of one worker's end.

    `died`: the process is gone; `memory`: Ray killed it for want of memory; `silent`: it does not answer; `raised`: its
    code raised an error; `lost`: it lost the others in a collective, which is seldom its own fault.
    """

    kind: Kind
    text: str = ""


@dataclass(frozen=True)
class Greeting:
    """What a worker hears when it comes to the desk."""

    verdict: Verdict | None = None
    restart: Mapping[str, Any] | None = None
    """`count` and `reason`, for rank 0 of a group that is not the first."""


@dataclass(frozen=True)
class News:
    """What the driver hears."""

    events: list[Event]
    verdict: Verdict | None
    waiting_s: float
    """Seconds since a whole group was last seen."""
    reason: str
    """Why the last group failed."""
    own: bool
    """Whether its own code raised the error."""
    groups: int
    """How many groups were whole so far."""


@dataclass
class _Group:
    name: str
    size: int
    members: dict[int, Member] = field(default_factory=dict)
    seen: dict[int, float] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    failed_at: float | None = None
    left: set[int] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        return len(self.members) == self.size

    def silent(self) -> dict[int, float]:
        """Ranks that went silent before the others did, and for how many seconds when the failure was seen."""
        newest = max(self.seen.values(), default=0.0)
        until = newest if self.failed_at is None else max(newest, self.failed_at)
        return {rank: until - at for rank, at in sorted(self.seen.items()) if until - at > SILENT_S}


class Desk:
    """The desk itself; `clock` gives seconds, `dead_nodes` Ray's ids of the machines that were lost."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, dead_nodes: Callable[[], set[str]] | None = None
    ) -> None:
        self._clock, self._dead_nodes = clock, dead_nodes or lost_nodes
        self._events: list[Event] = []
        self._verdict: Verdict | None = None
        self._stop = False
        self._group: _Group | None = None
        self._groups = self._whole = 0
        self._trouble = ""
        self._reason, self._own = "", False
        self._whole_at = clock()
        self._reached = self._raised_at = (False, -1)
        self._raised = 0
        self._controller: tuple[Any, str] | None = None

    def begun(self, controller: Any, run: str) -> None:
        """Ray Train's controller is at work; `controller` is a handle to it, `run` what Ray Train calls the launch."""
        self._controller = controller, run

    def controller(self) -> tuple[Any, str] | None:
        """The controller that began last, and its run; None where none has, or it is known to have ended."""
        return self._controller

    def ended(self) -> None:
        """The controller has ended: a handle would keep it, and what it holds, for as long as the desk."""
        self._controller = None

    def register(self, member: Member) -> Greeting:
        """A worker begins. Raises nothing; the greeting says whether there is anything left to do."""
        restart = None
        if self._group is None or self._group.name != member.group:
            self._explain(member.size)
            self._group = _Group(member.group, member.size)
            self._groups += 1
        self._group.members[member.rank] = member
        self._whole += self._group.whole
        self.beat(member.group, member.rank)
        if member.rank == 0 and self._groups > 1:
            restart = {"count": self._groups - 1, "reason": self._reason}
        return Greeting(self._verdict, restart)

    def beat(self, group: str, rank: int) -> bool:
        """A worker shows that it is there; returns whether it is to save and stop."""
        now = self._clock()
        if self._group is not None and self._group.name == group:
            self._group.seen[rank] = now
            if self._group.whole:
                self._whole_at = now
        return self._stop

    def tell(self, event: Event) -> None:
        """Rank 0 tells an event of the run."""
        self._events.append(event)
        if "step" in event and "stage" in event:
            self._reached = max(self._reached, (event["stage"] == "decoder", int(event["step"])))

    def leave(self, group: str, rank: int, verdict: Verdict | None) -> None:
        """A worker is done, or knows that there is no going on; the first verdict stands."""
        self._verdict = self._verdict or verdict
        if self._group is not None and self._group.name == group:
            self._group.left.add(rank)

    def failed(self, failures: Mapping[int, Failure]) -> bool:
        """Ray Train saw workers fail; returns whether it is clear which of them went first."""
        group = self._group
        if group is None:
            return True
        if group.failed_at is None:
            group.failed_at = self._clock()
        group.failures |= failures
        return any(f.kind != "lost" for f in group.failures.values()) or bool(group.silent())

    def judge(self) -> Verdict | None:
        """After a failure: whether the launch is to end rather than start another group."""
        self._explain(None)
        if self._own and self._verdict is None:
            self._raised = self._raised + 1 if self._reached <= self._raised_at else 1
            self._raised_at = self._reached
            if self._raised >= REPEATS:
                self._verdict = Verdict(1, f"failed {REPEATS} times at the same place, the last time: {self._reason}")
        return self._verdict

    def trouble(self, text: str) -> None:
        """The driver had to start Ray Train anew: what it says counts where no worker is known to have failed."""
        self._trouble = text

    def collect(self, *, stop: bool) -> News:
        """The driver takes what was told, and leaves word whether the run is to stop."""
        self._stop = stop
        events, self._events = self._events, []
        done = self._group is not None and len(self._group.left) == self._group.size
        waiting_s = 0.0 if done else self._clock() - self._whole_at
        return News(events, self._verdict, waiting_s, self._reason, self._own, self._whole)

    def _explain(self, size: int | None) -> None:
        """Put down why the group at work failed; `size` is that of the group which takes its place, once it has."""
        group = self._group
        if group is None:
            return
        if not group.failures:
            said = f"from {group.size} to {size} workers" if size != group.size else f"with {group.size} workers"
            self._reason, self._own = self._trouble or f"Ray started the group anew, {said}", False
            self._trouble = ""
            return
        self._reason, self._own = why(group.members, group.failures, group.silent(), self._dead_nodes())


def why(
    members: Mapping[int, Member], failures: Mapping[int, Failure], silent: Mapping[int, float], dead: set[str]
) -> tuple[str, bool]:
    """Why a group failed, in one line, and whether its own code raised the error.

    Of all that fails together the first is looked for: a machine, then a process, then an error, then a connection.
    """

    def named(rank: int) -> str:
        return str(members.get(rank, f"worker {rank}"))

    hosts = {m.host: [r for r, o in members.items() if o.node == m.node] for m in members.values() if m.node in dead}
    if hosts:
        ranks = {host: ", ".join(f"worker {r}" for r in sorted(there)) for host, there in sorted(hosts.items())}
        return "; ".join(f"host {host} was lost, and {there} with it" for host, there in ranks.items()), False
    kinds: dict[Kind, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        kinds.setdefault(failure.kind, []).append(rank)
    if ranks := kinds.get("memory"):
        return f"{named(ranks[0])} was killed: its host ran out of memory", False
    died = kinds.get("died", [])
    if not died and (ranks := kinds.get("raised")):
        return f"{named(ranks[0])} failed: {failures[ranks[0]].text}", True
    hung = kinds.get("silent", []) + [rank for rank in silent if rank not in failures]
    gone = {rank: silent.get(rank, 0.0) for rank in died + hung}
    # NCCL ends the processes that wait in vain for one that hangs: who was silent first counts.
    first = [rank for rank, seconds in gone.items() if seconds >= max(gone.values()) - SILENT_S]
    if ranks := [rank for rank in first if rank in died]:
        return f"{' and '.join(map(named, ranks))} was killed or crashed", False
    if first:
        return " and ".join(f"{named(rank)} did not answer for {gone[rank]:.0f} s" for rank in first), False
    loser = min(failures)
    return f"{named(loser)} lost the others: {failures[loser].text}", False


def lost_nodes() -> set[str]:
    """Ray's ids of the machines that it holds for dead."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def open_desk() -> Any:
    """A desk as an actor on this machine; a handle to it."""
    import ray

    # By label, as Ray Train places its controller. A soft affinity would do where every node knew every other: a node
    # that has just joined may not know this one yet, and would keep the desk, which then is lost with that node.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(Desk).options(num_cpus=0, label_selector=here).remote()
