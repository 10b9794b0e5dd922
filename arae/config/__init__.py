"""The recipe: one typed, frozen, hashable document that says what to compute.

A recipe describes one trip from images to records: data, encoder, decoder, evaluation. *Where* to run it (workers,
device, address, run folder) is not part of it. YAML files and bare dotted overrides (`encoder.attack.eps=1.5`) share
one grammar.
"""

from arae.config.base import Augment, Count, Fraction01, Norm, Part, Positive, Radius, check_radius, parse_radius
from arae.config.document import digest_of, flatten, keys, models_in
from arae.config.load import difference, dump_recipe, load_options, load_recipe, shipped_recipes
from arae.config.schema import Data, EngineChoice, Evaluate, Inversion, Map, Recipe, State
from arae.config.stages import (
    Attack,
    Comparator,
    Decoder,
    Encoder,
    Guard,
    Losses,
    Objective,
    Phase,
    Preset,
    Schedule,
    Span,
    Stage,
)

__all__ = [
    "Attack",
    "Augment",
    "Comparator",
    "Count",
    "Data",
    "Decoder",
    "Encoder",
    "EngineChoice",
    "Evaluate",
    "Fraction01",
    "Guard",
    "Inversion",
    "Losses",
    "Map",
    "Norm",
    "Objective",
    "Part",
    "Phase",
    "Positive",
    "Preset",
    "Radius",
    "Recipe",
    "Schedule",
    "Span",
    "Stage",
    "State",
    "check_radius",
    "difference",
    "digest_of",
    "dump_recipe",
    "flatten",
    "keys",
    "load_options",
    "load_recipe",
    "models_in",
    "parse_radius",
    "shipped_recipes",
]
