"""The training step of a decoder: discriminator and generator, with pixel, feature and adversarial losses.

Measured: one whole step of arae's own trainer (encode, discriminator, generator), on images already on the device.
- `decoder-conv5` the paper's decoder over AlexNet's conv5, 3 × 224 × 224, n = 3 rounds; batch 16 on a CPU, 128 on a
  GPU. Paired with the step of the authors' own code (`peers.py`), as shipped, which encodes each image twice, and on a
  CPU under autocast (on a GPU autocast refuses the loss of a discriminator that ends in a sigmoid, as theirs does).
- `decoder` the mirror decoder and discriminator over small-cnn's conv4, 1 × 28 × 28, batch 64, n = 7 rounds: fp32 and
  bf16.
Warm-up: 1 round. The images are noise: no time here depends on what they show.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from arae.config import Recipe
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.precision import DTYPES
from arae.train.decoder import DecoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro
from benchmarks import peers
from benchmarks.harness import Comparison, Result, Work, measure
from benchmarks.step import ALEXNET, NO_BF16, SMALL, TOTAL, Case, low_precision, noise, precisions_of, written

LOSSES = {"pixel": 1.0, "feature": 0.01, "adversarial": 0.001}


def decoder_conv5(device: torch.device) -> Result:
    """The paper's decoder."""
    batch = 128 if device.type == "cuda" else ALEXNET.batch
    precisions = precisions_of(device)
    best = precisions[-1]
    theirs = peers.authors()
    variants: dict[str, Work] = {}
    left_out = {} if theirs else {"authors": peers.MISSING}
    if theirs is not None:
        images, _ = noise(ALEXNET, batch, device)
        for settings in ("", ", autocast") if best != "fp32" and device.type == "cpu" else ("",):
            cast = partial(torch.autocast, device.type, dtype=DTYPES[best], enabled=bool(settings))
            variants[f"authors{settings}"] = peers.authors_step(theirs, images, ALEXNET.statistics, cast)
    for precision in precisions:
        variants[f"arae {precision}"] = stepper(precision, device, ALEXNET, "alexnet-conv5", batch)
    compared = [
        Comparison(what=f"{name} over arae {best}", slow=name, fast=f"arae {best}")
        for name in variants
        if name.startswith("authors")
    ]
    if theirs is not None and best != "fp32":
        compared.append(Comparison(what="authors over arae fp32", slow="authors", fast="arae fp32"))
    made = measure(
        "decoder-conv5",
        "One decoder training step (discriminator, then generator; pixel, feature and adversarial losses) of the "
        f"paper's decoder over AlexNet's conv5 on {batch} images of {written(ALEXNET.shape)}.",
        variants,
        [*compared, *low_precision("arae ", precisions)],
        images=batch,
        rounds=3,
        warmup=1,
        device=device,
        left_out=left_out | ({} if "bf16" in precisions else {"bf16": NO_BF16}),
    )
    return made if theirs is None or theirs.clone else made.model_copy(update={"notes": (peers.COPY,)})


def decoder(device: torch.device) -> Result:
    """The demo's decoder."""
    precisions = precisions_of(device)
    about = (
        "One decoder training step (discriminator, then generator; pixel, feature and adversarial losses) of the "
        f"mirror decoder over small-cnn's conv4 on {SMALL.batch} images of {written(SMALL.shape)}."
    )
    return measure(
        "decoder",
        about,
        {precision: stepper(precision, device, SMALL, "mirror", SMALL.batch) for precision in precisions},
        low_precision("", precisions),
        images=SMALL.batch,
        rounds=7,
        warmup=1,
        device=device,
        left_out=None if "bf16" in precisions else {"bf16": NO_BF16},
    )


def stepper(precision: str, device: torch.device, case: Case, name: str, batch: int) -> Work:
    """A call that makes one step of a fresh decoder and discriminator over a fresh encoder, at its own tap."""
    layer = create_encoder(case.network, case.classes, case.shape[0], case.shape[1]).layer
    document: dict[str, Any] = {
        "name": "bench",
        "precision": precision,
        "data": {},
        "encoder": {"name": case.network, "layer": layer, "steps": TOTAL, "batch": batch},
        "decoder": {"name": name, "steps": TOTAL, "batch": batch, "losses": LOSSES},
    }
    made = Recipe.model_validate(document)
    torch.manual_seed(0)
    model = create_encoder(case.network, case.classes, case.shape[0], case.shape[1])
    features = model.feature_shape(case.shape, layer)
    generator = create_decoder(name, feature_shape=features, image_shape=case.shape)
    discriminator = create_discriminator(name, feature_shape=features, image_shape=case.shape)
    trainer = DecoderTrainer(made, model, generator, discriminator, Engine(device, precision), TOTAL)
    images, labels = noise(case, batch, device)
    return partial(trainer.step, 0, [Micro(images.to(memory_format=torch.channels_last), labels, 0)])
