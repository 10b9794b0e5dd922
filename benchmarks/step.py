"""The training step of an encoder: PGD-7's against the reference library's, against its own bound, and what saves what.

Measured: one whole optimiser step (attack, forward, backward, update) on images already on the device, without loading.
- `pgd-alexnet` AlexNet, 3 × 224 × 224, 1,000 classes, l2 3, steps of 0.5, n = 3 rounds.
- `pgd-resnet18` ResNet-18 for 32 px, 10 classes, l2 0.5, steps of 0.1, n = 5 rounds.
  Batch 16 on a CPU, 256 on a GPU. Both against MadryLab/robustness' own step of its own network (`peers.txt`), as
  shipped, and with what anyone can set about it: autocast. (Channels-last it can't be had in: its
  l2 step fails on such gradients.) The bound is 1 + K (F + Bx) / T: T a clean step, F a forward pass and Bx the
  gradient in the images, both of the network that the attack sees.
- `encoder-small` small-cnn, 1 × 28 × 28, batch 64, l2 0.5, n = 7 rounds: the demo's network.
Warm-up: 1 round. The images are noise: no time here depends on what they show. bf16 is left out on a processor without
bf16 instructions, where it is emulated and nobody would train with it.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arae.attacks.gradient import ascent
from arae.attacks.network import AttackNetwork
from arae.config import Recipe
from arae.models import create_encoder
from arae.models.taps import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD
from arae.precision import DTYPES, resolve_precision
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro
from arae.train.stage import Trainer
from benchmarks import peers
from benchmarks.harness import Comparison, Result, Work, measure

TOTAL = 1000  # steps of the schedule; the rate is constant
STEPS = 7
NO_BF16 = "this processor has no bf16 instructions"

Shape = tuple[int, int, int]


class Case(NamedTuple):
    """A network, its images and its attack."""

    name: str
    network: str
    shape: Shape
    classes: int
    attack: dict[str, float]
    rounds: int
    batch: int
    """On a CPU."""
    gpu_batch: int
    peer: str = ""
    """The library's network of the same name, and where it lies."""
    statistics: tuple[Any, Any] = ((), ())


ALEXNET = Case(
    "pgd-alexnet", "alexnet", (3, 224, 224), 1000, {"eps": 3.0, "step_size": 0.5}, 3, 16, 256,
    "imagenet_models.alexnet", (IMAGENET_MEAN, IMAGENET_STD),
)  # fmt: skip
RESNET = Case(
    "pgd-resnet18", "resnet18-cifar", (3, 32, 32), 10, {"eps": 0.5, "step_size": 0.1}, 5, 16, 256,
    "cifar_models.ResNet18", (CIFAR_MEAN, CIFAR_STD),
)  # fmt: skip
SMALL = Case("encoder-small", "small-cnn", (1, 28, 28), 10, {"eps": 0.5, "step_size": 0.125}, 7, 64, 64)


def pgd_alexnet(device: torch.device) -> Result:
    """The paper's network."""
    return encoder(ALEXNET, device)


def pgd_resnet18(device: torch.device) -> Result:
    """CIFAR-10's network."""
    return encoder(RESNET, device)


def encoder_small(device: torch.device) -> Result:
    """The demo's network."""
    return encoder(SMALL, device)


def encoder(case: Case, device: torch.device) -> Result:
    """The case's steps, in the precisions of the device; the peer's, where it has one and it is there."""
    batch, precisions = case.gpu_batch if device.type == "cuda" else case.batch, precisions_of(device)
    best = precisions[-1]
    variants, left_out = reference(case, batch, device, best)
    theirs = list(variants)
    if "bf16" not in precisions:
        left_out["bf16"] = NO_BF16
    for precision in precisions:
        for name, quick in (("", True), (", the network itself attacked", False)):
            made = recipe(case, batch, precision, quick=quick)
            variants[f"arae {precision}{name}"] = stepper(made, case, batch, device)
    variants[f"clean {best}"] = stepper(recipe(case, batch, best, clean=True), case, batch, device)
    forward, gradient = passes(case, batch, device, DTYPES[best])
    variants |= {f"F {best}": forward, f"F + Bx {best}": gradient}
    ours = f"arae {best}"
    compared = [Comparison(what=f"{name} over {ours}", slow=name, fast=ours) for name in theirs]
    for p in precisions:
        itself = f"arae {p}, the network itself attacked"
        compared.append(Comparison(what=f"network itself over its copy, {p}", slow=itself, fast=f"arae {p}"))
    compared.append(Comparison(what=f"PGD-7 over clean, {best}", slow=ours, fast=f"clean {best}"))
    compared += low_precision("arae ", precisions)
    about = (
        f"One PGD-{STEPS} training step of {case.network} on {batch} images of {written(case.shape)}; l2, eps "
        f"{case.attack['eps']:g}."
    )
    result = measure(
        case.name,
        about,
        variants,
        compared,
        images=batch,
        rounds=case.rounds,
        warmup=1,
        device=device,
        left_out=left_out,
    )
    over = above_bound(result, best)
    note = (
        f"The step takes {median(over):.2f} ({min(over):.2f} – {max(over):.2f}) times its bound, 1 + {STEPS} (F + Bx) "
        "over a clean step."
    )
    return result.model_copy(update={"notes": (note,), "numbers": {"over_bound_ratio": median(over)}})


def above_bound(result: Result, precision: str) -> list[float]:
    """Of each round, the step's time over that of a clean step and K forward passes and input gradients."""
    kinds = (f"arae {precision}", f"clean {precision}", f"F + Bx {precision}")
    rounds = zip(*(result.seconds[kind] for kind in kinds), strict=True)
    return [step / (clean + STEPS * both) for step, clean, both in rounds]


def parts(result: Result, precision: str) -> dict[str, float]:
    """Seconds that a PGD step of the record takes (its medians): the whole, and what of it which part does."""
    whole, clean, both = (median(result.seconds[f"{kind} {precision}"]) for kind in ("arae", "clean", "F + Bx"))
    return {"whole": whole, "passes": STEPS * both, "clean": clean, "rest": whole - STEPS * both - clean}


def reference(case: Case, batch: int, device: torch.device, precision: str) -> tuple[dict[str, Work], dict[str, str]]:
    """The library's step as shipped and with the easy settings; or why it is left out."""
    if not case.peer:
        return {}, {}
    library: Any = peers.robustness()
    if library is None:
        return {}, {"robustness": peers.MISSING}
    family, _, name = case.peer.partition(".")
    make = getattr(getattr(library, family), name)
    attack = {"constraint": "2", "eps": case.attack["eps"], "step_size": case.attack["step_size"], "iterations": STEPS}
    images, labels = noise(case, batch, device)
    variants: dict[str, Work] = {}
    for settings in ("", ", autocast") if precision != "fp32" else ("",):
        torch.manual_seed(0)
        net = make(num_classes=case.classes)
        cast = partial(torch.autocast, device.type, dtype=DTYPES[precision], enabled=bool(settings))
        work = peers.reference_step(library, net.to(device), case.statistics, attack, images, labels, cast)
        variants[f"robustness{settings}"] = work
    return variants, {}


def passes(case: Case, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Work, Work]:
    """A forward pass of the network that the attack sees, and one with the gradient in the images."""
    torch.manual_seed(0)
    engine = Engine(device, "fp32")
    model = engine.place(create_encoder(case.network, case.classes, case.shape[0], case.shape[1]))
    network = AttackNetwork(model)
    network.refresh(dtype)
    images, labels = noise(case, batch, device)
    images = images.to(memory_format=torch.channels_last)

    def losses(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    @torch.no_grad()
    def forward() -> Tensor:
        return network(images)

    return forward, lambda: ascent(network, images, losses)


def recipe(case: Case, batch: int, precision: str, *, quick: bool = True, clean: bool = False) -> Recipe:
    """A recipe for a single step."""
    attack = {} if clean else {"norm": "l2", "steps": STEPS, **case.attack}
    document: dict[str, Any] = {
        "name": "bench",
        "precision": precision,
        "data": {},
        "encoder": {
            "name": case.network,
            "steps": TOTAL,
            "batch": batch,
            "lr": 0.01,
            "weight_decay": 5e-4,
            "attack": attack,
            "quick_attack": quick,
        },
    }
    return Recipe.model_validate(document)


def stepper(made: Recipe, case: Case, batch: int, device: torch.device) -> Work:
    """A call that makes one training step; equal weights, images and labels for every variant."""
    torch.manual_seed(0)
    model = create_encoder(case.network, case.classes, case.shape[0], case.shape[1])
    trainer: Trainer = EncoderTrainer(made, model, Engine(device, made.precision), TOTAL)
    images, labels = noise(case, batch, device)
    placed = images.to(memory_format=torch.channels_last)  # as the training loop hands them over
    return partial(trainer.step, 0, [Micro(placed, labels, 0)])


def noise(case: Case, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [batch, C, H, W] in [0, 1] and labels [batch], the same for every variant."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, *case.shape, generator=generator)
    return images.to(device), torch.randint(case.classes, (batch,), generator=generator).to(device)


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """fp32, and bf16 where the device is good at it."""
    return ("fp32", "bf16") if resolve_precision("auto", device) == "bf16" else ("fp32",)


def low_precision(prefix: str, precisions: tuple[str, ...]) -> list[Comparison]:
    """What bf16 saves, where it is measured."""
    if "bf16" not in precisions:
        return []
    return [Comparison(what=f"{prefix}fp32 over bf16", slow=f"{prefix}fp32", fast=f"{prefix}bf16")]


def written(shape: Shape) -> str:
    """`3 × 32 × 32`."""
    return " × ".join(map(str, shape))
