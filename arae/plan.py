"""Cost before compute: what a recipe will take in parameters, FLOPs, memory, disk and hours.

Speed is measured, for a few seconds, on the device that would train; the rest is counted (`arae.cost`).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from arae.config import Recipe
from arae.cost import Network, Networks, Shape
from arae.data import beton, catalog
from arae.data.load import RESIDENT_BYTES, open_source
from arae.errors import InputError
from arae.footprint import evaluation_footprint, footprint
from arae.train.engine import Engine

SECONDS = 0.5  # a calibration batch is chosen to take at most about this long
_MANY_CLASSES = 1000  # where only the images' folders know their number


@dataclass(frozen=True)
class StagePlan:
    """One stage of one trip: `flops` an image, images `per_second` over all workers, `memory` in bytes a worker."""

    name: str
    images: int
    flops: int
    per_second: float
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def hours(self) -> float:
        """Wall time of the stage."""
        return self.images / self.per_second / 3600


@dataclass(frozen=True)
class Plan:
    """The whole estimate; `disk` is in bytes a run folder."""

    networks: tuple[Network, ...]
    stages: tuple[StagePlan, ...]
    disk: dict[str, int]
    assumptions: tuple[str, ...]

    @property
    def hours(self) -> float:
        """Wall time of all stages, one after the other."""
        return sum(stage.hours for stage in self.stages)

    def lines(self) -> list[str]:
        """The plan as text for a terminal, of at most 100 columns but for the closing remarks."""
        out = [f"{'network':<34}{'parameters':>14}{'FLOPs an image':>18}"]
        out += [f"{f'{n.role} {n.name}':<34}{n.parameters:>14,}{si(n.flops):>18}" for n in self.networks]
        out += ["", f"{'stage':<34}{'images':>14}{'FLOPs an image':>18}{'images/s':>12}{'time':>10}{'memory':>12}"]
        for stage in self.stages:
            speed, took = _rate(stage.per_second) if stage.images else "-", duration(stage.hours)
            row = f"{stage.name:<34}{stage.images:>14,}{si(stage.flops):>18}{speed:>12}{took:>10}"
            out.append(row + f"{binary(sum(stage.memory.values())):>12}")
        largest = max(self.stages, key=lambda stage: sum(stage.memory.values()))
        parts = ", ".join(f"{name} {binary(size)}" for name, size in largest.memory.items())
        out += [f"{'all':<78}{duration(self.hours):>10}", "", f"memory a worker, at most ({largest.name}): {parts}"]
        out.append("disk a run: " + ", ".join(f"{name} {binary(size)}" for name, size in self.disk.items()))
        return [*out, *(f"- {text}" for text in self.assumptions)]


def plan_recipe(recipe: Recipe, workers: int, device: torch.device) -> Plan:
    """The plan of a recipe for its own data: its files where they are there, else what the catalogue knows of the set.

    InputError: data that can't be counted, networks that do not fit it, batches that the workers can't share.
    """
    n_train, shape, classes, note = counted(recipe, "train")
    n_test = recipe.evaluate.n or counted(recipe, "test")[0]
    made = plan(recipe, n_train, shape, classes, workers, device, n_test=n_test)
    return replace(made, assumptions=(note, *made.assumptions))


def plan(
    recipe: Recipe,
    n_train: int,
    shape: Shape,
    num_classes: int,
    workers: int,
    device: torch.device,
    n_test: int = 0,
) -> Plan:
    """The plan for `n_train` images of shape (C, H, W), trained by `workers` processes on devices like this one.

    `n_test` images are evaluated. InputError as in `plan_recipe`.
    """
    refuse_unshared(recipe, workers)
    networks, engine = Networks(recipe, shape, num_classes), Engine(device, recipe.precision)
    # On a CPU the workers share its cores; workers beyond its cores are on other machines.
    threads = max(1, len(os.sched_getaffinity(0)) // workers) if device.type == "cpu" else None
    first = encoder_speed(networks, engine, threads)
    speeds = first, decoder_speed(networks, engine, threads) if networks.decoder else first
    resident = _resident(recipe, n_train, shape)
    stages: list[StagePlan] = []
    known: dict[tuple[str, bool], dict[str, int]] = {}
    for eps in recipe.map.radii if recipe.map else (recipe.encoder.attack.eps,):
        trip = recipe.replace({"encoder.attack.eps": eps, "map": None})
        found = stage_plans(trip, networks, n_train, n_test, workers, speeds)
        held = _memory(networks.following(trip), device, workers, n_test, known)
        stages += [replace(one, memory=memory) for one, memory in zip(found, held, strict=True)]
    stages = [replace(s, memory=s.memory | ({"images": resident} if resident else {})) for s in stages]
    each = f", {threads} thread{'s' * (threads > 1)} a worker" if threads else ""
    assumptions = (
        f"speed: encoder and decoder measured now on {device_name(device)} in {engine.precision}{each}; loading, "
        "augmentation and waiting for other workers come on top",
        f"time: in proportion to the workers (here {workers}), on a machine as busy as now; evaluation runs in one "
        "process, with every restart counted",
        "memory: the most that is held at once in a step, without data but as it would run; PyTorch itself, kernels' "
        "workspaces and what the allocator sets aside come on top",
    )
    return Plan(tuple(networks.listed()), tuple(stages), networks.disk(), assumptions)


def refuse_unshared(recipe: Recipe, workers: int) -> None:
    """InputError for batches that the workers can't share."""
    for name, part in (("encoder", recipe.encoder), ("decoder", recipe.decoder)):
        if part and (part.batch // part.micro) % workers:
            raise InputError(
                f"{name}: {part.batch // part.micro} micro-batches a step can't be shared by {workers} workers; set "
                f"{name}.micro_batch so that batch / micro_batch is a multiple of {workers}"
            )


def stage_plans(
    trip: Recipe, networks: Networks, n_train: int, n_test: int, workers: int, speeds: tuple[float, float]
) -> Iterator[StagePlan]:
    """The stages of one radius, and last the evaluation where there are images for it; their memory is left out.

    `speeds` in FLOP/s of a worker on the encoder and on the decoder.
    """
    part, eps = trip.encoder, trip.encoder.attack.eps
    flops, images = networks.encoder_step(part.attack), part.total_steps(n_train) * part.batch
    yield StagePlan(f"encoder, ε = {eps:.4g}", images, flops, workers * speeds[0] / flops)
    if trip.decoder:
        part = trip.decoder
        flops = networks.decoder_step(part.batch // part.micro // workers)
        images = part.total_steps(n_train) * part.batch
        yield StagePlan(f"decoder, ε = {eps:.4g}", images, flops, workers * speeds[1] / flops)
    if n_test:
        flops = networks.evaluation()
        yield StagePlan(f"evaluation, ε = {eps:.4g}", n_test, flops, speeds[0] / flops)


def _memory(
    networks: Networks, device: torch.device, workers: int, n_test: int, known: dict[tuple[str, bool], dict[str, int]]
) -> Iterator[dict[str, int]]:
    """Bytes that a worker holds in each of `stage_plans`; `known` keeps them, for radii take alike."""
    attacked = networks.recipe.encoder.attack.eps > 0
    wanted: list[tuple[str, Callable[[], dict[str, int]]]] = [
        ("encoder", lambda: footprint(networks, "encoder", device, workers))
    ]
    if networks.recipe.decoder:
        wanted.append(("decoder", lambda: footprint(networks, "decoder", device, workers)))
    if n_test:
        wanted.append(("evaluation", lambda: evaluation_footprint(networks, device)))
    for name, count in wanted:
        key = name, attacked and name == "encoder"
        if key not in known:
            known[key] = count()
        yield known[key]


def encoder_speed(networks: Networks, engine: Engine, threads: int | None, seconds: float = SECONDS) -> float:
    """FLOP/s of one worker, forward and backward, on the encoder; measured as `measured` does."""
    with _torch_threads(threads):
        most = networks.recipe.encoder.micro
        return measured(networks.encoder, networks.shape, most, engine, seconds) * networks.classify.to_weights


def decoder_speed(networks: Networks, engine: Engine, threads: int | None, seconds: float = SECONDS) -> float:
    """The same on the decoder, which there must be."""
    assert networks.decoder is not None
    assert networks.recipe.decoder is not None
    with _torch_threads(threads):
        most = networks.recipe.decoder.micro
        return measured(networks.decoder, networks.feature_shape, most, engine, seconds) * networks.generate.to_weights


def measured(network: nn.Module, shape: Shape, most: int, engine: Engine, aim: float = SECONDS) -> float:
    """Inputs a second through forward and backward, on the engine's device and in its precision; takes seconds.

    The batch has at most `most` inputs, and is chosen to take about `aim` seconds; the best of three counts
    (where four inputs take longer than half a second, one pass of four).
    """
    placed = engine.place(network).train()

    def seconds(n: int) -> float:
        x = torch.rand(n, *shape, device=engine.device)
        start = time.perf_counter()
        with engine.autocast():
            out = placed(x)
        out.float().square().mean().backward()
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        placed.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    few = min(4, most)
    seconds(few)  # the first pass also loads kernels
    took = seconds(few)
    batch = max(few, min(most, int(few * aim / took)))
    repeats = 3 if took < SECONDS else 1
    return batch / min(seconds(batch) for _ in range(repeats))


def counted(recipe: Recipe, split: str) -> tuple[int, Shape, int, str]:
    """Images, their shape, classes of a split (`train`, `test`), and where these numbers are from.

    InputError where neither the files nor the catalogue know.
    """
    data, key = recipe.data, f"data.{split}"
    named = data.train if split == "train" else data.test
    limit = data.limit if split == "train" else None
    known = catalog.DATASETS.get(data.name)
    path = Path(named) if named else None
    if path and path.suffix == ".npz" and path.is_file():
        source = open_source(data, "train" if split == "train" else "test", torch.device("cpu"))
        return source.n, source.shape, len(source.classes), f"data: {path}"
    file = beton.check(path, key) if path and path.is_file() else None
    n = file.n if file else known.splits.get(split) if known else None
    sides = file.constant_shape if file and not data.size else None
    size = data.size or (known.size if known else None)
    sides = sides or ((size, size) if size else None)
    if n is None or sides is None:
        raise InputError(
            f"{key}: {path or data.name} can't be counted yet; `arae encode` writes a file that can, then set {key}"
        )
    channels = data.channels or (file.channels if file else None) or (known.channels if known else 3)
    classes = len(file.classes) if file else len(known.classes or ()) if known else 0
    note = f"data: {path}" if file else f"data: {data.name} as the catalogue has it (no file yet)"
    note += "" if classes else f"; {_MANY_CLASSES} classes assumed"
    return min(n, limit or n), (channels, *sides), classes or _MANY_CLASSES, note


def _resident(recipe: Recipe, n: int, shape: Shape) -> int:
    """Bytes of the training images on the device, where the loader holds them there."""
    size, loader = n * shape[0] * shape[1] * shape[2], recipe.data.loader
    held = loader == "resident" or (loader == "auto" and size <= RESIDENT_BYTES and "crop" not in recipe.data.augment)
    return size if held else 0


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    """That many threads for torch, and afterwards as many as before; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"this {device.type.upper()} ({platform.machine()})"


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.2g}"


def si(number: float) -> str:
    """1234567 as `1.23 M`."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}".strip()
        number /= 1000
    return f"{number:.3g} P"


def binary(size: float) -> str:
    """Bytes as `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def duration(hours: float) -> str:
    """Hours in the unit that people would take."""
    seconds = 3600 * hours
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
