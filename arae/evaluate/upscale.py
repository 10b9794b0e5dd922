"""Reconstructions of enlarged images: the protocol `upscale` (ARAE paper, Table 5 and Table A2 of its appendix)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from arae.config import Recipe
from arae.data.augment import to_float
from arae.evaluate.mapping import Progress
from arae.evaluate.measure import Recorder
from arae.evaluate.quality import Quality
from arae.models.autoencoder import Autoencoder
from arae.records import Record


def upscaled(recipe: Recipe, model: Autoencoder, images: Tensor, progress: Progress) -> list[Record]:
    """For each factor L, the quality of the reconstructions of the enlarged images, as protocol `upscale-L`.

    images: uint8 [n, C, H, W] at the training size. They are enlarged first, then encoded and decoded at the larger
    size, and compared with the enlarged image there. A batch shrinks by L², so that it takes no more memory than one at
    the training size, as far as single images allow.
    """
    recorder, settings = Recorder(recipe, model), recipe.evaluate
    records: list[Record] = []
    for factor in dict.fromkeys(settings.factors):
        protocol, quality = f"upscale-{factor}", Quality(settings)
        size = max(1, settings.batch // factor**2)
        for start in range(0, len(images), size):
            progress(protocol, start, len(images))
            x = enlarged(to_float(images[start : start + size]), factor)
            quality.add(model.reconstruct(x), x)
        progress(protocol, len(images), len(images))
        records += recorder.quality(quality, protocol)
    return records


def enlarged(x: Tensor, factor: int) -> Tensor:
    """Images [N, C, H, W] in [0, 1], bilinearly enlarged to [N, C, L·H, L·W]; at L = 1 as they are.

    The paper does not name its interpolation; bilinear is torchvision's default, which its code uses elsewhere.
    """
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
