"""Training steps: what adversarial training costs over standard training, and what low precision saves.

Measured: one whole optimiser step of arae's own trainers (attack, forward, backward, update), on images already on the
device, without loading.
- `encoder-small` small-cnn, 1 × 28 × 28, batch 64, n = 7 rounds.
- `encoder-resnet` resnet18-cifar, 3 × 32 × 32, batch 16, n = 3 rounds.
  Each: standard and PGD-7 (l2, eps 0.5), fp32 and bf16.
- `decoder` the mirror decoder and discriminator over small-cnn's conv4, 1 × 28 × 28, batch 64, n = 7 rounds: pixel,
  feature and adversarial losses, generator and discriminator, fp32 and bf16.
Warm-up: 1 round. The images are noise: no time here depends on what they show. bf16 is left out on a processor without
bf16 instructions, where it is emulated and nobody would train with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from arae.config import Recipe
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.precision import resolve_precision
from arae.train.decoder import DecoderTrainer
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro
from arae.train.stage import Trainer
from benchmarks.harness import Comparison, Result, Work, measure

CLASSES = 10
TOTAL = 1000  # steps of the schedule; the rate is constant
ATTACKS = {"standard": {}, "PGD-7": {"norm": "l2", "eps": 0.5, "steps": 7}}
LOSSES = {"pixel": 1.0, "feature": 0.01, "adversarial": 0.001}
NO_BF16 = "this processor has no bf16 instructions"

Shape = tuple[int, int, int]


def encoder_small(device: torch.device) -> Result:
    """The demo's network."""
    return encoder("encoder-small", "small-cnn", (1, 28, 28), 64, rounds=7, device=device)


def encoder_resnet(device: torch.device) -> Result:
    """CIFAR-10's network."""
    return encoder("encoder-resnet", "resnet18-cifar", (3, 32, 32), 16, rounds=3, device=device)


def encoder(name: str, network: str, shape: Shape, batch: int, *, rounds: int, device: torch.device) -> Result:
    """Standard and PGD-7 steps of one network, in the precisions of the device."""
    precisions = precisions_of(device)
    variants: dict[str, Work] = {}
    for attack, options in ATTACKS.items():
        for precision in precisions:
            made = recipe(network, batch, precision, attack=options)
            variants[f"{attack} {precision}"] = stepper(made, shape, batch, device, encoder_trainer)
    slower = [Comparison(what=f"PGD-7 over standard, {p}", slow=f"PGD-7 {p}", fast=f"standard {p}") for p in precisions]
    about = f"One encoder training step of {network} on {batch} images of {written(shape)}; PGD-7 in l2, eps 0.5."
    return measure(
        name,
        about,
        variants,
        slower + [c for a in ATTACKS for c in low_precision(f"{a} ", precisions)],
        images=batch,
        rounds=rounds,
        warmup=1,
        device=device,
        left_out=None if "bf16" in precisions else {"bf16": NO_BF16},
    )


def decoder(device: torch.device) -> Result:
    """Discriminator and generator step with all three losses."""
    shape, batch, precisions = (1, 28, 28), 64, precisions_of(device)
    variants = {
        p: stepper(recipe("small-cnn", batch, p, losses=LOSSES), shape, batch, device, decoder_trainer)
        for p in precisions
    }
    about = (
        "One decoder training step (discriminator, then generator; pixel, feature and adversarial losses) of the "
        f"mirror decoder over small-cnn's conv4 on {batch} images of {written(shape)}."
    )
    return measure(
        "decoder",
        about,
        variants,
        low_precision("", precisions),
        images=batch,
        rounds=7,
        warmup=1,
        device=device,
        left_out=None if "bf16" in precisions else {"bf16": NO_BF16},
    )


def recipe(
    network: str,
    batch: int,
    precision: str,
    *,
    attack: dict[str, Any] | None = None,
    losses: dict[str, Any] | None = None,
) -> Recipe:
    """A recipe for a single step; a decoder where there are losses."""
    document: dict[str, Any] = {
        "name": "bench",
        "precision": precision,
        "data": {},
        "encoder": {"name": network, "steps": TOTAL, "batch": batch, "lr": 0.01, "attack": attack or {}},
    }
    if losses:
        document["encoder"]["layer"] = "conv4"
        document["decoder"] = {"name": "mirror", "steps": TOTAL, "batch": batch, "losses": losses}
    return Recipe.model_validate(document)


def encoder_trainer(made: Recipe, shape: Shape, engine: Engine) -> Trainer:
    """The trainer of a fresh encoder."""
    model = create_encoder(made.encoder.name, CLASSES, shape[0], shape[1])
    return EncoderTrainer(made, model, engine, TOTAL)


def decoder_trainer(made: Recipe, shape: Shape, engine: Engine) -> Trainer:
    """The trainer of a fresh decoder and discriminator over a fresh encoder."""
    model = create_encoder(made.encoder.name, CLASSES, shape[0], shape[1])
    features = model.feature_shape(shape, made.encoder.layer)
    generator = create_decoder("mirror", feature_shape=features, image_shape=shape)
    discriminator = create_discriminator("mirror", feature_shape=features, image_shape=shape)
    return DecoderTrainer(made, model, generator, discriminator, engine, TOTAL)


def stepper(
    made: Recipe, shape: Shape, batch: int, device: torch.device, make: Callable[[Recipe, Shape, Engine], Trainer]
) -> Work:
    """A call that makes one training step; equal weights, images and labels for every variant."""
    torch.manual_seed(0)
    trainer = make(made, shape, Engine(device, made.precision))
    torch.manual_seed(1)
    images, labels = torch.rand(batch, *shape), torch.randint(CLASSES, (batch,))
    placed = images.to(device, memory_format=torch.channels_last)  # as the training loop hands them over
    return partial(trainer.step, 0, [Micro(placed, labels.to(device), 0)])


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
