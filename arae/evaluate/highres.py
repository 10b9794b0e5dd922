"""Image files at their own size: the protocol `high-resolution` (ARAE paper, Table 6)."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from arae.config import Recipe
from arae.data.augment import to_float
from arae.data.images import UnusableImageError, list_folder, open_rgb
from arae.data.load import to_channels
from arae.errors import InputError
from arae.evaluate.batches import Note, Progress
from arae.evaluate.measure import Recorder, evenly
from arae.evaluate.quality import Quality
from arae.evaluate.tiles import Tiling, plan_tiles, reconstruct_tiled, seam_ratio
from arae.models.autoencoder import Autoencoder
from arae.records import Record

_SHARE = 0.5  # of the free memory that one pass may take


def high_resolution(recipe: Recipe, model: Autoencoder, progress: Progress, note: Note) -> list[Record]:
    """Quality of the reconstructions of the files in `evaluate.images`, none of them resized.

    An image goes through the model whole, or in tiles where it is larger than `evaluate.tile`, or than memory allows;
    then there is a record of `seam` too. Files that can't be read are left out: `note` hears of each, and the records'
    flags say so. The records' data set is the folder's name. InputError: no folder, or no image in it that can be read.
    """
    settings = recipe.evaluate
    assert settings.images is not None  # a recipe without is refused
    root = Path(settings.images)
    listed = list_folder(root, "all", ())
    paths = [listed.paths[i] for i in evenly(len(listed.paths), settings.n)]
    quality, rebuild, left_out = Quality(settings), _Rebuild(model, settings.tile), list[str]()
    for done, name in enumerate(paths):
        progress("high-resolution", done, len(paths))
        try:
            x = read_whole(root / name, model.image_shape[0])[None].to(model.device)
        except UnusableImageError as error:
            left_out.append(f"left out {name}: {error}")
            note(left_out[-1])
            continue
        quality.add(rebuild(x), x)
    progress("high-resolution", len(paths), len(paths))
    if len(left_out) == len(paths):
        raise InputError(f"evaluate.images = {root}: none of its {len(paths)} images can be read ({left_out[0]})")
    recorder = Recorder(recipe, model, dataset=root.resolve().name, split="all")
    records = recorder.quality(quality, "high-resolution")
    if rebuild.seams:
        records.append(recorder.mean("seam", torch.cat(rebuild.seams), "high-resolution"))
    flags = (*left_out, *rebuild.remarks)
    return [record.model_copy(update={"flags": flags}) for record in records]


def read_whole(path: Path, channels: int) -> Tensor:
    """An image file as float [channels, H, W] in [0, 1], upright, at its own size; UnusableImageError as `open_rgb`."""
    levels = torch.from_numpy(np.array(open_rgb(path)[0])).permute(2, 0, 1)[None]
    return to_float(to_channels(levels, channels))[0]


class _Rebuild:
    """Reconstructs images of any size, whole or in tiles, and keeps what is to be said of the tiles."""

    def __init__(self, model: Autoencoder, tile: int | None) -> None:
        self.model, self.tile = model, tile
        self.seams: list[Tensor] = []
        self.remarks: set[str] = set()
        self._tilings: dict[int, Tiling] = {}
        self._bytes = bytes_per_pixel(model)

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction of one image [1, C, H, W]."""
        largest = self.tile or self._affordable(x)
        if max(x.shape[2:]) <= largest:
            return self.model.reconstruct(x)
        if largest not in self._tilings:
            self._tilings[largest] = plan_tiles(self.model, largest)
        tiling = self._tilings[largest]
        if not tiling.exact:
            self.remarks.add(
                f"tiles of {tiling.side} px are smaller than the networks' reach needs: blended, not equal to the whole"
            )
        again, seams = reconstruct_tiled(self.model, x, tiling)
        self.seams.append(seam_ratio(again - x, seams))
        return again

    def _affordable(self, x: Tensor) -> int:
        """The side in px of what memory allows at once: the image's longer one where it all fits."""
        pixels = int(_SHARE * free_memory(self.model.device) / self._bytes)
        return max(x.shape[2:]) if x.shape[2] * x.shape[3] <= pixels else _power_of_two(math.isqrt(pixels))


def _power_of_two(side: int) -> int:
    """At most `side`: so that what happens to be free changes the tiles rarely."""
    return 1 << max(side.bit_length() - 1, 0)


def bytes_per_pixel(model: Autoencoder) -> float:
    """Memory that a reconstruction takes at its peak, as bytes a pixel of the image: the largest layer's in and output.

    Twice that, as convolutions want room of about their input's size for themselves.
    """
    probe, most = copy.deepcopy(model), 0

    def look(module: nn.Module, given: tuple[object, ...], made: object) -> None:
        nonlocal most
        tensors = [t for t in (*given, made) if isinstance(t, Tensor)]
        most = max(most, sum(t.numel() * t.element_size() for t in tensors))

    assert probe.decoder is not None
    for module in [*probe.encoder.modules(), *probe.decoder.modules()]:
        module.register_forward_hook(look)
    probe.reconstruct(torch.zeros(1, *model.image_shape, device=model.device))
    return 2 * most / (model.image_shape[1] * model.image_shape[2])


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or of this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 2**32
