"""The desk of a launch, without Ray: who failed first, who is told what, and when it is over."""

import pytest

from arae.errors import AraeError, InputError, Stopped
from cluster.desk import REPEATS, Desk, Failure, Member, Verdict
from cluster.watch import failure_of


class Time:
    """A clock that tests move."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def member(rank: int, group: str = "first", size: int = 2) -> Member:
    return Member(group, rank, size, f"host{rank}", 10 + rank, f"node{rank}")


def group_at(desk: Desk, name: str = "first", size: int = 2) -> None:
    for rank in range(size):
        desk.register(member(rank, name, size))


@pytest.mark.parametrize(
    ("failures", "silent", "dead", "reason", "own"),
    [
        (
            {1: Failure("died"), 0: Failure("lost", "reset")},
            None,
            (),
            "worker 1 on host1 (pid 11) was killed or",
            False,
        ),
        ({1: Failure("memory")}, None, (), "worker 1 on host1 (pid 11) was killed: its host ran out of memory", False),
        ({0: Failure("lost", "timed out")}, 1, (), "worker 1 on host1 (pid 11) did not answer for 21 s", False),
        ({1: Failure("silent")}, 1, (), "worker 1 on host1 (pid 11) did not answer for 21 s", False),
        ({1: Failure("raised", "ValueError: x")}, None, (), "worker 1 on host1 (pid 11) failed: ValueError: x", True),
        ({0: Failure("lost", "reset")}, None, (), "worker 0 on host0 (pid 10) lost the others: reset", False),
        ({0: Failure("lost", "reset")}, None, ("node1",), "host host1 was lost, and worker 1 with it", False),
        ({0: Failure("died")}, 1, (), "worker 1 on host1 (pid 11) did not answer for 21 s", False),  # as under NCCL
        ({1: Failure("died"), 0: Failure("raised", "E")}, None, (), "worker 1 on host1 (pid 11) was killed or", False),
    ],
)
def test_the_first_to_fail_is_named(
    failures: dict[int, Failure], silent: int | None, dead: tuple[str, ...], reason: str, own: bool
) -> None:
    clock = Time()
    desk = Desk(clock, lambda: set(dead))
    group_at(desk)
    for _ in range(42):
        clock.now += 0.5
        for rank in (0, 1):
            if rank != silent:
                desk.beat("first", rank)
    desk.failed(failures)
    assert desk.judge() is None
    news = desk.collect(stop=False)
    assert news.reason.startswith(reason)
    assert news.own == own
    greeting = desk.register(member(0, "second"))
    assert greeting.restart == {"count": 1, "reason": news.reason}
    assert desk.register(member(1, "second")).restart is None


def test_who_lost_the_others_is_not_taken_for_the_first_before_the_others_have_shown_that_they_live() -> None:
    clock = Time()
    desk = Desk(clock, set)
    group_at(desk)
    assert not desk.failed({0: Failure("lost")})
    for _ in range(6):
        clock.now += 0.5
        desk.beat("first", 0)
    assert desk.failed({0: Failure("lost")})
    desk.judge()
    assert desk.collect(stop=False).reason.startswith("worker 1 on host1")


def test_waiting_is_counted_while_no_whole_group_is_seen() -> None:
    clock = Time()
    desk = Desk(clock, set)
    clock.now += 5
    desk.register(member(0))
    assert desk.collect(stop=False).waiting_s == 5  # one of two
    desk.register(member(1))
    assert desk.collect(stop=False).waiting_s == 0
    clock.now += 3
    desk.beat("an older group", 0)
    assert desk.collect(stop=False).waiting_s == 3
    desk.beat("first", 1)
    assert desk.collect(stop=False).waiting_s == 0
    clock.now += 3
    desk.leave("first", 1, None)
    assert desk.collect(stop=False).waiting_s == 3
    desk.leave("first", 0, None)
    assert desk.collect(stop=False).waiting_s == 0  # what comes now is Ray's tidying up


def test_a_resized_group_says_so_and_counts() -> None:
    desk = Desk(Time(), set)
    group_at(desk)
    greeting = desk.register(member(0, "second", 3))
    assert greeting.restart == {"count": 1, "reason": "Ray started the group anew, from 2 to 3 workers"}


def test_what_the_driver_knows_counts_where_no_worker_is_known_to_have_failed() -> None:
    desk = Desk(Time(), set)
    group_at(desk)
    desk.trouble("a worker was killed while the group was being set up")
    greeting = desk.register(member(0, "second"))
    assert greeting.restart == {"count": 1, "reason": "a worker was killed while the group was being set up"}
    desk.register(member(1, "second"))
    assert desk.collect(stop=False).groups == 2


def test_events_keep_their_order_and_are_handed_on_once_and_a_stop_is_heard() -> None:
    desk = Desk(Time(), set)
    group_at(desk)
    told = [{"event": "note", "text": str(i)} for i in range(5)]
    for event in told:
        desk.tell(event)
    assert not desk.beat("first", 0)
    assert desk.collect(stop=True).events == told
    assert desk.collect(stop=True).events == []
    assert desk.beat("first", 1)


@pytest.mark.parametrize(("code", "kind"), [(2, InputError), (75, Stopped), (1, AraeError)])
def test_the_first_verdict_stands_and_ends_every_later_group(code: int, kind: type[AraeError]) -> None:
    desk = Desk(Time(), set)
    group_at(desk)
    desk.leave("first", 1, Verdict(code, "that is how it is"))
    desk.leave("first", 0, Verdict(1, "another"))
    verdict = desk.register(member(0, "second")).verdict
    assert verdict is not None
    error = verdict.error()
    assert type(error) is kind
    assert error.exit_code == code
    assert str(error) == "that is how it is"


def failures_in_a_row(desk: Desk, failure: Failure, steps: list[int]) -> list[Verdict | None]:
    verdicts = []
    for i, step in enumerate(steps):
        group_at(desk, f"group {i}")
        desk.tell({"event": "interval", "stage": "encoder", "step": step})
        desk.failed({1: failure})
        verdicts.append(desk.judge())
    return verdicts


@pytest.mark.parametrize(
    ("failure", "steps", "ends"),
    [
        (Failure("raised", "ValueError: x"), [4] * REPEATS, True),
        (Failure("raised", "ValueError: x"), list(range(4, 4 + 2 * REPEATS)), False),
        (Failure("died"), [4] * 3 * REPEATS, False),
    ],
)
def test_an_error_that_comes_again_and_again_at_one_place_ends_the_launch(
    failure: Failure, steps: list[int], ends: bool
) -> None:
    verdicts = failures_in_a_row(Desk(Time(), set), failure, steps)
    assert not any(verdicts[:-1])
    last = verdicts[-1]
    assert (last is not None) == ends
    if last:
        assert last.code == 1
        assert "ValueError: x" in last.line


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("no such class"), "raised"),
        (RuntimeError("mat1 and mat2 shapes can not be multiplied"), "raised"),
        (OSError("connection file is missing"), "raised"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:2"), "lost"),
        (RuntimeError("Timed out waiting 20000ms for recv operation to complete"), "lost"),
    ],
)
def test_errors_of_the_training_are_told_from_lost_connections(error: Exception, kind: str) -> None:
    failure = failure_of(error)
    assert failure.kind == kind
    assert str(error) in failure.text
