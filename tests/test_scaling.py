"""The scaling record and its checks; the page and the records it rests on; the accounts of processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training import tiny_recipe

from arae.config import load_recipe
from benchmarks import harness, model
from benchmarks.collectives import Group
from benchmarks.processes import Account, Process, Watch, descendants
from benchmarks.scaled import Scaling, ScalingRun, StageRun, checks, efficiency, stage_run
from benchmarks.scaling import before, kept, scale, source


def stage(**changes: Any) -> StageRun:
    given = {"steps": 4, "batch": 32, "losses": (2.0, 1.5, 1.2), "images_per_s": 100.0, "work_s": (0.1, 0.1)}
    given |= {"step_s": 0.2, "wait_share": 0.01, "precision": "fp32", "device": "cpu"}
    return StageRun.model_validate(given | changes)


def record(*runs: tuple[str, int, StageRun], groups: tuple[Group, ...] = ()) -> Scaling:
    made = tuple(
        ScalingRun(kind=kind, workers=workers, hosts=("a",) * workers, stages={"encoder": one})
        for kind, workers, one in runs
    )
    return Scaling(recipe="name: x", digest="d", steps=4, runs=made, groups=groups, **source())


def failed(given: Scaling) -> list[str]:
    return [check.name for check in checks(given) if not check.passed]


ONE = ("strong", 1, stage(work_s=(0.1,)))


@pytest.mark.parametrize(
    ("second", "wrong"),
    [
        (stage(images_per_s=150.0), []),
        (stage(losses=(2.0, 1.5, 1.2 * 1.0009)), []),
        (stage(losses=(2.0, 1.5, 1.2 * 1.0011)), ["same numbers, encoder, 2 workers"]),
        (stage(losses=(2.0, 2.0, 2.0)), ["same numbers, encoder, 2 workers", "losses move, encoder, 2 workers"]),
        (stage(precision="bf16"), ["one precision"]),
        (stage(images_per_s=99.0), ["efficiency, strong, encoder, 2 workers"]),
        (stage(wait_share=0.11), ["waiting for the loader, strong, encoder, 2 workers"]),
        (stage(work_s=(0.1, 0.2)), ["stragglers, strong, encoder, 2 workers"]),
    ],
)
def test_a_check_fails_for_what_it_is_there_for(second: StageRun, wrong: list[str]) -> None:
    assert failed(record(ONE, ("strong", 2, second))) == wrong


def test_efficiency_is_of_perfect_scaling_whichever_the_fewest_workers_are() -> None:
    given = record(("weak", 2, stage(images_per_s=100.0)), ("weak", 8, stage(images_per_s=300.0, work_s=(0.1,) * 8)))
    assert efficiency(given, "weak", given.runs[1], "encoder") == 0.75
    assert failed(given) == ["efficiency, weak, encoder, 8 workers"]


@pytest.mark.parametrize(("nccl", "wrong"), [(2e9, []), (0.5e9, ["NCCL over gloo, 2 workers"])])
def test_a_nccl_that_is_slower_than_gloo_is_told(nccl: float, wrong: list[str]) -> None:
    timings = [
        {"backend": backend, "workers": 2, "bytes": size, "seconds": 1.0, "bus": bus}
        for backend, bus in (("nccl", nccl), ("gloo", 1e9))
        for size in (2**20, 2**28)
    ]
    places = [{"rank": rank, "host": "a", "device": "A100"} for rank in range(2)]
    group = Group.model_validate({"places": places, "timings": timings})
    assert failed(record(ONE, groups=(group,))) == wrong


def test_a_stage_is_read_from_its_log() -> None:
    def interval(step: int, rates: tuple[float, float], wait: float) -> dict[str, Any]:
        workers = [
            {"rank": r, "host": "a", "images_per_s": rates[r], "work_s": 0.1 + r, "wait_s": wait} for r in (1, 0)
        ]
        told = {"event": "interval", "stage": "encoder", "step": step, "steps": 10, "step_s": 0.5}
        return told | {"metrics": {"loss": 1 / step}, "images_per_s": sum(rates), "workers": workers}

    # The first fifth is warm-up; the median of what follows counts.
    events = [
        interval(1, (1, 1), 0.4),
        interval(4, (20, 20), 0.1),
        interval(7, (30, 30), 0.1),
        interval(10, (9, 9), 0.1),
    ]
    read = stage_run([{"event": "note"}, *events], "encoder", 32, {"precision": "fp32", "device": "cpu"})
    assert read.losses == (1.0, 1 / 4, 1 / 7, 1 / 10)
    assert (read.images_per_s, read.wait_share, read.work_s) == (40, 0.2, (0.1, 1.1))


def test_a_record_of_another_recipe_is_not_gone_on_with(tiny_npz: Path, tmp_path: Path) -> None:
    from arae.errors import InputError

    path, recipe = tmp_path / "record.json", tiny_recipe(tiny_npz)
    fresh = before(path, recipe, 4)
    kept(fresh, path)
    assert before(path, recipe, 4).digest == fresh.digest
    for other, steps in ((recipe.replace({"seed": 9}), 4), (recipe, 5)):
        with pytest.raises(InputError, match="another recipe's record"):
            before(path, other, steps)


def test_more_workers_than_micro_batches_are_refused_before_a_cluster_is_started(
    tiny_npz: Path, tmp_path: Path
) -> None:
    from arae.errors import InputError
    from arae.launch import Where

    with pytest.raises(InputError, match="a step has 2 micro-batches"):
        scale(tiny_recipe(tiny_npz), [1, 3], 4, Where(workers=1), tmp_path / "record.json")
    assert not (tmp_path / "record.json").exists()


def test_the_page_is_that_of_the_committed_records() -> None:
    text = model.PAGE.read_text()
    made = model.page(text, {each.name: each for each in harness.read()})
    assert text == made, "python -m benchmarks.model makes docs/scaling.md anew"


def test_what_was_counted_is_still_so() -> None:
    recipe = load_recipe("cifar10-resnet18")
    assert [one for one in model.stages() if one.recipe == recipe.name] == model.count(recipe)
    encoder, decoder = model.count(recipe)
    assert encoder.state == 2 * 4 * encoder.trained  # SGD's momentum beside the weights
    assert decoder.state == 3 * 4 * decoder.trained  # Adam's two


def test_a_process_that_is_gone_still_counts_and_a_number_that_comes_back_is_another_process() -> None:
    def told() -> Iterator[dict[int, Process]]:
        yield {1: Process(1, 0, 5, 1.0), 2: Process(2, 1, 6, 10.0)}
        yield {1: Process(1, 0, 5, 2.0)}
        yield {1: Process(1, 0, 5, 3.0), 2: Process(2, 1, 9, 0.5)}

    account, moments = Account(lambda pid, words: "all"), iter(range(3))
    with pytest.MonkeyPatch.context() as patch:
        states = told()
        patch.setattr("benchmarks.processes.running", lambda: next(states))
        patch.setattr("benchmarks.processes.time.time", lambda: float(next(moments)))
        patch.setattr("benchmarks.processes.command_line", lambda pid: "x")
        for _ in range(3):
            account.sample([1])
    assert [total["all"] for total in account.totals] == [11.0, 12.0, 13.5]
    assert account.between(0.5, 2.0) == {"all": 2.0}


def test_descendants_are_of_the_roots_alone() -> None:
    tree = {pid: Process(pid, parent, 0, 0.0) for pid, parent in ((2, 1), (3, 2), (4, 3), (5, 1), (6, 5))}
    assert descendants(tree, [2, 99]) == {2, 3, 4}


def test_what_a_child_burns_is_counted_under_it() -> None:
    """A real process with a child of its own: the child's work is seen, with the parent's own apart."""
    burn = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"]
    with subprocess.Popen(command, env=os.environ | {"BURN": "1"}) as process:
        kind = {True: "parent", False: "child"}
        with Watch(lambda pid, words: kind[pid == process.pid], lambda: [process.pid], 0.02) as watch:
            process.wait(60)
    totals = watch.account.totals[-1]
    assert totals["child"] > 0.3
    assert totals["parent"] < totals["child"]
