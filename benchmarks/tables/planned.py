"""What a table will cost: FLOPs that are counted on its networks, as hours at a stated speed. No data is needed."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch

from arae.config import Recipe
from arae.cost import Networks, Passes, Shape, parameters
from arae.data.catalog import DATASETS
from arae.errors import InputError
from benchmarks.tables.definition import Definition, ScaleName, trips

GPU = 0.4 * 15.7e12
"""FLOP/s that a V100, the paper's GPU, is taken to reach: 40 % of its 15.7 TFLOP/s in fp32."""
CORE = 60e9
"""FLOP/s that a CPU core is taken to reach: what `encoder-small` of these benchmarks reaches on one core in fp32."""
SPEEDS = (
    "GPU-hours: counted FLOPs (the attacks' steps included) at 40 % of a V100's 15.7 TFLOP/s in fp32; core-hours: at "
    "60 GFLOP/s a CPU core. Runs that tables share count in each of them, an encoder once a table; waiting for data "
    "and for other workers comes on top"
)


@dataclass(frozen=True)
class Cost:
    """FLOPs of a table at one scale."""

    encoders: float
    decoders: float
    evaluation: float
    scale: ScaleName

    @property
    def hours(self) -> float:
        """GPU-hours at full scale, core-hours at small."""
        total = self.encoders + self.decoders + self.evaluation
        return total / (GPU if self.scale == "full" else CORE) / 3600

    @property
    def text(self) -> str:
        """`120 GPU-hours`, `1.5 core-hours`."""
        unit = "GPU-hours" if self.scale == "full" else "core-hours"
        return f"{float(f'{self.hours:.2g}'):,g} {unit}"


def cost(definition: Definition, scale: ScaleName) -> Cost:
    """What the table's runs take, from nothing; InputError where a recipe, a network or a count is not there."""
    encoders: dict[str, float] = {}
    decoders = evaluation = 0.0
    for trip in trips(definition, scale):
        r = trip.recipe
        train, test, shape, classes = _counts(definition, scale, r)
        networks = _networks(r, shape, classes)
        images = r.encoder.total_steps(train) * r.encoder.batch
        encoders[r.stage_digest("encoder")] = images * networks.encoder_step(r.encoder.attack)
        if part := r.decoder:
            images = part.total_steps(train) * part.batch
            decoders += images * networks.decoder_step(part.batch // part.micro)
        for each in trip.evaluations:
            n = definition.scale(scale).images.get("files") if each.evaluate.images else each.evaluate.n
            evaluation += min(n or test, test) * _networks(each, shape, classes).evaluation()
    return Cost(sum(encoders.values()), decoders, evaluation, scale)


def decoder_parameters(definition: Definition, scale: ScaleName, recipe: Recipe) -> int:
    """Trainable numbers of the recipe's decoder; InputError where it has none."""
    _, _, shape, classes = _counts(definition, scale, recipe)
    decoder = _networks(recipe, shape, classes).decoder
    if decoder is None:
        raise InputError(f"{recipe.name}: has no decoder")
    return parameters(decoder)


def _counts(definition: Definition, scale: ScaleName, recipe: Recipe) -> tuple[int, int, Shape, int]:
    """Training images, held-out images, their shape and classes: the definition's numbers, or the catalogue's."""
    known, given = DATASETS.get(recipe.data.name), definition.scale(scale).images
    train = given.get("train") or (known and known.splits.get("train"))
    test = given.get("test") or (known and known.splits.get("test"))
    size = recipe.data.size or (known and known.size)
    if not (train and test and size):
        raise InputError(f"{definition.id}: {recipe.data.name} has no number of images: give {scale}.images")
    classes = given.get("classes") or (len(known.classes) if known and known.classes else 1000)
    return min(train, recipe.data.limit or train), test, (recipe.data.channels or 3, size, size), classes


def _networks(recipe: Recipe, shape: Shape, classes: int) -> Networks:
    """The recipe's networks; what was made or counted for another recipe with the same ones is not made again."""
    e, d = recipe.encoder, recipe.decoder
    encoder = (e.name, e.width, e.layer, shape, classes)
    decoder = (*encoder, d and (d.name, d.comparator, d.normalisation))
    key = (*decoder, d and d.losses)
    if key not in _BUILT:
        with torch.device("meta"):  # sizes are all that is counted
            _BUILT[key] = made = Networks(recipe, shape, classes)
        wanted: list[tuple[str, object]] = [("classify", encoder), ("tap", encoder)]
        wanted += [("compare", decoder), ("generate", decoder)] if made.decoder is not None else []
        wanted += [("judge", decoder), ("judge_both", decoder)] if made.discriminator is not None else []
        for count in wanted:
            if count not in _COUNTED:
                _COUNTED[count] = getattr(made, count[0])
            vars(made)[count[0]] = _COUNTED[count]
    shared = copy(_BUILT[key])
    shared.recipe = recipe
    return shared


_BUILT: dict[object, Networks] = {}
_COUNTED: dict[tuple[str, object], Passes] = {}
