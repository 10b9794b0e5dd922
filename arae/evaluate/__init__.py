"""Measure a trained run on held-out images: a model and a recipe in, records out.

`run` reads the recipe's protocol; `mapping`, `upscale`, `highres` (with `tiles`) and `inversion` measure; `measure`
turns what they found into records.
"""

from arae.evaluate.inversion import invert
from arae.evaluate.mapping import Evaluation
from arae.evaluate.measure import Recorder, described, loss_weights, name_of, threat_of
from arae.evaluate.quality import Quality
from arae.evaluate.run import evaluate, held_out

__all__ = [
    "Evaluation",
    "Quality",
    "Recorder",
    "described",
    "evaluate",
    "held_out",
    "invert",
    "loss_weights",
    "name_of",
    "threat_of",
]
