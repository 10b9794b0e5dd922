"""The benchmarks' harness: order, arithmetic, tables. Nothing is timed here."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import halving, harness, peers
from benchmarks.__main__ import APART, BENCHMARKS, chosen
from benchmarks.harness import Result, Seconds, interleaved, ratios, section, with_tables

PAGE = f"above\n{harness.BEGIN}\nold\n{harness.END}\nbelow\n"


def result(seconds: Mapping[str, Seconds], name: str = "one", **changes: object) -> Result:
    document = {
        "name": name,
        "about": "Something.",
        "images": 64,
        "warmup": 1,
        "seconds": seconds,
        "clock": "CPU seconds",
        "comparisons": [{"what": "A over B", "slow": "A", "fast": "B"}],
        "left_out": {},
        "hardware": {"device": "A CPU", "cores": 2, "torch_threads": 1},
        "versions": {"python": "3.11", "torch": "2"},
        "git": "abc",
        "time": "2026-01-01T00:00:00+00:00",
    }
    return Result.model_validate(document | changes)


def cells(table: str) -> dict[str, list[str]]:
    """Rows of the Markdown tables by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(("rounds", "warmup"), [(1, 0), (3, 1), (2, 2)])
def test_variants_take_turns_and_the_warm_up_is_not_counted(rounds: int, warmup: int) -> None:
    ran: list[str] = []
    ticks: Iterator[int] = iter(range(1, 100))

    def clock(work: harness.Work) -> float:
        work()
        return float(next(ticks))

    seconds = interleaved({"A": lambda: ran.append("A"), "B": lambda: ran.append("B")}, rounds, warmup, clock)
    assert ran == ["A", "B"] * (rounds + warmup)
    first = 2 * warmup + 1
    assert seconds["A"] == tuple(float(first + 2 * i) for i in range(rounds))
    assert seconds["B"] == tuple(float(first + 1 + 2 * i) for i in range(rounds))


def test_a_ratio_is_that_of_a_round() -> None:
    # Medians of the times are equal, every round differs: a ratio of medians would say 1.
    given = result({"A": (2.0, 4.0, 9.0), "B": (4.0, 1.0, 6.0)})
    assert ratios(given, given.comparisons[0]) == [0.5, 4.0, 1.5]
    assert cells(section(given))["A over B"] == ["1.50 (0.50 – 4.00)"]


def test_rounds_that_do_not_pair_are_refused() -> None:
    given = result({"A": (1.0, 2.0), "B": (1.0,)})
    with pytest.raises(ValueError, match="zip"):
        ratios(given, given.comparisons[0])


@pytest.mark.parametrize("clock", [harness.cpu_clock, pytest.param(harness.cuda_clock, marks=pytest.mark.gpu)])
def test_a_clock_runs_the_work_once(clock: harness.Clock) -> None:
    ran: list[int] = []
    assert clock(lambda: ran.append(sum(range(10_000)))) > 0
    assert len(ran) == 1


def test_threads_are_put_back_and_the_hardware_says_what_was_used() -> None:
    torch.set_num_threads(2)
    seen: list[int] = []
    made = harness.measure(
        "x",
        "Something.",
        {"A": lambda: (seen.append(torch.get_num_threads()), sum(range(10_000)))},
        [],
        images=1,
        rounds=1,
        warmup=1,
        device=torch.device("cpu"),
    )
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2
    assert made.hardware["torch_threads"] == 1
    assert made.hardware["device"]
    assert len(made.seconds["A"]) == 1


def test_the_tables_say_what_the_json_says(tmp_path: Path) -> None:
    given = result({"A": (0.5, 0.25, 1.0), "B": (0.001, 0.002, 0.0042)}, left_out={"C": "no C here"})
    harness.write(given, tmp_path)
    (read,) = harness.read(tmp_path)
    assert read == given
    page = with_tables(PAGE, [read])
    rows = cells(page)
    assert rows["A"] == ["500 (250 – 1,000)", "128"]
    assert rows["B"] == ["2.00 (1.00 – 4.20)", "32,000"]
    for said in ("n = 3 interleaved rounds after 1 of warm-up", "C: no C here", "A CPU, 2 cores", "torch 2", "`abc`"):
        assert said in page


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0999, "99.9"), (0.1, "100"), (1.2345, "1,230"), (12.345, "12,300"), (0.001, "1.00"), (0.00001234, "0.0123")],
)
def test_times_have_three_digits(seconds: float, shown: str) -> None:
    page = section(result({"A": (seconds,), "B": (1.0,)}))
    assert cells(page)["A"][0] == f"{shown} ({shown} – {shown})"


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    given = [result({"A": (1.0,), "B": (1.0,)}, name) for name in ("one", "two")]
    page = with_tables(PAGE, given)
    assert page.startswith("above\n")
    assert page.endswith("\nbelow\n")
    assert "old" not in page
    assert re.findall("### (.*)", page) == ["one", "two"]
    assert with_tables(page, given) == page
    with pytest.raises(AssertionError, match="results:begin"):
        with_tables("no markers", given)


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        ([], [name for name in BENCHMARKS if name not in APART]),
        (["loading"], ["loading"]),
        (["step"], ["pgd-alexnet", "pgd-resnet18", "encoder-small"]),
        (["loader"], ["loading", "loading-photographs", "loading-folder"]),
        (["decoder", "step"], ["pgd-alexnet", "pgd-resnet18", "encoder-small", "decoder"]),
    ],
)
def test_names_choose(names: list[str], meant: list[str]) -> None:
    assert chosen(names) == meant


@pytest.mark.integration
def test_an_unknown_name_is_refused(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "lodaing"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "lodaing: no such benchmark; there are pgd-alexnet" in done.stderr


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    results = harness.read()
    assert results, "no results are kept"
    assert {each.name.removesuffix("-cuda") for each in results} <= set(BENCHMARKS)
    assert all(set(c) <= set(each.seconds) for each in results for c in [{x.slow, x.fast} for x in each.comparisons])
    page = harness.README.read_text()
    assert page == with_tables(page, results)


@pytest.mark.parametrize(
    ("name", "what", "bound"),
    [
        ("overhead", "full over bare", 1.03),
        ("outage", "stopped over answers", 1.05),
        ("outage", "hung over answers", 1.05),
    ],
)
def test_records_that_are_kept_hold_what_is_promised(name: str, what: str, bound: float) -> None:
    (record,) = [result for result in harness.read() if result.name == name]
    (compared,) = [comparison for comparison in record.comparisons if comparison.what == what]
    assert median(ratios(record, compared)) <= bound


def test_early_stopping_finds_the_front_for_less() -> None:
    kept = halving.Halving.model_validate_json(halving.OUT.read_text())
    assert len({pair.seed for pair in kept.pairs}) == len(kept.pairs) >= 3
    assert kept.kept
    for pair in kept.pairs:
        assert pair.full.finished == len(pair.full.points) == 24
        assert pair.halved.finished == len(pair.halved.points) < 24


def test_a_peer_is_the_clone_at_its_commit_or_is_told_not_to_be(tmp_path: Path, repository: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    (tmp_path / "a.py").write_text("1\n")
    assert peers.commit_of(tmp_path) == ""  # also below another checkout
    git("init", "-q")
    assert peers.commit_of(tmp_path) == ""
    git("add", "a.py")
    git("commit", "-qm", "a")
    assert peers.commit_of(tmp_path) == git("rev-parse", "HEAD").strip()
    (tmp_path / "a.py").write_text("2\n")
    assert peers.commit_of(tmp_path) == ""
    assert f"checkout -q {peers.COMMIT}" in (repository / "Makefile").read_text()
