"""Reconstructions of enlarged images: the protocol `upscale` (ARAE paper, Table 5 and Table A2 of its appendix)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from arae.evaluate.measure import Recorder, watched
from arae.evaluate.quality import Quality
from arae.records import Record

if TYPE_CHECKING:
    from arae.evaluate.batches import Batches, Progress, Team


def upscaled(batches: Batches, images: Tensor, team: Team, progress: Progress) -> list[Record]:
    """For each factor L, the quality of the reconstructions of the enlarged images, as protocol `upscale-L`.

    images: uint8 [n, C, H, W] at the training size; team: calls `batches`, or what is like it elsewhere. They are
    enlarged first, then encoded and decoded at the larger size, and compared with the enlarged image there. A batch
    shrinks by L², so that it takes no more memory than one at the training size, as far as single images allow.
    """
    settings = batches.recipe.evaluate
    recorder = Recorder(batches.recipe, batches.model, team.device)
    records: list[Record] = []
    for factor in dict.fromkeys(settings.factors):
        protocol, quality = f"upscale-{factor}", Quality(settings)
        size = max(1, settings.batch // factor**2)
        results = team.do("upscaled", ((factor, x) for x in images.split(size)))
        for found in watched(results, protocol, size, len(images), progress):
            quality.take(found.quality, found.missing)
        records += recorder.quality(quality, protocol)
    return records


def enlarged(x: Tensor, factor: int) -> Tensor:
    """Images [N, C, H, W] in [0, 1], bilinearly enlarged to [N, C, L·H, L·W]; at L = 1 as they are.

    The paper does not name its interpolation; bilinear is torchvision's default, which its code uses elsewhere.
    """
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
