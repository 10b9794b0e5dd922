"""What is aimed at beside what was measured: a table made from the results, in `README.md` and after every run.

Each row is a ratio of one paired run on one machine, its median and range over the rounds, n, and the machine; of
accuracies it is a difference and its 95 % interval, and n photographs. A row whose result is not there says so.
`python -m benchmarks.targets` renews the page.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from pydantic import BaseModel

from arae.files import write_text
from benchmarks import account, crops, evaluate, harness, memory, peers, time_to_robust
from benchmarks.harness import RESULTS, Result, ratios

BEGIN, END = "<!-- targets:begin -->", "<!-- targets:end -->"
Ratios = list[float]


class Target(NamedTuple):
    """One aim."""

    what: str
    result: str
    """Whose figures it is judged by: a file of `results/`."""
    bound: float
    measured: Callable[[], Ratios]
    """The values; FileNotFoundError where there are none."""
    most: bool = False
    """Whether it is to be at most the bound, not at least."""
    n: int | None = None
    """Of what the values are an interval and its middle; default: they are so many rounds."""
    remark: Callable[[], str] = str
    """What is to be known of the values."""

    def row(self) -> str:
        """The row in Markdown."""
        aim = f"{'≤' if self.most else '≥'} {self.bound:.3g}"
        try:
            values = self.measured()
        except FileNotFoundError:
            return f"| {self.what} | {aim} | not measured yet | - | - | `{self.result}` |"
        middle = median(values)
        met = middle <= self.bound if self.most else middle >= self.bound
        found = f"{middle:.2f} ({min(values):.2f} – {max(values):.2f}), n = {self.n or len(values)}{self.remark()}"
        on = _Record.model_validate_json((RESULTS / f"{self.result}.json").read_text()).hardware.get("device", "?")
        return f"| {self.what} | {aim} | {found} | {'yes' if met else 'no'} | {on} | `{self.result}` |"


class _Record(BaseModel):
    """What any result says of the machine."""

    hardware: dict[str, str | int]


def _result(name: str) -> Result:
    return Result.model_validate_json((RESULTS / f"{name}.json").read_text())


def _precision(result: Result) -> str:
    """The lowest that a step was measured in."""
    return "bf16" if "arae bf16" in result.seconds else "fp32"


def _ratio(name: str, what: str) -> Callable[[], Ratios]:
    """Of a result's comparison."""

    def found() -> Ratios:
        result = _result(name)
        of_it = [ratios(result, each) for each in result.comparisons if each.what == what]
        if not of_it:  # the peer was not there
            raise FileNotFoundError
        return of_it[0]

    return found


def step_over(what: str, name: str, bound: float, peer: str) -> Target:
    """A peer's step as shipped over ours, in the best precision of the processor it was measured on."""

    def found() -> Ratios:
        return _ratio(name, f"{peer} over arae {_precision(_result(name))}")()

    def remark() -> str:
        result = _result(name)
        said = "" if _precision(result) == "bf16" else ", fp32: the processor has no bf16"
        return said + (", beside a copy of its code" if peers.COPY in result.notes else "")

    return Target(what, name, bound, found, remark=remark)


def _over_bound(name: str) -> Callable[[], Ratios]:
    """A PGD-7 step over its bound."""
    from benchmarks.step import above_bound

    def found() -> Ratios:
        result = _result(name)
        return above_bound(result, _precision(result))

    return found


def _cascade() -> Ratios:
    """The cascade's share of AutoAttack's evaluations, by network."""
    record = evaluate.Record.model_validate_json(evaluate.OUT.read_text())
    return [each.cascade.evaluations / each.autoattack.evaluations for each in record.networks]


def _time_to_robust() -> Ratios:
    """By seed, the share of PGD-7's time that the quickest recipe takes to its robust accuracy minus a point."""
    record = time_to_robust.Record.model_validate_json(time_to_robust.OUT.read_text())
    shares = time_to_robust.quickest(record, "l2")
    if not shares:
        raise FileNotFoundError
    return shares


def _memory() -> Ratios:
    """How far each prediction is off."""
    return memory.off(memory.Record.model_validate_json(memory.OUT.read_text()))


def _crops(view: str, mode: str) -> Callable[[], Ratios]:
    """Points of top-1 accuracy that our sets are above the folder."""

    def found() -> Ratios:
        return crops.interval(crops.Record.model_validate_json(crops.OUT.read_text()), view, mode)

    return found


TARGETS = (
    step_over("PGD-7 step, AlexNet 224 px, CPU: the reference library's as shipped over ours", "pgd-alexnet", 2.4,
              "robustness"),
    step_over("PGD-7 step, ResNet-18 32 px, CPU: same", "pgd-resnet18", 2.3, "robustness"),
    Target("PGD-7 step over 1 + K (F + Bx) / T, AlexNet", "pgd-alexnet", 1.08, _over_bound("pgd-alexnet"), most=True),
    Target("PGD-7 step over 1 + K (F + Bx) / T, ResNet-18", "pgd-resnet18", 1.08, _over_bound("pgd-resnet18"),
           most=True),
    step_over("Decoder step, conv5, CPU: the authors' over ours", "decoder-conv5", 2.8, "authors"),
    Target("Loading, CPU: ImageFolder + DataLoader over ours, jpg", "loading-folder", 4.0,
           _ratio("loading-folder", "ImageFolder over arae jpg")),
    Target("Loading, CPU: ImageFolder + DataLoader over ours, raw", "loading-folder", 10.0,
           _ratio("loading-folder", "ImageFolder over arae raw")),
    *(Target(f"Top-1 on {what} of our {mode} set minus that on the folder's, points", "crops/imagenet", -1.0,
             _crops(view, mode), n=500)
      for view, what in (("middle", "the middles"), ("random", "random crops")) for mode in crops.MODES),
    Target("Time to PGD-7's robust accuracy minus 1 point, share of PGD-7's", "time-to-robust/fashion-mnist", 1 / 3,
           _time_to_robust, most=True),
    Target("Peak memory of a step: by how much of it `plan` is off", "memory/steps", 0.15, _memory, most=True),
    Target("Evaluations of the cascade, share of AutoAttack's", "evaluate/fashion-mnist", 0.25, _cascade, most=True),
    step_over("PGD-7 step, AlexNet 224 px, GPU: the reference library's over ours", "pgd-alexnet-cuda", 4.0,
              "robustness"),
    step_over("PGD-7 step, ResNet-18 32 px, GPU: same", "pgd-resnet18-cuda", 4.0, "robustness"),
)  # fmt: skip


def table() -> str:
    """All of them in Markdown, and below what limits the steps, where that was looked at."""
    head = ["| What | Aim | Measured: median (range) | Met | On | Result |", "|---|---|---|---|---|---|"]
    lines = [*head, *(target.row() for target in TARGETS)]
    lines += ["", *(limit(name) for name in ("pgd-alexnet", "pgd-resnet18") if (RESULTS / f"{name}.json").is_file())]
    if accounts := account.read():
        lines += ["", "What a step's time goes to (`python -m benchmarks.account`):", ""]
        lines += [each.line() for each in accounts]
    return "\n".join(lines)


def limit(name: str) -> str:
    """What a PGD-7 step's time goes to, by the record's own parts."""
    from benchmarks.step import STEPS, parts

    result = _result(name)
    found = parts(result, _precision(result))
    # Medians of different variants: where nothing else takes time, what is left may be below zero.
    share = {key: f"{max(0.0, 100 * value / found['whole']):.0f} %" for key, value in found.items()}
    return (
        f"- `{name}`, a step of {1000 * found['whole']:,.0f} ms: the attack's {STEPS} passes through the network and "
        f"back to the images {share['passes']}, the step of the weights {share['clean']}, the rest {share['rest']}."
    )


def with_targets(page: str) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the page has no {BEGIN} … {END}"
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def renew() -> None:
    """Write the page anew, from the results as they are."""
    write_text(harness.README, with_targets(harness.with_tables(harness.README.read_text(), harness.read())))


if __name__ == "__main__":
    renew()
