"""Run folders at a URL: here one of a folder, opened by fsspec; `tests/cluster/test_s3.py` has a real server."""

import errno
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from groups import spawn

from arae.errors import DiskFull, InputError, Stopped
from arae.monitor.events import ending
from arae.runs import RunFolder, runs_root
from arae.storage import (
    Away,
    Remote,
    fetch_runs,
    fetched,
    is_url,
    mirrored,
    need_tracking_server,
    redacted,
    runs_place,
    shared,
    without_secrets,
)
from arae.storage import lease as lease_module
from arae.storage import pusher as pusher_module
from arae.storage.contents import no_states
from arae.storage.copy import Copy
from arae.storage.lease import Lease
from arae.storage.place import working_root
from arae.storage.pusher import Pusher
from arae.storage.sharing import finished


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save(run: Path, step: int, keep: int = 2) -> None:
    """What the training does: the state, the manifest that lists the last `keep`, then the older ones go."""
    manifest, listed = run / "state" / "manifest.json", []
    if manifest.is_file():
        listed = json.loads(manifest.read_text())["states"]
    content = f"state of step {step} " * 50
    write(run / "state" / f"encoder-{step:08d}.pt", content)
    entry = {"file": f"encoder-{step:08d}.pt", "sha256": hashlib.sha256(content.encode()).hexdigest()}
    listed = [*listed, entry][-keep:]
    write(run / "state" / "manifest.json.tmp", json.dumps({"states": listed}))
    (run / "state" / "manifest.json.tmp").replace(manifest)
    for path in (run / "state").glob("*.pt"):
        if path.name not in {each["file"] for each in listed}:
            path.unlink()


def is_whole(run: Path) -> bool:
    """Whether every state that the manifest lists lies beside it, undamaged."""
    manifest = run / "state" / "manifest.json"
    listed = json.loads(manifest.read_text())["states"] if manifest.is_file() else []
    files = [(run / "state" / each["file"], each["sha256"]) for each in listed]
    return all(path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha for path, sha in files)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.relative_to(folder).as_posix().startswith(".")
    }


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "storage").mkdir()
    return tmp_path / "storage"


def copy_of(there: Path, path: Path, kind: type[Remote] = Remote) -> Copy:
    return Copy(path, kind(f"local://{there}/run"))


@pytest.mark.parametrize(
    ("text", "url", "shown"),
    [
        ("s3://bucket/runs", True, "s3://bucket/runs"),
        ("s3:/bucket/runs", True, "s3://bucket/runs"),  # a Path has been made of it
        ("s3://KEY:SE%2FCRET@bucket/runs?endpoint_override=h:9&secret_key=SE", True, "s3://bucket/runs"),
        ("gs://bucket", True, "gs://bucket"),
        ("runs", False, None),
        ("/mnt/nfs/runs", False, None),
        ("file:///mnt/nfs/runs", False, None),
        ("C:/runs", False, None),
    ],
)
def test_what_is_a_url_and_what_is_shown_of_it(text: str, url: bool, shown: str | None) -> None:
    assert is_url(text) is url
    if shown:
        assert not re.search("KEY|SE", without_secrets(text))
        assert without_secrets(text).startswith(shown)
        assert redacted(text) == Remote(text).shown == shown
        assert (Remote(text) / "tiny").shown == f"{shown}/tiny"


def test_an_endpoint_is_no_secret() -> None:
    url = "s3://KEY:SECRET@bucket/runs?endpoint_override=h:9&secret_key=SECRET&scheme=http"
    assert without_secrets(url) == "s3://bucket/runs?endpoint_override=h:9&scheme=http"


def test_where_runs_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "scratch"))
    for named, root in [("", tmp_path / "runs"), ("/mnt/a", Path("/mnt/a")), ("file:///mnt/a", Path("/mnt/a"))]:
        monkeypatch.setenv("ARAE_RUNS", named)
        assert runs_root() == root
        assert runs_place() == str(root)
        need_tracking_server()
    roots = set()
    for named in ("s3://bucket/runs", "s3://KEY:SECRET@bucket/runs/", "s3://bucket/runs?region=x"):
        monkeypatch.setenv("ARAE_RUNS", named)
        roots.add(runs_root())
        with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
            need_tracking_server()
    (root,) = roots  # whatever the credentials
    assert root.is_relative_to(tmp_path / "scratch" / "runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    need_tracking_server()


def test_what_is_sent_and_what_is_not(tmp_path: Path, there: Path) -> None:
    run, copy = tmp_path / "a", copy_of(there, tmp_path / "a")
    own = {
        "recipe.yaml": "r",
        "log.jsonl": "{}\n",
        "model/config.json": "{}",
        "model/encoder.safetensors": "w",
        "images/1.png": "p",
        "evaluation/map/part": "e",
    }
    other = [
        ".lock",
        "x.tmp",
        "state/y.pt.tmp",
        "data/train.beton",
        "ray/notes",
        "eps-1/recipe.yaml",
        "eps-1/log.jsonl",
    ]
    for name, text in (own | dict.fromkeys(other, "no")).items():
        write(run / name, text)
    save(run, 10)
    write(run / "state" / "encoder-00000099.pt", "never listed")
    for role in ("session", "work"):
        copy.claim(role)
        copy.push(role)
    states = {f"state/{name}": (run / "state" / name).read_text() for name in ("manifest.json", "encoder-00000010.pt")}
    assert files(there / "run") == own | states
    new = copy_of(there, tmp_path / "b")
    for role in ("session", "work"):
        new.pull(role)
    assert files(tmp_path / "b") == own | states


class Moving(Remote):
    """After each change at the storage: looks whether what is there is whole, and lets the training go on."""

    go_on: Callable[[], None] = staticmethod(lambda: None)  # type: ignore[assignment]
    seen: list[bool] = []  # noqa: RUF012 -- the test's own
    folder: Path

    def _changed(self) -> None:
        Moving.seen.append(is_whole(Moving.folder))
        Moving.go_on()

    def write(self, name: str, content: bytes) -> None:
        super().write(name, content)
        self._changed()

    def upload(self, name: str, file, size: int) -> None:
        super().upload(name, file, size)
        self._changed()

    def delete(self, name: str) -> None:
        super().delete(name)
        self._changed()


def test_nothing_half_is_ever_shown_while_training_goes_on(tmp_path: Path, there: Path) -> None:
    run, copy = tmp_path / "a", copy_of(there, tmp_path / "a", Moving)
    steps = iter(range(10, 1000, 10))
    Moving.seen, Moving.folder = [], there / "run"
    Moving.go_on = staticmethod(lambda: save(run, next(steps)))  # type: ignore[assignment]
    save(run, 1)
    copy.claim("work")
    for _ in range(5):
        copy.push("work")
    assert len(Moving.seen) > 20
    assert all(Moving.seen)
    Moving.go_on = staticmethod(lambda: None)  # type: ignore[assignment]
    for path in (run / "state").iterdir():  # the stage is finished
        path.unlink()
    copy.push("work")
    assert all(Moving.seen)
    assert not list((there / "run" / "state").glob("*.pt"))


def test_the_copy_that_wrote_last_is_right(tmp_path: Path, there: Path) -> None:
    first, second = (copy_of(there, tmp_path / name) for name in "ab")
    write(first.path / "log.jsonl", "1")
    write(first.path / "records.jsonl", "gone in the end")
    save(first.path, 10)
    first.claim("work")
    first.push("work")
    write(first.path / "log.jsonl", "1 and not sent")
    first.pull("work")
    assert (first.path / "log.jsonl").read_text() == "1 and not sent"  # its own end counts, sent or not

    second.pull("work")
    second.claim("work")
    save(second.path, 20, keep=1)
    write(second.path / "log.jsonl", "2")
    (second.path / "records.jsonl").unlink()
    second.push("work")
    assert files(there / "run") == files(second.path)

    first.pull("work")
    assert files(first.path) == files(second.path)
    assert is_whole(first.path)


def test_states_are_brought_only_for_training_and_never_old_ones(tmp_path: Path, there: Path) -> None:
    first, second = (copy_of(there, tmp_path / name) for name in "ab")
    save(first.path, 10)
    first.claim("work")
    first.push("work")
    second.pull("work")
    second.claim("work")
    write(second.path / "state" / "encoder-00000010.pt", "the same step, of another number of workers")
    listed = {"file": "encoder-00000010.pt", "sha256": "other"}
    write(second.path / "state" / "manifest.json", json.dumps({"states": [listed]}))
    second.push("work")
    first.pull("work", no_states)
    assert not (first.path / "state" / "encoder-00000010.pt").exists()  # it would belong to no manifest
    first.claim("work")
    write(first.path / "records.jsonl", "measured")
    first.push("work")
    assert (there / "run" / "state" / "encoder-00000010.pt").is_file()
    first.pull("work")
    assert files(first.path) == files(there / "run")


def test_a_kill_between_sending_and_noting_it_loses_nothing(tmp_path: Path, there: Path) -> None:
    copy = copy_of(there, tmp_path / "a")
    save(copy.path, 10)
    copy.claim("work")
    copy.push("work")
    known = (copy.path / ".mirror" / "work.json").read_bytes()
    save(copy.path, 20, keep=1)
    copy.push("work")
    (copy.path / ".mirror" / "work.json").write_bytes(known)
    again = copy_of(there, tmp_path / "a")
    again.pull("work")
    again.push("work")
    assert is_whole(there / "run")
    assert files(there / "run") == files(copy.path)


def test_one_command_at_a_time(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEWED_S", 0.05)
    monkeypatch.setattr(lease_module, "WATCHED_S", 1.0)
    monkeypatch.setattr(lease_module, "LOOK_S", 0.05)
    remote, cut = Remote(f"local://{there}/run"), threading.Event()

    class Line(Remote):
        """The storage as seen by one whose network can be cut."""

        def read(self, name: str = "") -> bytes | None:
            if cut.is_set():
                raise Away("cut")
            return super().read(name)

    first = Lease(Line(remote.url))
    first.take()  # and nothing more: whatever its command does meanwhile, it is renewed
    with pytest.raises(InputError, match=f"another command is at work on this run, process {os.getpid()} on "):
        Lease(remote).take()
    cut.set()
    second = Lease(remote)  # the first is silent now
    second.take()
    cut.clear()
    assert not first.renew()
    first.release()  # it has lost it: the second's stays
    assert second.renew()
    second.release()
    assert not list((there / "run").iterdir())
    # A holder of this machine that is dead is not waited for.
    monkeypatch.setattr(lease_module, "WATCHED_S", 1000.0)
    held = {"id": "other", "host": socket.gethostname(), "pid": 2**22 + 1, "time": time.time()}
    write(there / "run" / ".lease.json", json.dumps(held))
    third = Lease(remote)
    third.take()
    third.release()


class Slow(Remote):
    """Takes a while for each object, fails now and then, and once it is `stuck` takes nothing more."""

    seconds, stuck, failing = 0.0, threading.Event(), list[bool]()

    def upload(self, name: str, file, size: int) -> None:
        if Slow.failing and Slow.failing.pop():
            raise Away("away for a moment")
        if Slow.stuck.is_set():
            raise Away("the line is cut")
        time.sleep(Slow.seconds)
        super().upload(name, file, size)


class Held:
    """A run that stays ours."""

    def renew(self) -> bool:
        return True


def pusher_of(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> Pusher:
    """One that sends nothing before it is finished."""
    monkeypatch.setattr(pusher_module, "EVERY_S", 1000.0)
    monkeypatch.setattr(Slow, "stuck", threading.Event())
    copy.claim("work")
    return Pusher(copy, Held(), {"work"}, lambda text: None)


def test_a_long_end_is_sent_while_it_gets_on(tmp_path: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copy_of(there, tmp_path / "a", Slow)
    monkeypatch.setattr(Slow, "seconds", 0.1)
    monkeypatch.setattr(Slow, "failing", [True, False, False, True, False, False, True])
    monkeypatch.setattr(pusher_module, "SLACK_S", 0.0)
    for n in range(10):  # one second, and three of waiting
        write(copy.path / "images" / f"{n}.png", "p" * n)
    pusher_of(copy, monkeypatch).finish(2)
    assert files(there / "run") == files(copy.path)


def test_a_stop_tells_what_the_storage_really_has(tmp_path: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copy_of(there, tmp_path / "a", Slow)
    pusher = pusher_of(copy, monkeypatch)
    for there_is in ("there is no state there", "the newest state there is state/encoder-00000010.pt"):

        def stop(pusher: Pusher = pusher) -> None:
            with finished(pusher):
                save(copy.path, 20)
                Slow.stuck.set()
                raise DiskFull("stopped at step 20, whose state is kept")

        monkeypatch.setenv("ARAE_STORAGE_WAIT", "0.1")
        with pytest.raises(DiskFull, match=r"^stopped at step 20, whose state is kept; but .*the line is cut") as error:
            stop()
        assert there_is in str(error.value)
        (copy.path / "state" / "encoder-00000020.pt").unlink()
        (copy.path / "state" / "manifest.json").unlink()
        save(copy.path, 10)
        pusher = pusher_of(copy, monkeypatch)
        pusher.now()


@pytest.fixture
def at_url(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs at a URL, a scratch folder of its own; the folder behind the URL."""
    monkeypatch.setenv("ARAE_RUNS", f"local://{there}")
    monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("ARAE_STORAGE_WAIT", "1")
    return there


def test_a_command_a_worker_elsewhere_and_a_reader(
    at_url: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(runs_root() / "tiny")
    said: list[str] = []
    monkeypatch.setattr(lease_module, "RENEWED_S", 0.05)
    with shared(folder, said.append) as place:
        write(folder.recipe, "name: tiny")
        with pytest.raises(InputError, match="another command is at work"):
            shared(folder, said.append).__enter__()
        with place.lent():
            write(folder.text, "said by the command while it trains")
            monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "node"))
            worker = RunFolder(runs_root() / "tiny")
            with mirrored(worker, writer=True):
                assert worker.recipe.read_text() == "name: tiny"
                save(worker.path, 10)
                write(worker.model / "encoder.safetensors", "weights")
                write(worker.model / "config.json", "{}")
                write(worker.log, "{}\n")
            with mirrored(RunFolder(tmp_path / "node" / "elsewhere"), writer=False):
                pass  # not in the folder of the runs: a path of its own
            monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "scratch"))
        assert (folder.model / "encoder.safetensors").read_text() == "weights"
        assert not list(folder.state.glob("*.pt"))
        write(folder.records, "measured")
    assert said == []
    assert not (at_url / "tiny" / ".lease.json").exists()
    assert files(at_url / "tiny") == files(worker.path) | {
        "records.jsonl": "measured",
        "log.txt": "said by the command while it trains",
    }
    monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "reader"))
    fetch_runs()
    assert sorted(files(runs_root() / "tiny")) == sorted(
        ["log.jsonl", "log.txt", "model/config.json", "recipe.yaml", "records.jsonl", "state/manifest.json"]
    )
    for name in ("tiny", f"local://{at_url}/tiny", runs_root() / "tiny", f"local://{at_url}/tiny/model"):
        path = fetched(name)
        assert path.is_relative_to(runs_root())
        assert (runs_root() / "tiny" / "model" / "encoder.safetensors").read_text() == "weights"
    assert fetched("nothing") == Path("nothing")
    monkeypatch.setenv("ARAE_RUNS", str(tmp_path / "local"))
    assert fetched(f"local://{at_url}/tiny") == working_root(f"local://{at_url}") / "tiny"  # a root of another's


@pytest.mark.parametrize("error", [Stopped("told to stop"), ValueError("unforeseen")])
def test_why_a_group_ended_reaches_the_storage(
    at_url: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = RunFolder(runs_root() / "tiny")

    def train() -> None:
        with shared(folder, lambda text: None) as place, ending(folder.log), place.lent():
            monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "node"))
            worker = RunFolder(runs_root() / "tiny")
            with mirrored(worker, writer=True):
                write(worker.log, '{"event": "interval"}\n')
                save(worker.path, 10)
            monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "scratch"))
            raise error

    with pytest.raises(type(error), match=f"^{error}$"):
        train()
    events = [json.loads(line) for line in (at_url / "tiny" / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["interval", "end"]
    assert events[-1]["reason"] == str(error)
    assert is_whole(at_url / "tiny")
    assert (at_url / "tiny" / "state" / "encoder-00000010.pt").is_file()


def begin(rank: int, folder: str) -> None:
    """One worker of a group, whose rank 0 has a disk that can't take the working copy."""
    root = Path(folder)
    os.environ.update(ARAE_RUNS=f"local://{root}/storage", ARAE_SCRATCH=f"{root}/scratch-{rank}")
    run = RunFolder(runs_root() / "tiny")
    if rank == 0:
        write(run.path / ".mirror", "no folder")  # any OSError
    try:
        mirrored(run, writer=rank == 0).__enter__()
    except Stopped as error:
        write(root / f"said-{rank}", str(error))


def test_a_disk_that_can_not_take_the_copy_ends_the_whole_group(tmp_path: Path, there: Path) -> None:
    write(there / "tiny" / "recipe.yaml", "name: tiny")
    spawn(2, tmp_path, begin, str(tmp_path))
    said = {(tmp_path / f"said-{rank}").read_text() for rank in range(2)}
    assert len(said) == 1
    assert re.search("scratch-0.*set ARAE_SCRATCH to a folder on another disk", said.pop())


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, DiskFull), (errno.EIO, Stopped)])
def test_a_full_disk_is_told_apart(
    at_url: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Stopped]
) -> None:
    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("arae.storage.copy.write_text", fails)
    for writer in (True, False):
        with pytest.raises(Stopped, match=os.strerror(code)) as error:
            mirrored(RunFolder(runs_root() / "tiny"), writer=writer).__enter__()
        assert type(error.value) is kind


def test_storage_that_never_takes_the_end_of_a_run(at_url: Path) -> None:
    folder = RunFolder(runs_root() / "tiny")
    said: list[str] = []

    def measure() -> None:
        with shared(folder, said.append):
            write(folder.records, "measured")
            (at_url / "tiny").rename(at_url / "away")
            (at_url / "tiny").write_text("no folder any more")

    with pytest.raises(Stopped, match="did not take the end of this run") as stopped:
        measure()
    assert str(folder.path) in str(stopped.value)
    assert "\n" not in str(stopped.value)
    (at_url / "tiny").unlink()
    (at_url / "away").rename(at_url / "tiny")
    with shared(folder, said.append):  # the same command there once the storage is back
        pass
    assert (at_url / "tiny" / "records.jsonl").read_text() == "measured"
