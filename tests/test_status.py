"""`arae status` and `arae runs`: how runs stand, from their folders alone."""

import fcntl
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from training import tiny_recipe

from arae import runs
from arae.config import Recipe
from arae.errors import InputError, Stopped
from arae.monitor.events import ending, read_events
from arae.monitor.status import Standing, all_runs, as_document, find_run, status_of
from arae.monitor.watching import ago, lines, table
from arae.runs import RunFolder, runs_root
from arae.storage import Away, Remote
from arae.train.run import train

NOW = 1_800_000_000.0
Event = dict[str, Any]


def at(age: float, kind: str, **fields: Any) -> Event:
    return {"event": kind, "time": NOW - age, **fields}


def interval(age: float, step: int, **fields: Any) -> Event:
    return at(age, "interval", stage="encoder", step=step, steps=100, epoch=1.0, metrics={"loss": 1.25}, **fields)


def worker(rank: int, work_s: float, images_per_s: float = 100.0) -> Event:
    return {"rank": rank, "host": f"h{rank}", "images_per_s": images_per_s, "work_s": work_s, "wait_s": 0.05}


STOPPED = at(5, "end", code=75, reason="stopped at step 40")
FAILED = at(5, "end", code=1, reason="out of memory")


def make_run(recipe: Recipe, *events: Event) -> RunFolder:
    folder = RunFolder.of(recipe)
    folder.create(recipe)
    folder.log.write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def export(folder: RunFolder, *stages: str) -> None:
    folder.model.mkdir()
    (folder.model / "config.json").write_text(json.dumps({stage: {} for stage in stages}))


def list_states(folder: RunFolder, *states: tuple[str, int, float | None]) -> None:
    folder.state.mkdir()
    entry = {"sha256": "", "bytes": 2**20, "digest": ""}
    listed = [entry | {"file": f"{s}-{n}.pt", "stage": s, "step": n, "score": score} for s, n, score in states]
    (folder.state / "manifest.json").write_text(json.dumps({"states": listed}))


# --- standing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "exported", "events", "standing"),
    [
        (False, (), [], "new"),
        (True, (), [], "running"),
        (True, (), [interval(5, 40)], "running"),
        (True, (), [interval(5000, 40)], "silent"),
        (True, (), [interval(4000, 30), interval(2000, 40)], "running"),  # long steps: no sign of a fault
        (True, ("encoder", "decoder"), [at(5, "stage", stage="decoder", state="finished")], "running"),
        (False, (), [interval(5, 40)], "killed"),
        (False, ("encoder",), [interval(5, 40)], "killed"),
        (False, (), [interval(9, 40), STOPPED], "stopped"),
        (False, (), [interval(9, 40), FAILED], "failed"),
        (False, (), [interval(9, 40), FAILED, interval(1, 50)], "killed"),
        (True, (), [interval(9, 40), FAILED, interval(1, 50)], "running"),
        (False, ("encoder", "decoder"), [at(5, "stage", stage="decoder", state="finished")], "finished"),
        (False, ("encoder", "decoder"), [FAILED], "finished"),
    ],
)
def test_a_run_stands_as_lock_log_and_weights_say(
    held: bool, exported: tuple[str, ...], events: list[Event], standing: Standing, tiny_npz: Path
) -> None:
    folder = make_run(tiny_recipe(tiny_npz), *events)
    if exported:
        export(folder, *exported)
    with folder.lock() if held else nullcontext():
        found = status_of(folder, now=NOW)
    assert found.standing == standing
    said = events[-1].get("reason") if events and not held else None
    assert found.why == said
    assert said is None or said in "\n".join(lines(found, NOW))
    with folder.lock():  # asking has left no lock behind
        pass


def test_a_run_at_a_url_runs_where_another_machine_holds_its_lease(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARAE_RUNS", f"local://{tmp_path}/storage")
    monkeypatch.setenv("ARAE_SCRATCH", str(tmp_path / "scratch"))
    folder = make_run(tiny_recipe(tiny_npz), interval(5, 40))
    lease = tmp_path / "storage" / folder.path.relative_to(runs_root()) / ".lease.json"
    lease.parent.mkdir(parents=True)
    held = {"id": "other", "host": "elsewhere", "pid": 1}
    cases = [(3, "running"), (100, "running"), (130, "killed")]
    for age, standing in cases:
        lease.write_text(json.dumps(held | {"time": NOW - age}))
        assert status_of(folder, now=NOW).standing == standing
    for broken in ("[]", "{", '{"time": "x"}'):
        lease.write_text(broken)
        assert status_of(folder, now=NOW).standing == "killed"

    def away(self: Remote, name: str = "") -> bytes:
        raise Away(f"{self.shown}: no answer")

    monkeypatch.setattr(Remote, "read", away)
    assert status_of(folder, now=NOW).standing == "killed"


def test_a_look_at_a_run_refuses_no_command_that_begins(tiny_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tiny_recipe(tiny_npz))
    slept: list[float] = []
    with (folder.path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as it is held while a status is asked for

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr(runs.time, "sleep", sleep)
        with folder.lock():
            assert len(slept) == 1


def test_a_run_without_a_decoder_is_finished_with_its_encoder(tiny_npz: Path) -> None:
    folder = make_run(tiny_recipe(tiny_npz, decoder=None), interval(5, 100))
    export(folder, "encoder")
    assert status_of(folder).standing == "finished"


# --- what is told -------------------------------------------------------------------------------------------------


def test_all_that_is_known_of_a_group_is_told(tiny_npz: Path) -> None:
    told = {"eta_s": 130.0, "images_per_s": 300.0, "step_s": 0.5, "saving_s": 0.0}
    reason = "worker 1 on h1 (pid 12) was killed by signal 9"
    folder = make_run(
        tiny_recipe(tiny_npz),
        at(99, "group", world_size=3, hosts=["h0", "h1", "h2"], device="cuda", precision="bf16", engine="ddp"),
        at(99, "stage", stage="encoder", state="started", steps=100),
        at(60, "state", stage="encoder", step=20, best=True, seconds=0.1),
        at(50, "epoch", stage="encoder", step=20, epoch=1, metrics={"loss": 2.0, "robust_accuracy": 0.5}),
        at(40, "restart", count=1, reason=reason, world_size=2, step=20),
        at(8, "state", stage="encoder", step=40, best=False, seconds=0.1),
        interval(5, 40, workers=[worker(0, 0.2), worker(1, 0.4), worker(2, 0.21)], **told),
    )
    list_states(folder, ("encoder", 20, 0.5), ("encoder", 40, 0.4))
    (folder.path / "mlflow.pending.jsonl").write_text('{"op": "tag"}\n{"op": "end"}\n')
    with folder.lock():
        found = status_of(folder, now=NOW)
    assert (found.stage, found.step, found.steps, found.fraction, found.eta_s) == ("encoder", 40, 100, 0.4, 130.0)
    assert (found.metrics, found.validation["robust_accuracy"], found.validation_step) == ({"loss": 1.25}, 0.5, 20)
    assert [one.is_straggler for one in found.workers] == [False, True, False]
    assert found.loader_wait == pytest.approx(0.1)
    assert found.newest_state
    assert found.best_state
    assert (found.newest_state.step, found.newest_state.age_s) == (40, 8.0)
    assert (found.best_state.step, found.best_state.age_s) == (20, 60.0)
    assert found.pending == 2
    text = "\n".join(lines(found, NOW))
    for part in (
        "running, last heard 5 s ago",
        "encoder step 40 of 100 (40 %), 2:10 left",
        "loss 1.25",
        "robust_accuracy 0.5  (step 20)",
        "300 images/s by 3 workers (100 each)  loader wait 10 %  slow: worker 1 on h1 (1.9×)",
        "1 on h1: 100 images/s, a step 0.4 s of own work and 0.05 s of waiting for the loader  SLOW, 1.9×",
        "3 workers on h0, h1, h2: cuda, bf16, ddp",
        "newest encoder step 40 (8 s ago), 1.0 MiB; best encoder step 20 (1:00 ago)",
        f"{reason}; goes on from step 20 by 2 workers",
        "2 operations not sent yet",
    ):
        assert part in text, text
    assert [line.split()[:5] for line in table([found], NOW)[1:]] == [["tiny", "running", "encoder", "40/100", "(40"]]
    document = json.loads(json.dumps(as_document(found)))
    assert document["stragglers"] == [1]
    assert document["standing"] == "running"


def test_logs_of_older_runs_are_read(tiny_npz: Path) -> None:
    old = interval(5, 40, images_per_s=840.0)
    folder = make_run(tiny_recipe(tiny_npz), at(9, "stage", stage="encoder", state="started"), old, {"event": "x"}, {})
    with folder.log.open("a") as file:
        file.write('{"event": "interval", "stage": "enc')  # torn by a kill
    found = status_of(folder, now=NOW)
    assert (found.step, found.images_per_s, found.workers, found.eta_s) == (40, 840.0, [], None)
    assert "840 images/s" in "\n".join(lines(found, NOW))


def test_a_stage_that_goes_on_keeps_what_is_known_of_it(tiny_npz: Path) -> None:
    started = [at(9, "stage", stage=stage, state="started", steps=100) for stage in ("encoder", "encoder", "decoder")]
    epoch = at(10, "epoch", stage="encoder", step=40, epoch=1, metrics={"robust_accuracy": 0.5})
    events = [started[0], interval(12, 40), epoch, started[1]]
    found = status_of(make_run(tiny_recipe(tiny_npz), *events))
    assert (found.stage, found.step, found.validation) == ("encoder", 40, {"robust_accuracy": 0.5})
    found = status_of(make_run(tiny_recipe(tiny_npz), *events, started[2]))
    assert (found.stage, found.step, found.validation, found.metrics) == ("decoder", 0, {}, {})


def test_numbers_that_are_none_are_null_in_json(tiny_npz: Path) -> None:
    folder = make_run(tiny_recipe(tiny_npz), interval(5, 40) | {"metrics": {"loss": float("nan")}})
    assert as_document(status_of(folder))["metrics"] == {"loss": None}


def test_of_many_restarts_the_newest_are_told(tiny_npz: Path) -> None:
    events = [at(100 - n, "restart", count=n, reason=f"reason {n}", world_size=2, step=n) for n in range(1, 31)]
    text = "\n".join(lines(status_of(make_run(tiny_recipe(tiny_npz), *events)), NOW))
    assert "restarts  30" in text
    assert [f"reason {n};" in text for n in (25, 26, 30)] == [False, True, True]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5, "5 s ago"),
        (130, "2:10 ago"),
        (90000, "25:00:00 ago"),
        (3e5, "3 days ago"),
        (-2, "0 s ago"),
        (None, "at an unknown time"),
    ],
)
def test_an_age_is_read_at_a_glance(seconds: float | None, text: str) -> None:
    assert ago(seconds) == text


# --- many runs ----------------------------------------------------------------------------------------------------


def test_every_run_is_listed_and_a_broken_one_hides_none(tiny_npz: Path) -> None:
    done = make_run(tiny_recipe(tiny_npz, name="demo/eps-1"), interval(5, 100))
    export(done, "encoder", "decoder")
    records = [
        {"metric": "psnr", "value": 23.5, "protocol": "reconstruction", "threat": None},
        {"metric": "psnr", "value": 13.5, "protocol": "reconstruction", "threat": {"eps": 1}},
        {"metric": "robust_accuracy", "value": 0.6, "protocol": "classification", "threat": {"eps": 1}},
        {"metric": "robust_accuracy", "value": 0.5, "protocol": "classification", "threat": {"eps": 2}},
        {"metric": "lpips", "value": None, "protocol": "reconstruction"},
    ]
    done.records.write_text("".join(json.dumps(record) + "\n" for record in records))
    make_run(tiny_recipe(tiny_npz, name="other"), interval(5, 40))
    broken = RunFolder(runs_root() / "broken")
    broken.path.mkdir()
    broken.recipe.write_text("encoder: [")
    copied = runs_root() / "mlartifacts" / "1"
    copied.mkdir(parents=True)
    (copied / "recipe.yaml").write_bytes(done.recipe.read_bytes())
    found = {one.name: one for one in all_runs()[0]}
    assert {name: one.standing for name, one in found.items()} == {
        "broken": "unreadable",
        "demo/eps-1": "finished",
        "other": "killed",
    }
    assert found["demo/eps-1"].main == {"psnr": 23.5, "robust_accuracy": 0.5}
    assert found["other"].main == {"loss": 1.25}
    heading, *rows = table(list(found.values()), NOW)
    assert len(rows) == 3
    assert heading.startswith("run ")
    assert "psnr 23.5  robust_accuracy 0.5" in rows[1]


BEGUN = {"event": "command", "state": "begun"}
ENDED = BEGUN | {"state": "ended"}


def trial(event: str, number: int, **fields: object) -> dict[str, object]:
    return {"event": event, "id": f"t{number}", **fields}


def finished(number: int) -> list[dict[str, object]]:
    return [trial("begin", number), trial("end", number, state="finished", reason=None)]


@pytest.mark.parametrize(
    ("book", "planned", "standing", "counts"),
    [
        ([BEGUN, *finished(0), *finished(1), ENDED], 2, "finished", "2 finished, of 2"),
        ([BEGUN, *finished(0), *finished(1), ENDED], None, "finished", "2 finished"),  # its hours were over
        ([BEGUN, *finished(0), ENDED], 2, "stopped", "1 finished, of 2"),
        ([BEGUN, *finished(0), trial("begin", 1), ENDED], None, "stopped", "1 finished, 1 begun"),
        ([BEGUN, *finished(0), trial("begin", 1)], 2, "killed", "1 finished, 1 begun, of 2"),
        (
            [BEGUN, *finished(0), trial("end", 1, state="stopped"), trial("end", 2, state="failed"), ENDED],
            3,
            "finished",
            "1 finished, 1 cut short, 1 failed, of 3",
        ),
        ([BEGUN], 2, "killed", ""),
        ([{"event": "end"}, {"no": "event"}, ENDED], 2, "stopped", ""),
    ],
)
def test_a_sweep_is_one_line_from_its_book(
    tiny_npz: Path, book: list[dict[str, object]], planned: int | None, standing: Standing, counts: str
) -> None:
    recipe = tiny_recipe(tiny_npz, name="sweep")
    folder = RunFolder.of(recipe)
    folder.create(recipe)
    folder.space.write_text("axes: {}")
    folder.trials.write_text("".join(json.dumps({"time": NOW - 60 + i} | line) + "\n" for i, line in enumerate(book)))
    (folder.path / "plan.json").write_text(json.dumps({"trials": planned}))
    for name in ("sweep/t0", "sweep/t1", "stages/encoder-1"):
        RunFolder(runs_root() / name).create(recipe)
    (one,), hidden = all_runs(every=False)
    assert (one.name, one.standing, hidden) == ("sweep", standing, 3)
    assert counts in table([one], NOW)[1]
    assert one.heard == NOW - 60 + len(book) - 1
    assert ("trials " in "".join(lines(one, NOW))) == bool(counts)
    states = {each.name: each.standing for each in all_runs()[0]}
    assert states["sweep/t0"] == ("finished" if finished(0)[1] in book else standing)
    with folder.lock():
        assert status_of(folder).standing == "running"
        assert status_of(RunFolder(folder.path / "t1")).standing in ("finished", "failed", "stopped")


def test_of_a_long_log_the_end_suffices(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(interval(0, step)) + "\n" for step in range(1000)))
    newest = [event["step"] for event in read_events(path, newest=2000)]
    assert newest[-1] == 999
    assert 5 < len(newest) < 20
    assert len(list(read_events(path))) == 1000
    assert list(read_events(tmp_path / "none")) == []


def test_a_run_is_found_by_path_and_by_name(tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tiny_recipe(tiny_npz, name="demo/eps-1"))
    monkeypatch.chdir(folder.path.parent)
    for run in (str(folder.path), "eps-1", "demo/eps-1"):
        assert find_run(run).path == folder.path
    with pytest.raises(InputError, match="`arae runs` lists them"):
        find_run(str(tmp_path))


# --- the word at the end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (Stopped("stopped\n at step 4"), 75, "stopped at step 4"),
        (InputError("no such file"), 2, "no such file"),
        (MemoryError(), 1, "MemoryError"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
    ],
)
def test_an_error_leaves_a_word_and_goes_on(error: BaseException, code: int, reason: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(type(error)), ending(log):
        raise error
    (event,) = read_events(log)
    assert (event["event"], event["code"], event["reason"]) == ("end", code, reason)
    with ending(log):
        pass
    assert len(list(read_events(log))) == 1
    with pytest.raises(type(error)), ending(tmp_path / "gone" / "log.jsonl"):
        raise error


# --- a real run ---------------------------------------------------------------------------------------------------


def test_a_training_is_seen_while_it_runs_and_after(tiny_npz: Path) -> None:
    torch.set_num_threads(1)  # two wait for one another, for long where the machine is busy
    recipe = tiny_recipe(tiny_npz, evaluate__looks=None)
    folder = RunFolder.of(recipe)
    folder.create(recipe)
    seen = []

    def look(event: Event) -> None:
        if event["event"] == "interval":
            seen.append(status_of(folder))

    with folder.lock():
        train(recipe, folder, torch.device("cpu"), look)
    assert [(one.standing, one.stage, one.step) for one in seen] == [
        ("running", stage, step) for stage in ("encoder", "decoder") for step in range(1, 8)
    ]
    middle = seen[5]
    assert middle.steps == 7
    assert middle.images_per_s
    assert middle.eta_s is not None
    assert middle.newest_state
    assert middle.newest_state.stage == "encoder"
    assert middle.newest_state.step == 3
    assert seen[-1].finished == ["encoder"]
    after = status_of(folder)
    assert (after.standing, after.finished) == ("finished", ["encoder", "decoder"])
    assert "psnr" in after.main


# --- commands -----------------------------------------------------------------------------------------------------

COMMANDS = """
import sys
from arae.cli import main
for words in (["status", "tiny", "--json"], ["runs"], ["status", "nothing"]):
    sys.argv = ["arae", *words]
    try:
        main()
    except SystemExit as ended:
        print(ended.code or 0)
print({"ray", "mlflow", "pyarrow", "deepspeed", "rich.progress"} & set(sys.modules))
"""


@pytest.mark.integration
def test_the_commands_need_neither_ray_nor_mlflow(tiny_npz: Path, tmp_path: Path) -> None:
    make_run(tiny_recipe(tiny_npz), interval(5, 40))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMANDS]
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=True)
    status, ended, heading, listed, *codes, heavy = told.stdout.splitlines()
    assert json.loads(status)["standing"] == "killed"
    assert heading.split()[0] == "run"
    assert listed.split()[:2] == ["tiny", "killed"]
    assert (ended, codes, heavy) == ("0", ["0", "2"], "set()")
    assert told.stderr.startswith("arae: nothing: no run folder")
