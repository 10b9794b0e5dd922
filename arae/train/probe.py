"""A quick look at held-out images while training: numbers for the log and a picture, not records."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from arae.attacks.gradient import perturb
from arae.config import Attack, Recipe, Stage
from arae.data.augment import to_float
from arae.data.load import Described, Source, open_source, same_kind
from arae.errors import AraeError
from arae.metrics import psnr
from arae.models.encoder import Encoder
from arae.modes import evaluating
from arae.pictures import grid, save_png
from arae.precision import full
from arae.runs import RunFolder
from arae.train.engine import Engine
from arae.train.log import Log
from arae.train.networks import code

SIZE = 256
PICTURES = 8


class Probe:
    """A fixed handful of held-out images, read once."""

    def __init__(self, recipe: Recipe, folder: RunFolder, train: Source, engine: Engine, log: Log) -> None:
        """`train`: the training images; InputError where the held-out ones do not belong to them."""
        source = open_source(recipe.data, "test", engine.device)
        same_kind(*(Described(s.n, s.shape, s.classes) for s in (train, source)))
        where = np.linspace(0, source.n - 1, min(SIZE, source.n)).round().astype(np.int64)
        self.images = to_float(next(iter(source.batches(where[None])))).to(engine.device, engine.images_dtype)
        self.labels = source.labels[torch.from_numpy(where)].to(engine.device)
        self.recipe, self.folder, self.engine, self.log = recipe, folder, engine, log

    def classify(self, model: Encoder) -> dict[str, float]:
        """Accuracy on the clean images and, where training attacks, on attacked ones."""
        attack = self.recipe.encoder.attack
        against = Attack(norm=attack.norm, eps=attack.eps, steps=10) if attack.eps else None
        right: dict[str, list[Tensor]] = {"clean_accuracy": []}
        for x, y in zip(*self._pieces(self.recipe.encoder, self.images, self.labels), strict=True):
            right["clean_accuracy"].append(self._right(model, x, y))
            if against is not None:
                with self.engine.autocast():
                    attacked = perturb(model, x, y, against)
                right.setdefault("robust_accuracy", []).append(self._right(model, attacked, y))
        return {name: torch.cat(found).float().mean().item() for name, found in right.items()}

    def _pieces(self, part: Stage, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """As many images at once as training has: no more is known to fit into memory."""
        return [tensor.split(part.micro) for tensor in tensors]

    def _right(self, model: Encoder, images: Tensor, labels: Tensor) -> Tensor:
        with evaluating(model), torch.no_grad(), self.engine.autocast():
            return model(images).argmax(1) == labels

    def reconstruct(self, encoder: Encoder, generator: nn.Module, step: int) -> dict[str, float]:
        """PSNR of what the generator makes of `encoder`; leaves a picture of a few beside their originals."""
        assert self.recipe.decoder is not None
        (pieces,) = self._pieces(self.recipe.decoder, self.images)
        with evaluating(generator), torch.no_grad(), self.engine.autocast():
            made = [full(generator(code(encoder, piece, self.recipe.encoder.layer))) for piece in pieces]
        again = torch.cat(made)
        if not torch.isfinite(again).all():
            raise AraeError(
                f"decoder: by step {step} it has diverged, its images are not finite; lower decoder.lr or "
                "decoder.discriminator_lr, and give the run another name=…"
            )
        name = f"decoder-{step:06d}.png"
        self.folder.images.mkdir(exist_ok=True)
        save_png(grid([self.images[:PICTURES], again[:PICTURES]]), self.folder.images / name)
        self.log.emit("picture", stage="decoder", step=step, path=f"images/{name}")
        return {"psnr": psnr(again, self.images).mean().item()}
