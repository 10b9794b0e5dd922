"""The training step of a decoder: what low precision saves.

Measured: one whole step of arae's own trainer (encode, discriminator, generator), on images already on the device.
- `decoder` the mirror decoder and discriminator over small-cnn's conv4, 1 × 28 × 28, batch 64, n = 7 rounds: pixel,
  feature and adversarial losses, generator and discriminator, fp32 and bf16.
Warm-up: 1 round. The images are noise: no time here depends on what they show.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from arae.config import Recipe
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.train.decoder import DecoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro
from benchmarks.harness import Result, Work, measure
from benchmarks.step import NO_BF16, SMALL, TOTAL, low_precision, noise, precisions_of, written

LOSSES = {"pixel": 1.0, "feature": 0.01, "adversarial": 0.001}


def decoder(device: torch.device) -> Result:
    """Discriminator and generator step with all three losses."""
    precisions = precisions_of(device)
    about = (
        "One decoder training step (discriminator, then generator; pixel, feature and adversarial losses) of the "
        f"mirror decoder over small-cnn's conv4 on {SMALL.batch} images of {written(SMALL.shape)}."
    )
    return measure(
        "decoder",
        about,
        {precision: stepper(precision, device) for precision in precisions},
        low_precision("", precisions),
        images=SMALL.batch,
        rounds=7,
        warmup=1,
        device=device,
        left_out=None if "bf16" in precisions else {"bf16": NO_BF16},
    )


def stepper(precision: str, device: torch.device) -> Work:
    """A call that makes one step of a fresh decoder and discriminator over a fresh encoder."""
    document: dict[str, Any] = {
        "name": "bench",
        "precision": precision,
        "data": {},
        "encoder": {"name": SMALL.network, "layer": "conv4", "steps": TOTAL, "batch": SMALL.batch},
        "decoder": {"name": "mirror", "steps": TOTAL, "batch": SMALL.batch, "losses": LOSSES},
    }
    made = Recipe.model_validate(document)
    torch.manual_seed(0)
    model = create_encoder(SMALL.network, SMALL.classes, SMALL.shape[0], SMALL.shape[1])
    features = model.feature_shape(SMALL.shape, made.encoder.layer)
    generator = create_decoder("mirror", feature_shape=features, image_shape=SMALL.shape)
    discriminator = create_discriminator("mirror", feature_shape=features, image_shape=SMALL.shape)
    trainer = DecoderTrainer(made, model, generator, discriminator, Engine(device, precision), TOTAL)
    images, labels = noise(SMALL, SMALL.batch, device)
    return partial(trainer.step, 0, [Micro(images.to(memory_format=torch.channels_last), labels, 0)])
