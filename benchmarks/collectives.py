"""How fast a group's workers add up gradients: `all_reduce` timed by size, by NCCL and by gloo where there are both."""

from __future__ import annotations

import socket
import time
from statistics import median
from typing import Any

import torch

from arae.config import Part
from arae.launch import Where

MIB = 2**20
SIZES = (1 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
WARM, TIMES = 2, 5


class Timing(Part):
    """One size by one backend."""

    backend: str
    workers: int
    bytes: int
    seconds: float
    """Median of the times of one `all_reduce`; each time that of the slowest worker."""
    bus: float
    """Bytes a second over the slowest link of a ring: 2 (n - 1) / n of the buffer in these seconds."""


class Place(Part):
    """Where a worker runs."""

    rank: int
    host: str
    device: str


class Group(Part):
    """What was measured in one group."""

    places: tuple[Place, ...]
    timings: tuple[Timing, ...]


def measure(where: Where, sizes: tuple[int, ...] = SIZES) -> Group:
    """Time the workers' `all_reduce` through Ray Train, where a training would run; Ray must be initialised."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.launch import wants_gpu

    gpu = wants_gpu(where, ray.cluster_resources(), alone=where.address is None)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"sizes": sizes},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=where.timeout),
        scaling_config=ScalingConfig(
            num_workers=where.workers or 1,
            use_gpu=gpu,
            resources_per_worker={"CPU": where.cpus or 1} | ({"GPU": 1} if gpu else {}),
            placement_strategy=where.placement.upper(),
        ),
        run_config=RunConfig(name=f"all-reduce-{time.time_ns():x}", storage_path="/tmp/arae-all-reduce"),
    )
    return Group.model_validate(trainer.fit().return_value)


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """Body of a worker: the same on all; what rank 0 returns counts."""
    import ray.train.torch
    from torch import distributed as dist

    device, size, rank = ray.train.torch.get_device(), dist.get_world_size(), dist.get_rank()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    places: list[Any] = [None] * size
    dist.all_gather_object(places, {"rank": rank, "host": socket.gethostname(), "device": name})
    groups: dict[str, tuple[Any, torch.device]] = {dist.get_backend(): (None, device)}
    if "nccl" in groups:
        groups["gloo"] = (dist.new_group(backend="gloo"), torch.device("cpu"))
    timings = []
    for backend, (group, where) in groups.items():
        for length in config["sizes"]:
            seconds = all_reduce_seconds(torch.ones(length // 4, device=where), group)
            bus = 2 * (size - 1) / size * length / seconds
            timings.append({"backend": backend, "workers": size, "bytes": length, "seconds": seconds, "bus": bus})
    return {"places": places, "timings": timings}


def all_reduce_seconds(buffer: torch.Tensor, group: Any) -> float:
    """Median seconds of an `all_reduce` of the buffer, of the slowest worker each time; every worker must call it."""
    from torch import distributed as dist

    taken = []
    for _ in range(WARM + TIMES):
        dist.barrier(group=group) if buffer.device.type == "cpu" else torch.cuda.synchronize(buffer.device)
        begun = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        if buffer.device.type == "cuda":
            torch.cuda.synchronize(buffer.device)
        slowest = torch.tensor([time.perf_counter() - begun], dtype=torch.float64, device=buffer.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        taken.append(slowest.item())
        buffer.fill_(1.0)  # sums of sums would overflow
    return median(taken[WARM:])
