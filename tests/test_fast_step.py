"""The step as it is made for speed, judged by what it is for: on networks that it has trained, on real images.

Gradients and logits are compared in `test_attack_network`; here robust accuracy and loss, which are what counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arae.attacks.gradient import perturb
from arae.attacks.network import AttackNetwork
from arae.config import Attack, Recipe
from arae.data.arrays import read_idx
from arae.models import Encoder, create_encoder
from arae.precision import DTYPES, cpu_has_bf16
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
N, BATCH, SIDE = 800, 64, 20
NETWORKS: dict[str, dict[str, Any]] = {
    "small-cnn": {"width": 0.5, "steps": 150, "lr": 0.05, "attack": {"norm": "l2", "eps": 1.0, "steps": 7}},
    "resnet18-cifar": {"width": 0.125, "steps": 90, "lr": 0.05, "attack": {"norm": "linf", "eps": 0.05, "steps": 7}},
}
Images = tuple[Tensor, Tensor]


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request: pytest.FixtureRequest, fashion_mnist: Path) -> tuple[Encoder, Attack, Images]:
    """A network trained by PGD-2, the attack of its recipe, and held-out images."""
    part = NETWORKS[request.param]
    encoder = {"name": request.param, "batch": BATCH, "schedule": {"kind": "linear", "warmup": 0.1}} | part
    recipe = Recipe.model_validate(
        {"name": "fast", "precision": "fp32", "data": {"name": "fashion-mnist"}, "encoder": encoder}
    )
    learning = recipe.replace({"encoder.attack.steps": 2})
    torch.manual_seed(0)
    model = create_encoder(request.param, 10, 1, SIDE, width=part["width"])
    trainer = EncoderTrainer(learning, model, Engine(CPU, "fp32"), part["steps"])
    x, y = images_of(fashion_mnist, "train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for step in range(part["steps"]):
        rows = order[BATCH * step : BATCH * (step + 1)]
        trainer.step(step, [Micro(x[rows], y[rows], 0)])
    held, labels = images_of(fashion_mnist, "t10k")
    return model.eval(), recipe.encoder.attack, (held[:N], labels[:N])


def images_of(folder: Path, split: str) -> Images:
    x = np.array(read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:10_000])
    y = np.array(read_idx(folder / f"{split}-labels-idx1-ubyte.gz")[:10_000])
    images = F.interpolate(torch.from_numpy(x)[:, None].float() / 255, SIDE, mode="bilinear", antialias=True)
    return images.clamp(0, 1), torch.from_numpy(y).long()


def under(model: Encoder, attacked: nn.Module, attack: Attack, images: Images) -> tuple[Tensor, Tensor]:
    """Hits bool [N] and losses [N] of the model in float32, on what an attack on `attacked` made."""
    hits, losses = [], []
    for x, y in zip(images[0].split(250), images[1].split(250), strict=True):
        with torch.no_grad():
            logits = model(perturb(attacked, x, y, attack))
        hits.append(logits.argmax(1) == y)
        losses.append(F.cross_entropy(logits, y, reduction="none"))
    return torch.cat(hits), torch.cat(losses)


SLOW = pytest.mark.skipif(not cpu_has_bf16(), reason="this processor has no bf16 instructions: minutes, not seconds")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=SLOW)])
def test_robust_accuracy_and_loss_are_those_of_the_plain_step(
    trained: tuple[Encoder, Attack, Images], precision: str
) -> None:
    """Paired on the same images: the 95 % interval of the difference reaches no further than a point from zero, and
    half a percent of the loss."""
    model, attack, images = trained
    hits, losses = under(model, model, attack, images)
    copy = AttackNetwork(model)
    copy.refresh(DTYPES[precision])
    quick_hits, quick_losses = under(model, copy, attack, images)
    clean = under(model, model, attack.model_copy(update={"eps": 0.0}), images)[0].float().mean()
    assert 0.2 < hits.float().mean() < clean - 0.05, "a network that has learnt, and an attack that does something"
    for plain, quick, most in (
        (hits.float(), quick_hits.float(), 0.01),
        (losses, quick_losses, 0.005 * losses.mean()),
    ):
        gap = (quick - plain).double()
        assert abs(gap.mean()) + 1.96 * gap.std() / len(gap) ** 0.5 <= most
