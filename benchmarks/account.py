"""An account of one training step: what its time is spent on, kind by kind, for the steps that a target is about.

Measured: one whole step of `step` and `decoder` in the device's best precision, as those make it: the median of three
after one of warm-up, and in three more under PyTorch's profiler the time of each kernel. On a CPU a step's time is CPU
seconds, with one thread; the shares are of what the profiled steps took by the clock on the wall, which is the
kernels' clock, and what no kernel takes is Python, PyTorch's dispatch and the profiler. On a GPU all is by the device's
clock, the shares are of the step without the profiler, and what no kernel takes is waiting for a launch.

`python -m benchmarks.account` writes `results/account/NAME.json`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from arae.config import Part
from arae.files import write_text
from arae.train.engine import default_device
from benchmarks import decoder, step
from benchmarks.harness import RESULTS, Made, Work, cpu_clock, cuda_clock, here

OUT = RESULTS / "account"
STEPS = 3
ON_CPU = {
    "convolutions": r"conv",
    "matrix products": r"addmm|aten::(mm|bmm|addr|mv|dot|linear|baddbmm)|mkldnn_linear",
    "normalisation": r"(batch|layer|group)_norm",
    "pooling": r"pool",
    "copies": r"copy|clone|::cat$|fill|zero|contiguous|::(constant_)?pad",
    "optimiser": r"foreach|fused|lerp|addcdiv|addcmul",
    "other arithmetic": r"aten::",
}
ON_GPU = {
    "convolutions and matrix products": r"gemm|conv(?!ert)|xmma|cutlass|wgrad|dgrad|fprop|cublas|winograd",
    "normalisation": r"(batch|layer|group)_?norm|bn_",
    "pooling": r"pool",
    "copies": r"memcpy|memset|copy|catarray|nchwto|nhwcto|converttensor|transpose|fill",
    "optimiser": r"multi_tensor|foreach|fused",
    "other arithmetic": r"",
}
VIEWS = (
    r"aten::(empty|view|_unsafe_view|as_strided|permute|transpose|t|flatten|reshape|detach|expand|unsqueeze|squeeze|"
    r"slice|select|narrow|split|chunk|alias|_reshape_alias|resize_|set_|result_type|empty_like|empty_strided)$"
)
"""No arithmetic: dispatch alone."""
REST = {"cpu": "Python and dispatch", "cuda": "waiting for launches"}


class Account(Made):
    """What `results/account/NAME.json` holds."""

    name: str
    precision: str
    seconds: float
    """A step's."""
    shares: dict[str, float]
    """Of the time that the kernels were timed in (see above), by kind; they sum to 1."""

    def line(self) -> str:
        """In words."""
        parts = sorted(self.shares.items(), key=lambda item: -item[1])
        told = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in parts if share >= 0.005)
        where = f"{self.hardware.get('device', '?')}, {self.precision}"
        return f"- `{self.name}`, a step of {1000 * self.seconds:,.0f} ms on {where}: {told}."


class Timed(Part):
    """A kernel."""

    name: str
    seconds: float


def shares(kernels: Sequence[Timed], seconds: float, kinds: dict[str, str], rest: str) -> dict[str, float]:
    """Of a step of `seconds`, the share of each kind (the first whose pattern is in a kernel's name) and of what is
    left. Where the kernels take longer than that, they are the whole."""
    found = dict.fromkeys(kinds, 0.0)
    for kernel in kernels:
        kind = next((kind for kind, pattern in kinds.items() if re.search(pattern, kernel.name.lower())), None)
        if kind:
            found[kind] += kernel.seconds
    whole = max(seconds, sum(found.values()))
    found[rest] = whole - sum(found.values())
    return {kind: value / whole for kind, value in found.items()}


def account(name: str, precision: str, work: Work, device: torch.device) -> Account:
    """Of one step."""
    gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if gpu else 1)
    try:
        work()
        seconds = median((cuda_clock if gpu else cpu_clock)(work) for _ in range(STEPS))
        kernels, profiled = kernels_of(work, gpu=gpu)
        made = here(device)
    finally:
        torch.set_num_threads(threads)
    found = shares(kernels, seconds if gpu else profiled, ON_GPU if gpu else ON_CPU, REST[device.type])
    return Account(name=f"{name}-cuda" if gpu else name, precision=precision, seconds=seconds, shares=found, **made)


def kernels_of(work: Work, *, gpu: bool) -> tuple[list[Timed], float]:
    """The kernels of a step, each with its own time, and what the step took by the clock on the wall meanwhile."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as told:
        start = time.perf_counter()
        for _ in range(STEPS):
            work()
        if gpu:
            torch.cuda.synchronize()
        took = (time.perf_counter() - start) / STEPS
    of_device = "CUDA" if gpu else "CPU"
    found = []
    for one in told.key_averages():
        own = one.self_device_time_total if gpu else one.self_cpu_time_total
        if one.device_type.name != of_device or one.is_user_annotation:  # those span what has been counted
            continue
        if gpu or (one.key.startswith("aten::") and not re.match(VIEWS, one.key)):
            found.append(Timed(name=one.key, seconds=own / 1e6 / STEPS))
    return found, took


def steps(device: torch.device) -> dict[str, Callable[[str], Work]]:
    """By name, what makes a step of a precision."""

    def encoder(case: step.Case) -> Callable[[str], Work]:
        batch = case.gpu_batch if device.type == "cuda" else case.batch
        return lambda precision: step.stepper(step.recipe(case, batch, precision), case, batch, device)

    batch = 128 if device.type == "cuda" else step.ALEXNET.batch
    return {
        "pgd-alexnet": encoder(step.ALEXNET),
        "pgd-resnet18": encoder(step.RESNET),
        "decoder-conv5": lambda precision: decoder.stepper(precision, device, step.ALEXNET, "alexnet-conv5", batch),
    }


def read() -> list[Account]:
    """All there are."""
    return [Account.model_validate_json(path.read_text()) for path in sorted(OUT.glob("*.json"))]


def main() -> None:
    """Make them."""
    device = default_device()
    precision = step.precisions_of(device)[-1]
    for name, maker in steps(device).items():
        made = account(name, precision, maker(precision), device)
        OUT.mkdir(parents=True, exist_ok=True)
        write_text(OUT / f"{made.name}.json", made.model_dump_json(indent=1) + "\n")
        print(made.line(), flush=True)


if __name__ == "__main__":
    main()
