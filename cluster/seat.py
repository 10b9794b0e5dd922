"""A worker's side of the desk."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

from arae.train.log import Event
from cluster.desk import Greeting, Member, Verdict

BEAT_S = 0.5
ANSWER_S = 60.0


class Seat:
    """One worker's place at the desk: shows that it is there and hears whether to stop, and training never waits."""

    def __init__(self, desk: Any, member: Member) -> None:
        import ray

        self.desk, self.member = desk, member
        self.greeting: Greeting = ray.get(desk.register.remote(member), timeout=ANSWER_S)
        self._stop, self._left = threading.Event(), threading.Event()
        threading.Thread(target=self._beat, name="desk", daemon=True).start()

    def stop(self) -> bool:
        """Whether the run is to save and stop."""
        return self._stop.is_set()

    def asked(self) -> bool:
        """Whether the driver wants the run to stop, as of now."""
        import ray

        return ray.get(self.desk.beat.remote(self.member.group, self.member.rank), timeout=ANSWER_S)

    def tell(self, event: Event) -> None:
        """Tell an event; what is told from one worker arrives in order, and nobody waits for it."""
        self.desk.tell.remote(event)

    def leave(self, verdict: Verdict | None = None) -> None:
        """Go; returns when the desk knows, and with it all that was told."""
        import ray

        self._left.set()
        ray.get(self.desk.leave.remote(self.member.group, self.member.rank, verdict), timeout=ANSWER_S)

    def _beat(self) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        while not self._left.wait(BEAT_S):
            try:
                if ray.get(self.desk.beat.remote(self.member.group, self.member.rank), timeout=ANSWER_S):
                    self._stop.set()
            except GetTimeoutError:
                continue
            except RayError:  # the driver is gone, and nobody will hear how this ends: keep what there is
                self._stop.set()
                return


def this_worker() -> Member:
    """Who this worker is, inside Ray Train."""
    import ray
    import ray.train

    context = ray.train.get_context()
    return Member(
        group=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",  # Ray Train takes a free port for each group
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        host=socket.gethostname(),
        pid=os.getpid(),
        node=ray.get_runtime_context().get_node_id(),
    )
