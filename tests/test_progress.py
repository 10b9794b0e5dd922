import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from arae.monitor.events import tail
from arae.monitor.pace import Pace, clock
from arae.monitor.progress import Progress
from arae.runs import RunFolder


def interval(step: int, moment: float, **fields: Any) -> dict[str, Any]:
    event = {"event": "interval", "stage": "encoder", "step": step, "steps": 625, "epoch": 0.1, "time": moment}
    return event | {"metrics": {"loss": 1.2345, "lr": 0.1}, "images_per_s": 840.3} | fields


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(events: list[dict[str, Any]], folder: RunFolder | None = None) -> list[str]:
    stream = io.StringIO()
    with Progress(folder, stream=stream) as progress:
        for event in events:
            progress(event)
    return stream.getvalue().splitlines()


# --- lines --------------------------------------------------------------------------------------------------------


def test_a_line_says_step_loss_speed_and_time_left() -> None:
    assert shown([interval(100, 0.0), interval(120, 20.0)]) == [
        "encoder 100/625  loss 1.234  840 images/s",
        "encoder 120/625  loss 1.234  840 images/s  8:25 left",
    ]


def test_lines_come_at_most_every_ten_seconds_and_at_the_end() -> None:
    events = [interval(step, float(step)) for step in range(1, 36)]
    lines = shown([*events, {"event": "stage", "stage": "encoder", "state": "finished", "time": 36.0}])
    assert [line.split("  ")[0] for line in lines] == [
        *(f"encoder {step}/625" for step in (1, 11, 21, 31, 35)),
        "encoder finished in 0:35",
    ]


def test_what_waits_is_shown_on_closing() -> None:
    assert shown([interval(1, 0.0), interval(2, 1.0)])[-1].startswith("encoder 2/625")


def test_stages_are_throttled_apart() -> None:
    lines = shown([interval(1, 0.0), interval(1, 1.0, stage="decoder"), interval(2, 2.0)])
    assert [line.split()[0] for line in lines] == ["encoder", "decoder", "encoder"]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"event": "note", "time": 0.0, "text": "resumed at step 120 of encoder"}, "resumed at step 120 of encoder"),
        ({"event": "stage", "stage": "decoder", "state": "skipped", "time": 0.0}, "decoder skipped"),
        ({"event": "stage", "stage": "decoder", "state": "started", "time": 0.0}, "decoder started"),
        (
            {
                "event": "epoch",
                "stage": "encoder",
                "step": 5,
                "epoch": 2,
                "time": 0.0,
                "metrics": {"loss": 0.5, "psnr": 23},
            },
            "encoder epoch 2  loss 0.5  psnr 23",
        ),
        (
            interval(7, 0.0, metrics={"generator": 1.5, "pixel": 0.25}),
            "encoder 7/625  generator 1.5  pixel 0.25  840 images/s",
        ),
    ],
)
def test_other_events_have_their_lines(event: dict[str, Any], line: str) -> None:
    assert shown([event]) == [line]


def worker(rank: int, work_s: float = 0.2, images_per_s: float = 420.0, wait_s: float = 0.0) -> dict[str, Any]:
    return {"rank": rank, "host": f"h{rank}", "images_per_s": images_per_s, "work_s": work_s, "wait_s": wait_s}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"workers": [worker(0)]}, "840 images/s"),
        ({"workers": [worker(0), worker(1)]}, "840 images/s by 2 workers (420 each)"),
        (
            {"workers": [worker(0, images_per_s=410), worker(1, images_per_s=430)]},
            "840 images/s by 2 workers (410–430 each)",
        ),
        ({"workers": [worker(0, wait_s=0.1)], "step_s": 0.4}, "840 images/s  loader wait 25 %"),
        ({"workers": [worker(0, wait_s=0.1), worker(1)], "step_s": 0.4}, "by 2 workers (420 each)  loader wait 12 %"),
        ({"workers": [worker(0, wait_s=0.001)], "step_s": 0.4}, "840 images/s"),
        ({"workers": [worker(0, wait_s=0.1)]}, "840 images/s"),
        ({"workers": [worker(0), worker(1, 0.4)]}, "(420 each)  slow: worker 1 on h1 (1.3×)"),
        ({"workers": [worker(0), worker(1, 0.24)]}, "(420 each)"),
        # Twice the work on twice the images is no straggler; twice the work on as many is.
        ({"workers": [worker(0, 0.4, 840), worker(1), worker(2)]}, "by 3 workers (420–840 each)"),
        (
            {"workers": [*(worker(n) for n in range(12)), *(worker(n, 0.2 * (n - 10)) for n in range(12, 16))]},
            "slow: worker 15 on h15 (5.0×), worker 14 on h14 (4.0×), worker 13 on h13 (3.0×) and 1 more",
        ),
    ],
)
def test_a_line_says_how_the_group_fares(fields: dict[str, Any], words: str) -> None:
    (line,) = shown([interval(100, 0.0, eta_s=130.0, **fields)])
    assert line.startswith("encoder 100/625  loss 1.234  840 images/s")
    assert line.endswith(f"{words}  2:10 left")


def test_restarts_are_told_with_their_reasons_and_states_are_not() -> None:
    reason = "worker 1 on h1 (pid 12) was killed by signal 9"
    group = {"event": "group", "time": 0.0, "hosts": ["h0", "h1", "h1"], "device": "cuda", "precision": "bf16"}
    assert shown(
        [
            group | {"world_size": 3, "engine": "ddp"},
            {"event": "state", "time": 1.0, "stage": "encoder", "step": 40, "best": True, "seconds": 0.1},
            {"event": "restart", "time": 2.0, "count": 1, "reason": reason, "world_size": 2, "step": 40},
            {"event": "restart", "time": 2.0, "count": 2, "reason": "a worker\nraised", "world_size": 1, "step": 0},
            group | {"world_size": 1, "hosts": ["h0"]},
        ]
    ) == [
        "3 workers on h0, h1: cuda, bf16, ddp",
        f"restart 1: {reason}; goes on from step 40 by 2 workers",
        "restart 2: a worker raised; goes on from step 0 by 1 worker",
    ]


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event": "unheard of"},
        {"event": "restart"},
        {"event": "group", "world_size": "many"},
        interval(1, 0.0, workers=[{"rank": 0}]),
        interval(1, 0.0, workers=3),
        {"event": None},
        {"event": "interval"},
        {"event": "interval", "stage": "encoder", "time": "now"},
        interval(1, 0.0, metrics={"loss": "low"}),
        interval(1, 0.0, steps="many"),
        {"event": "epoch", "stage": "encoder", "epoch": 1, "metrics": 3},
        {"event": "stage", "stage": "encoder", "state": "finished"},
        {"event": "picture", "stage": "encoder", "step": 1, "path": "images/a.png"},
    ],
)
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_events_that_are_not_understood_are_passed_over(event: dict[str, Any], stream: type[io.StringIO]) -> None:
    with Progress(stream=stream()) as progress:
        progress(event)
        progress(interval(2, 0.0))


def test_the_run_folder_gets_the_same_lines_with_the_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    lines = shown([interval(1, 0.0), interval(2, 1.0), interval(3, 20.0)], folder)
    shown([interval(4, 30.0)], folder)
    written = folder.text.read_text().splitlines()
    assert [line[21:] for line in written[:-1]] == lines
    assert written[-1][21:].startswith("encoder 4/625")
    assert time.strptime(written[0][:19], "%Y-%m-%d %H:%M:%S")


def test_other_long_work_has_lines_too() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        for done in range(1, 101):
            progress.task("evaluating", done, 100)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "evaluating 1/100",
        "evaluating 100/100",
    ]


def test_a_stream_or_disk_that_fails_ends_no_run(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    (tmp_path / "run").write_text("a file where the folder should be")
    with Progress(RunFolder(tmp_path / "run"), stream=Gone()) as progress:
        progress(interval(1, 0.0))


def test_a_terminal_gets_one_bar_a_stage(tmp_path: Path) -> None:
    stream = Terminal()
    folder = RunFolder(tmp_path)
    with Progress(folder, stream=stream) as progress:
        progress(interval(100, 0.0))
        progress(interval(120, 20.0))
        progress({"event": "note", "time": 0.0, "text": "resumed [at] 1"})
        progress.task("checking", 3, 10)
    text = stream.getvalue()
    for part in ("encoder", "120/625", "840 images/s", "8:25 left", "loss 1.234", "checking", "3/10", "resumed [at] 1"):
        assert part in text
    assert "encoder 120/625  loss" in folder.text.read_text()


# --- time left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "left"),
    [
        ([(0, 0.0)], None),
        ([(0, 0.0), (10, 5.0)], 45.0),
        ([(50, 0.0), (60, 5.0)], 20.0),
        ([(10, 0.0), (10, 5.0)], None),
        ([(90, 0.0), (20, 5.0)], None),
        ([(90, 0.0), (20, 5.0), (30, 10.0)], 35.0),
        ([(0, 0.0), (100, 1.0)], 0.0),
    ],
)
def test_the_time_left_follows_the_newest_pace(points: list[tuple[int, float]], left: float | None) -> None:
    pace = Pace()
    assert [pace.left(done, 100, now) for done, now in points][-1] == left


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (130, "2:10"), (3730, "1:02:10"), (-5, "0:00"), (360000, "100:00:00")],
)
def test_a_duration_is_read_at_a_glance(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# --- following a log ----------------------------------------------------------------------------------------------


class Follower:
    """Runs `tail` in a thread and lets a test write to the file meanwhile."""

    def __init__(self, path: Path, offset: int | None = None) -> None:
        self.path, self.seen, self.stop = path, [], threading.Event()
        self.thread = threading.Thread(target=self._run, args=(offset,))
        self.thread.start()

    def _run(self, offset: int | None) -> None:
        self.offset = tail(self.path, lambda event: self.seen.append(event["n"]), self.stop, offset=offset)

    def write(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)

    def wait(self, seen: list[int]) -> None:
        deadline = time.monotonic() + 10
        while self.seen != seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.seen == seen

    def end(self) -> int:
        self.stop.set()
        self.thread.join(10)
        return self.offset


def line(n: int) -> bytes:
    return json.dumps({"n": n}).encode() + b"\n"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arae.monitor.events.POLL", 0.01)


def test_a_growing_log_is_followed_line_by_line(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "log.jsonl", offset=0)
    follower.write(line(1))
    follower.wait([1])
    follower.write(line(2)[:4])
    follower.write(b"")
    time.sleep(0.05)
    assert follower.seen == [1]
    follower.write(line(2)[4:] + line(3))
    follower.wait([1, 2, 3])
    assert follower.end() == (tmp_path / "log.jsonl").stat().st_size


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "log.jsonl", offset=0)
    follower.write(line(1) + b'{"n": ' + line(2) + b"[3]\n\xff\n" + line(4))
    follower.wait([1, 4])
    follower.end()


def test_it_begins_at_the_present_end_or_where_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line(1) + line(2))
    stop = threading.Event()
    stop.set()
    seen: list[int] = []
    assert tail(path, lambda event: seen.append(event["n"]), stop) == path.stat().st_size
    assert seen == []
    tail(path, lambda event: seen.append(event["n"]), stop, offset=len(line(1)))
    assert seen == [2]


def test_a_log_cut_short_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    follower = Follower(path, offset=0)
    follower.write(line(1) + line(2) + line(3))
    follower.wait([1, 2, 3])
    replacement = tmp_path / "new"
    replacement.write_bytes(line(7))
    replacement.replace(path)
    follower.wait([1, 2, 3, 7])
    follower.end()


def test_what_is_there_when_it_is_stopped_is_still_read(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "log.jsonl", offset=0)
    for n in range(200):
        follower.write(line(n))
    follower.end()
    assert follower.seen == list(range(200))


def test_a_listener_that_fails_is_heard(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line(1))
    stop = threading.Event()
    stop.set()

    def fail(event: Any) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        tail(path, fail, stop, offset=0)
