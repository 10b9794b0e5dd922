"""What is aimed at beside what was measured: rows, and the page that has them. No figure is judged here."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, peers, targets, time_to_robust
from benchmarks.harness import Comparison, Result
from benchmarks.targets import TARGETS, Target, limit, step_over, table, with_targets
from benchmarks.time_to_robust import RECIPES, Record, Run, behind, quickest
from benchmarks.time_to_robust import table as recipes


@pytest.mark.parametrize(
    ("values", "most", "shown"),
    [
        ([2.0, 3.0, 2.5], False, "| a | ≥ 2.4 | 2.50 (2.00 – 3.00), n = 3 | yes | CPU | `r` |"),
        ([2.0, 3.0, 2.3], False, "| a | ≥ 2.4 | 2.30 (2.00 – 3.00), n = 3 | no | CPU | `r` |"),
        ([2.5], True, "| a | ≤ 2.4 | 2.50 (2.50 – 2.50), n = 1 | no | CPU | `r` |"),
        ([2.3], True, "| a | ≤ 2.4 | 2.30 (2.30 – 2.30), n = 1 | yes | CPU | `r` |"),
        (None, False, "| a | ≥ 2.4 | not measured yet | - | - | `r` |"),
    ],
)
def test_a_row_says_whether_the_aim_is_met(
    values: list[float] | None, most: bool, shown: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_text('{"hardware": {"device": "CPU", "cores": 2}, "name": "r"}')
    monkeypatch.setattr(targets, "RESULTS", tmp_path)

    def measured() -> list[float]:
        if values is None:
            raise FileNotFoundError
        return values

    assert Target("a", "r", 2.4, measured, most).row() == shown


def test_the_page_has_the_table_of_the_committed_results() -> None:
    page = harness.README.read_text()
    assert with_targets(page) == page
    assert sum(line.startswith("| ") for line in table().splitlines()) == len(TARGETS) + 1
    with pytest.raises(AssertionError, match="targets:begin"):
        with_targets("no markers")


def run(recipe: str, seed: int, seconds: float, right: int) -> Run:
    """A run with so many of 80 images right: the first ones."""
    hits = np.arange(80) < right
    return Run(
        task="l2", recipe=recipe, seed=seed, seconds=seconds, steps=1, points=(), clean=0.9,
        right=np.packbits(hits).tobytes().hex(), went_back=False,
    )  # fmt: skip


def record(*runs: Run) -> Record:
    return Record(about="", recipes=RECIPES, common={}, runs=runs, git="", time="")


def test_the_quickest_recipe_is_one_that_is_as_robust() -> None:
    base = [run("PGD-7", 1, 100, 60), run("PGD-7", 2, 120, 60)]
    weak = [run("FGSM", 1, 10, 40), run("FGSM", 2, 10, 80)]  # as robust only in one of two
    good = [run("N-FGSM", 1, 40, 60), run("N-FGSM", 2, 30, 60)]
    assert quickest(record(*base), "l2") == [1.0, 1.0]
    assert quickest(record(*base, *good, run("PGD-2", 1, 10, 58)), "l2") == [0.4, 0.25]  # 2.5 points are too many
    assert quickest(record(*base, weak[0]), "l2") == [1.0, 1.0]  # one seed is not enough
    assert quickest(record(*base, *weak, *good), "l2") == pytest.approx([0.1, 10 / 120])
    assert quickest(record(), "l2") == []


def test_a_recipe_is_compared_with_the_base_of_its_seed() -> None:
    base = {1: run("PGD-7", 1, 100, 60), 2: run("PGD-7", 2, 100, 50)}
    assert behind([run("FGSM", 1, 1, 60), run("FGSM", 2, 1, 50)], base) == "-"
    gaps = np.array([np.arange(80) < 60, np.arange(80) < 50], float) - (np.arange(80) < 40)
    error = 1.96 * gaps.mean(0).std(ddof=1) / np.sqrt(80)
    wanted = f"{100 * gaps.mean():.2f} ± {100 * error:.2f}"
    assert behind([run("FGSM", 1, 1, 40), run("FGSM", 2, 1, 40)], base) == wanted
    lines = recipes(record(*base.values(), run("FGSM", 1, 25, 40), run("FGSM", 2, 50, 40)))
    assert lines[-1] == f"| l2 | FGSM | 38 | 0.38 (0.25 – 0.50) | 90.0 % | 50.0 % | {wanted} |"


def test_every_recipe_of_the_benchmark_is_a_recipe() -> None:
    for task, names in time_to_robust.RECIPES.items():
        for name in names:
            made = time_to_robust.recipe_of(task, name, 1, {"train": "a", "test": "b"})
            assert made.encoder.attack.norm == task


def test_what_limits_a_step_is_told_in_shares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = {"arae bf16": (2.0, 1.0, 4.0), "clean bf16": (0.5, 0.5, 0.5), "F + Bx bf16": (0.1, 0.2, 0.3)}
    made = Result.model_validate_json((harness.RESULTS / "pgd-alexnet.json").read_text())
    (tmp_path / "x.json").write_text(made.model_copy(update={"seconds": seconds}).model_dump_json())
    monkeypatch.setattr(targets, "RESULTS", tmp_path)
    assert [int(share) for share in re.findall(r"(\d+) %", limit("x"))] == [70, 25, 5]


@pytest.mark.parametrize(
    ("best", "shown"),
    [
        ("bf16", "| a | ≥ 2.4 | 3.00 (2.00 – 4.00), n = 3 | yes | AMD EPYC | `x` |"),
        ("fp32", "| a | ≥ 2.4 | 2.00 (1.00 – 2.00), n = 3, fp32: the processor has no bf16 | no | AMD EPYC | `x` |"),
    ],
)
def test_a_step_is_judged_in_the_precision_that_the_processor_is_good_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, best: str, shown: str
) -> None:
    seconds = {"peer": (4.0, 4.0, 6.0), "arae fp32": (4.0, 2.0, 3.0), "arae bf16": (2.0, 1.0, 2.0)}
    measured = {name: each for name, each in seconds.items() if best in name or "bf16" not in name}
    compared = tuple(
        Comparison(what=f"peer over {name}", slow="peer", fast=name) for name in measured if name != "peer"
    )
    made = Result.model_validate_json((harness.RESULTS / "pgd-alexnet.json").read_text())
    made = made.model_copy(update={"seconds": measured, "comparisons": compared})
    (tmp_path / "x.json").write_text(made.model_dump_json())
    monkeypatch.setattr(targets, "RESULTS", tmp_path)
    assert step_over("a", "x", 2.4, "peer").row() == shown
    (tmp_path / "x.json").write_text(made.model_copy(update={"notes": (peers.COPY,)}).model_dump_json())
    assert ", beside a copy of its code | " in step_over("a", "x", 2.4, "peer").row()
    assert step_over("a", "x", 2.4, "nobody").row() == "| a | ≥ 2.4 | not measured yet | - | - | `x` |"
    assert step_over("a", "y", 2.4, "peer").row() == "| a | ≥ 2.4 | not measured yet | - | - | `y` |"
