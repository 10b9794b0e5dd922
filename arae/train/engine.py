"""The engine: what differs between one process and many, and between precisions. Training is written against it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _SpectralNorm

from arae.config import EngineChoice
from arae.errors import InputError
from arae.precision import DTYPES, WEAKEST, resolve_precision
from arae.train.learner import Learner, MakeOptimizer, Plain

ASSEMBLE_S = 6 * 3600.0  # what takes longer to bring than this hangs
ASK_S = 0.05
Network = TypeVar("Network", bound=nn.Module)


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_share(micro_batches: int, workers: int, what: str, choice: EngineChoice | None = None) -> None:
    """InputError where a stage has fewer micro-batches than workers; `what` is `encoder` or `decoder`.

    From ZeRO's stage 2 on (`choice`: the recipe's engine) workers meet in every micro-batch, so their shares are even.
    """
    if choice and choice.kind == "deepspeed" and choice.stage > 1 and micro_batches % workers:
        raise InputError(
            f"engine.stage = {choice.stage}: {workers} workers can't share {micro_batches} micro-batch(es) a step "
            f"evenly; set {what}.micro_batch so that batch / micro_batch is a multiple of {workers}, or engine.stage=1"
        )
    if micro_batches < workers:
        raise InputError(
            f"{what}: {workers} workers can't share {micro_batches} micro-batch(es) a step; take --workers "
            f"{micro_batches}, or set {what}.micro_batch so that batch / micro_batch is {workers} or more"
        )


class Engine:
    """One worker's view of the group: its rank, its device, its precision."""

    def __init__(
        self, device: torch.device, precision: str, choice: EngineChoice | None = None, *, alone: bool = False
    ) -> None:
        """Join the process group where one is initialised, unless `alone`; `precision` and `choice` are a recipe's."""
        self.device = device
        self.choice = choice or EngineChoice()
        self.parallel = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.parallel else 0
        self.size = dist.get_world_size() if self.parallel else 1
        self.mixed = False
        """Whether the workers' devices would have chosen different precisions."""
        self._assembled = 0
        self.assemble()
        self.own = resolve_precision(precision, device)
        """What this worker's device would choose."""
        self.precision = self._agreed(self.own)
        self.dtype = DTYPES[self.precision]
        self.images_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        """What images, weights and losses are in; only the networks' inner work is in `dtype`."""
        self._begun, self._work, self._met = 0.0, 0.0, True
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _agreed(self, own: str) -> str:
        """The group's precision: that of its weakest device. Each step is one computation, on whatever it is made."""
        if self.size == 1 or own not in WEAKEST:
            return own
        found = torch.zeros(len(WEAKEST), device=self.device)
        found[WEAKEST.index(own)] = 1
        dist.all_reduce(found)
        present = [name for name, count in zip(WEAKEST, found.tolist(), strict=True) if count]
        self.mixed = len(present) > 1
        return present[0]

    def go_on_in(self, begun: str | None, wanted: str) -> None:
        """Keep to the precision that a stage was `begun` in, where `wanted` is auto and every worker has it.

        After a restart the group may be of other devices; what would be best for them now is not what was begun.
        """
        begun = self.told(begun)
        if begun is None or wanted != "auto" or begun not in WEAKEST:
            return
        lacks = begun != "fp32" and begun != self.own and not (begun == "fp16" and self.device.type == "cuda")
        if not self.any(lacks)[0]:
            self.precision, self.dtype = begun, DTYPES[begun]

    def place(self, module: Network) -> Network:
        """The module on the device, in the memory layout its convolutions are fastest in."""
        placed = module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return placed.double() if self.images_dtype == torch.float64 else placed

    def learner(self, module: nn.Module, make_optimizer: MakeOptimizer) -> Learner:
        """The network under training by the recipe's engine; `make_optimizer` gets its parameters."""
        if self.choice.kind == "deepspeed":
            from arae.train.zero import Zero

            return Zero(module, make_optimizer, self)
        return Plain(module, make_optimizer, self)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the group; itself in a group of one."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are ours to average (StepBuffers): broadcasting rank 0's would forget the others' batches.
        # Unused parameters are looked for though there are none: DDP would else put its buckets into another order
        # after the first step, a ring sums in the order of the bucket, and a run that goes on would lose its last bits.
        with warnings.catch_warnings():
            # torch 2.14 announces another name, which torch 2.11 does not have.
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            return DistributedDataParallel(
                module,
                device_ids=ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=True,
            )

    def autocast(self) -> AbstractContextManager[object]:
        """Low precision for the networks; losses and images stay in float32."""
        if self.dtype == self.images_dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for one optimiser; does nothing but in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def share(self, micro_batches: int, what: str) -> range:
        """Which micro-batches of a step are this worker's, as even as can be; InputError where there are too few."""
        check_share(micro_batches, self.size, what, self.choice)
        return range(self.rank * micro_batches // self.size, (self.rank + 1) * micro_batches // self.size)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the group, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest over the group, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Every worker's [k] as [workers, k]."""
        if self.size == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any worker's is up; every worker must call it."""
        if self.size == 1:
            return flags
        return tuple(bool(v) for v in self.largest(torch.tensor(flags, dtype=torch.float32, device=self.device)))

    def told(self, value: Any) -> Any:
        """Rank 0's value (tensors, numbers, text and what holds them), on every worker."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, device=self.device)
        return held[0]

    def assemble(self) -> None:
        """Wait for all workers, and for longer than a collective may: one of them may have to bring images first.

        Raises RuntimeError after ASSEMBLE_S seconds, or where the others are gone.
        """
        if self.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        self._assembled += 1
        key, until = f"arae/assembled/{self._assembled}", time.monotonic() + ASSEMBLE_S
        store.add(key, 1)
        while (there := store.add(key, 0)) < self.size:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"connection lost: {there} of {self.size} workers came in {ASSEMBLE_S / 3600:g} h; the others may "
                    "still be bringing their images: see to the storage that they lie on, or to ARAE_SCRATCH there"
                )
            time.sleep(ASK_S)

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.size > 1:
            dist.barrier()

    def begin(self) -> None:
        """A step begins: this worker's own work is counted from here."""
        self._met, self._begun = False, time.perf_counter()
        if self.device.type == "cuda":
            self._started = torch.cuda.Event(enable_timing=True)
            self._started.record()

    def meet(self) -> None:
        """The workers are about to meet, for the first time in a step: what came since `begin` was this one's own."""
        if self._met:
            return
        self._met = True
        if self.device.type == "cuda":
            met = torch.cuda.Event(enable_timing=True)
            met.record()
            self._events.append((self._started, met))
        else:
            self._work += time.perf_counter() - self._begun

    def work(self) -> float:
        """Seconds of this worker's own work since the last call: what makes one worker slower than the others."""
        seconds, events = self._work, self._events
        self._work, self._events = 0.0, []
        if events:
            events[-1][1].synchronize()
        return seconds + sum(started.elapsed_time(met) for started, met in events) / 1000


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

    def begin(self) -> None:
        """Remember the buffers as of the step's start."""
        self._start = [b.clone() for b in self.buffers]
        self._sum = [torch.zeros_like(b) for b in self.buffers]
        self._counts = [c + 1 for c in self._counters]  # a step counts once, however it is cut

    def keep(self) -> None:
        """Count what a micro-batch made of the buffers, and set them back for the next."""
        for buffer, start, total in zip(self.buffers, self._start, self._sum, strict=True):
            total += buffer
            buffer.copy_(start)

    def drop(self) -> None:
        """Set the buffers back to the step's start without counting the pass."""
        for buffer, start in zip(self.buffers, self._start, strict=True):
            buffer.copy_(start)

    def end(self, engine: Engine, share: float) -> None:
        """Leave the mean over the step's micro-batches and workers in the buffers.

        share: micro-batches of the step over workers, by which each worker's sum is divided before the mean of all.
        """
        if not self.buffers:
            return
        for counter, count in zip(self._counters, self._counts, strict=True):
            counter.copy_(count)
        flat = torch.cat([total.flatten() for total in self._sum]) / share
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
