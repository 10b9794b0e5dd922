"""Trainers small enough for the tests of DeepSpeed's engine, and what compares their states."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from training import tiny_recipe

from arae.config import EngineChoice
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.train.decoder import DecoderTrainer
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro

CPU = torch.device("cpu")
IMAGE, CLASSES = (3, 8, 8), 3
TOTAL = 50  # steps of the stage, for the schedule


def zero(stage: int, *, offload: bool = False) -> EngineChoice:
    """DeepSpeed at a stage of ZeRO."""
    return EngineChoice(kind="deepspeed", stage=stage, offload=offload)


def engine(choice: EngineChoice | None = None, dtype: torch.dtype = torch.float32) -> Engine:
    """On the CPU, which recipes do not get float16 on; `choice`: default plain PyTorch."""
    made = Engine(CPU, "fp32", choice)
    made.dtype = dtype
    return made


def encoder_trainer(on: Engine, **overrides: object) -> EncoderTrainer:
    """PGD-2, by the overrides' network; four micro-batches of 8."""
    recipe = recipe_of(overrides)
    torch.manual_seed(0)
    width = 1 if recipe.encoder.name == "small-cnn" else 0.125
    return EncoderTrainer(recipe, create_encoder(recipe.encoder.name, CLASSES, width=width), on, TOTAL)


def gan_trainer(on: Engine, **overrides: object) -> DecoderTrainer:
    """Pixel, feature and adversarial losses; batch norm in the generator, dropout in the discriminator."""
    recipe = recipe_of({"encoder__layer": "conv2"} | overrides)
    torch.manual_seed(0)
    encoder = create_encoder("small-cnn", CLASSES)
    shapes = encoder.feature_shape(IMAGE, "conv2"), IMAGE
    generator, discriminator = create_decoder("mirror", *shapes), create_discriminator("mirror", *shapes)
    return DecoderTrainer(recipe, encoder, generator, discriminator, on, TOTAL)


MAKE = {"encoder": encoder_trainer, "gan": gan_trainer}


def recipe_of(overrides: Mapping[str, object]):
    """The trainers' recipe."""
    common = {"encoder__micro_batch": 8, "decoder__micro_batch": 8, "encoder__label_smoothing": 0, "decoder__ema": 0.9}
    return tiny_recipe(Path("none.npz"), **common | dict(overrides))


def trained(trainer: EncoderTrainer | DecoderTrainer, first: int, last: int) -> list[float]:
    """Steps `first` to `last`, on random images that depend on the step; the group's mean loss in each."""
    losses = []
    for step in range(first, last):
        made = trainer.step(step, micros(trainer, step))
        losses.append(trainer.engine.mean(made["loss"].clone()).item())
    return losses


def micros(trainer: EncoderTrainer | DecoderTrainer, step: int) -> list[Micro]:
    """This worker's micro-batches."""
    part = trainer.part
    g = torch.Generator().manual_seed(step)
    images = torch.rand(part.batch, *IMAGE, generator=g).split(part.micro)
    labels = torch.randint(0, CLASSES, (part.batch,), generator=g).split(part.micro)
    return [Micro(images[i], labels[i], i, len(images)) for i in trainer.engine.share(len(images), trainer.name)]


def copied(value: Any) -> Any:
    """A state that later steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, bound: float = 0.0, path: str = "") -> list[str]:
    """Where two states differ: tensors by more than `bound` of the other's largest entry, anything else at all."""
    if isinstance(other, torch.Tensor):
        if one.shape != other.shape:
            return [f"{path}: {tuple(one.shape)} and {tuple(other.shape)}"]
        worst = (one.double() - other.double()).abs().max().item() if other.numel() else 0.0
        largest = other.double().abs().max().item() if other.numel() else 0.0
        return [] if worst <= bound * largest else [f"{path}: {worst:.3g} of {largest:.3g}"]
    if isinstance(other, dict):
        if set(one) != set(other):
            return [f"{path}: {sorted(map(str, set(one) ^ set(other)))}"]
        return [found for key in other for found in differences(one[key], other[key], bound, f"{path}.{key}")]
    if isinstance(other, list | tuple):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, bound, f"{path}.{i}")]
    return [] if one == other else [f"{path}: {one} and {other}"]
