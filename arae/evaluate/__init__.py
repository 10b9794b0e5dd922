"""Measure a trained run on held-out images: a model and a recipe in, records out.

`run` reads the recipe's protocol; `batches` is what is measured of one batch, here or on a worker; `mapping`,
`upscale`, `highres` (with `tiles`) and `inversion` measure; `measure` turns what they found into records.
"""

from arae.evaluate.batches import Batches, Team, Workers, alone
from arae.evaluate.inversion import invert
from arae.evaluate.mapping import Evaluation
from arae.evaluate.measure import Recorder, described, loss_weights, name_of, threat_of
from arae.evaluate.quality import Quality
from arae.evaluate.run import evaluate, held_out

__all__ = [
    "Batches",
    "Evaluation",
    "Quality",
    "Recorder",
    "Team",
    "Workers",
    "alone",
    "described",
    "evaluate",
    "held_out",
    "invert",
    "loss_weights",
    "name_of",
    "threat_of",
]
