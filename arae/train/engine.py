"""The engine: what differs between one process and many, and between precisions. Training is written against it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _SpectralNorm

from arae.errors import InputError

Network = TypeVar("Network", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bfloat16 (AVX-512 BF16 or AMX); False where that can't be told."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`auto` as bf16, fp16 or fp32 for this device; anything else as it is.

    InputError for fp16 on a CPU, where loss scaling has no kernels to win anything with.
    """
    if wanted == "fp16" and device.type != "cuda":
        raise InputError("precision = fp16 needs a GPU: write precision=bf16 or precision=fp32")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        # A V100 emulates bf16 and says so only when asked not to count that.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def check_share(micro_batches: int, workers: int, what: str) -> None:
    """InputError where a stage's micro-batches can't be shared evenly; `what` is `encoder` or `decoder`."""
    if micro_batches % workers:
        raise InputError(
            f"{what}: {workers} workers can't share {micro_batches} micro-batch(es) a step; "
            f"set {what}.micro_batch so that batch / micro_batch is a multiple of {workers}"
        )


class Engine:
    """One worker's view of the group: its rank, its device, its precision."""

    def __init__(self, device: torch.device, precision: str) -> None:
        """Join the process group where one is initialised; `precision` is a recipe's."""
        self.device = device
        self.precision = resolve_precision(precision, device)
        self.dtype = DTYPES[self.precision]
        self.parallel = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.parallel else 0
        self.size = dist.get_world_size() if self.parallel else 1

    def place(self, module: Network) -> Network:
        """The module on the device, in the memory layout its convolutions are fastest in."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the group; itself in a group of one."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are ours to average (StepBuffers): broadcasting rank 0's would forget the others' batches.
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)

    def autocast(self) -> AbstractContextManager[object]:
        """Low precision for the networks; losses and images stay in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for one optimiser; does nothing but in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Around a backward pass: the group talks only for the last micro-batch of a step."""
        if last or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return module.no_sync()

    def share(self, micro_batches: int, what: str) -> range:
        """Which micro-batches of a step are this worker's; InputError where they can't be shared evenly."""
        check_share(micro_batches, self.size, what)
        own = micro_batches // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the group, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, *, flag: bool) -> bool:
        """Whether any worker's flag is up; every worker must call it."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.size > 1:
            dist.barrier()


class StepBuffers:
    """Running statistics as a function of the step, not of who computed it.

    Batch norm's running mean and variance and spectral norm's vectors change with every forward pass, so their values
    would depend on how many micro-batches a worker has. Here each micro-batch of a step starts from the step's own
    buffers, and the step ends with the mean of what the micro-batches made of them, over all workers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.buffers = list(_running(module))
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._counters = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        self._counts: list[Tensor] = []
        self._start: list[Tensor] = []
        self._sum: list[Tensor] = []
        self._count = 0

    def begin(self) -> None:
        """Remember the buffers as of the step's start."""
        self._start = [b.clone() for b in self.buffers]
        self._sum = [torch.zeros_like(b) for b in self.buffers]
        self._count = 0
        self._counts = [c + 1 for c in self._counters]  # a step counts once, however it is cut

    def keep(self) -> None:
        """Count what a micro-batch made of the buffers, and set them back for the next."""
        for buffer, start, total in zip(self.buffers, self._start, self._sum, strict=True):
            total += buffer
            buffer.copy_(start)
        self._count += 1

    def drop(self) -> None:
        """Set the buffers back to the step's start without counting the pass."""
        for buffer, start in zip(self.buffers, self._start, strict=True):
            buffer.copy_(start)

    def end(self, engine: Engine) -> None:
        """Leave the mean over the step's micro-batches and workers in the buffers."""
        if not self.buffers:
            return
        for counter, count in zip(self._counters, self._counts, strict=True):
            counter.copy_(count)
        flat = torch.cat([total.flatten() for total in self._sum]) / self._count
        engine.mean(flat)
        for buffer, part in zip(self.buffers, flat.split([b.numel() for b in self.buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def _running(module: nn.Module) -> Iterable[Tensor]:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            assert part.running_var is not None
            yield from (part.running_mean, part.running_var)
        elif isinstance(part, _SpectralNorm):
            yield from (part._u, part._v)
