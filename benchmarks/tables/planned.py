"""What a table will cost: FLOPs that are counted on its networks, as hours at a stated speed. No data is needed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import copy
from functools import cache
from pathlib import Path

import torch

from arae.config import Part, Recipe, digest_of
from arae.cost import Networks, Passes, Shape, parameters
from arae.data.catalog import DATASETS
from arae.errors import InputError
from arae.files import write_text
from benchmarks.tables.definition import SCALES, Definition, ScaleName, trips

KEPT = Path(__file__).resolve().parent / "counted.json"
"""What was counted, for counting takes a minute."""
GPU = 0.4 * 15.7e12
"""FLOP/s that a V100, the paper's GPU, is taken to reach: 40 % of its 15.7 TFLOP/s in fp32."""
CORE = 60e9
"""FLOP/s that a CPU core is taken to reach: what `encoder-small` of these benchmarks reaches on one core in fp32."""
SPEEDS = (
    "GPU-hours: counted FLOPs (the attacks' steps included) at 40 % of a V100's 15.7 TFLOP/s in fp32; core-hours: at "
    "60 GFLOP/s a CPU core. Runs that tables share count in each of them, an encoder once a table; waiting for data "
    "and for other workers comes on top"
)


class Cost(Part):
    """What a table takes at one scale, from nothing."""

    digest: str
    """Of its recipes: what was counted for others is not believed."""
    encoders: float
    """FLOPs, as the next two."""
    decoders: float
    evaluation: float
    parameters: dict[str, int]
    """Trainable numbers of each run's decoder."""

    def hours(self, scale: ScaleName) -> float:
        """GPU-hours at full scale, core-hours at small."""
        total = self.encoders + self.decoders + self.evaluation
        return total / (GPU if scale == "full" else CORE) / 3600

    def text(self, scale: ScaleName) -> str:
        """`120 GPU-hours`, `1.5 core-hours`."""
        unit = "GPU-hours" if scale == "full" else "core-hours"
        return f"{float(f'{self.hours(scale):.2g}'):,g} {unit}"


def planned(definition: Definition, scale: ScaleName) -> Cost:
    """The cost that comes with arae, where it was counted for these very recipes; else counted now, in some seconds.

    InputError where a recipe, a network or a number of images is not there.
    """
    kept = _kept().get(f"{definition.id}.{scale}")
    return kept if kept and kept.digest == _digest(definition, scale) else count(definition, scale)


@cache
def _kept() -> dict[str, Cost]:
    if not KEPT.is_file():
        return {}
    return {name: Cost.model_validate(one) for name, one in json.loads(KEPT.read_text()).items()}


def recount(tables: Iterable[Definition]) -> None:
    """Count every table at every scale, and keep it for `planned`."""
    made = {f"{d.id}.{scale}": count(d, scale) for d in tables for scale in SCALES if getattr(d, scale)}
    document = {name: one.model_dump(mode="json") for name, one in made.items()}
    write_text(KEPT, json.dumps(document, indent=1) + "\n")
    _kept.cache_clear()


def _digest(definition: Definition, scale: ScaleName) -> str:
    """Of all that is trained and measured, whatever folder the runs lie in."""
    every = [r for trip in trips(definition, scale) for r in (trip.recipe, *trip.evaluations)]
    return digest_of([r.replace({"encoder.weights": None}).digest for r in every] + [definition.scale(scale).images])


def count(definition: Definition, scale: ScaleName) -> Cost:
    """Count the table's networks; InputError as for `planned`."""
    encoders: dict[str, float] = {}
    sizes: dict[str, int] = {}
    decoders = evaluation = 0.0
    for trip in trips(definition, scale):
        r = trip.recipe
        train, test, shape, classes = _counts(definition, scale, r)
        networks = _networks(r, shape, classes)
        images = r.encoder.total_steps(train) * r.encoder.batch
        encoders[r.stage_digest("encoder")] = images * networks.encoder_step(r.encoder.attack)
        if (part := r.decoder) and networks.decoder:
            sizes[trip.key] = parameters(networks.decoder)
            images = part.total_steps(train) * part.batch
            decoders += images * networks.decoder_step(part.batch // part.micro)
        for each in trip.evaluations:
            n = definition.scale(scale).images.get("files") if each.evaluate.images else each.evaluate.n
            evaluation += min(n or test, test) * _networks(each, shape, classes).evaluation()
    return Cost(
        digest=_digest(definition, scale),
        encoders=sum(encoders.values()),
        decoders=decoders,
        evaluation=evaluation,
        parameters=sizes,
    )


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
