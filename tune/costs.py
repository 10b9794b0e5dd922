"""What stages of a sweep cost: hours of a device, and bytes. Counted for each stage, measured once for each network."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median

from arae.config import Decoder, Recipe, digest_of
from arae.cost import ADAM, FLOAT, SGD, Networks, Shape, parameters
from arae.launch import Where
from arae.plan import counted, decoder_speed, encoder_speed, refuse_unshared, stage_plans
from arae.train.engine import Engine
from arae.train.probe import PICTURES
from tune.store import Stage

AIM_S = 0.2
"""What a timing of a network is meant to take; with three of them, a network takes about a second."""
LIMIT_S = 6.0
"""Once so much went into timings, networks of a kind that was timed are taken to be as fast as those were."""


@dataclass(frozen=True)
class Cost:
    """One stage by itself."""

    training: float
    """Hours of a device: workers times hours."""
    evaluation: float
    """Hours of a device; 0 where nothing is measured of it."""
    weights: int
    """Bytes of its model folder."""
    states: int
    """Bytes of the states that it keeps while it trains, or waits on a rung."""
    pictures: int
    """Bytes at most of the pictures of its looks at held-out images."""


class Costs:
    """The costs of stages on the devices of `where`; of a CPU, each worker has the cores that a sweep would give it."""

    def __init__(self, where: Where) -> None:
        self.device, self.workers = where.torch_device(), where.workers or 1
        self.threads = (where.cpus or 1) if self.device.type == "cpu" else None
        self.precisions = dict[str, None]()
        """Those that were met, in order."""
        self.timed = self.assumed = 0
        """Networks whose speed was measured, and was taken from others."""
        self._networks: dict[str, Networks] = {}
        self._counts: dict[tuple[str, str], tuple[int, Shape, int]] = {}
        self._speeds: dict[tuple[Hashable, ...], float] = {}
        self._spent = 0.0

    def of(self, stage: Stage) -> Cost:
        """What a stage costs that nobody has trained yet.

        InputError as of `arae.plan.plan_recipe`.
        """
        refuse_unshared(stage.recipe, self.workers)
        # What is measured may be less than the recipe says: of an encoder no reconstructions.
        recipe = stage.evaluation or stage.recipe
        n_train, shape, classes = self._counted(recipe, "train")
        n_test = 0
        if stage.evaluation is not None:
            n_test = recipe.evaluate.n or self._counted(recipe, "test")[0]
        networks = self._networks_of(recipe, shape, classes)
        plans = list(stage_plans(recipe, networks, n_train, n_test, self.workers, self._both(networks)))
        own = plans[0 if stage.name == "encoder" else 1]
        evaluation = plans[-1].hours if n_test else 0.0
        weights, states = _bytes(recipe, networks)
        pictures = _pictures(recipe.decoder, recipe.evaluate.looks, n_train, shape) if recipe.decoder else 0
        return Cost(own.hours * self.workers, evaluation, weights, states, pictures)

    def _counted(self, recipe: Recipe, split: str) -> tuple[int, Shape, int]:
        key = (recipe.data.model_dump_json(), split)
        if key not in self._counts:
            self._counts[key] = counted(recipe, split)[:3]
        return self._counts[key]

    def _networks_of(self, recipe: Recipe, shape: Shape, classes: int) -> Networks:
        """The recipe's networks, made and counted once for all recipes whose networks and passes are the same."""
        key = digest_of([shape, classes, *_architecture(recipe)])
        if key not in self._networks:
            self._networks[key] = Networks(recipe, shape, classes)
        found = self._networks[key]
        found.recipe = recipe  # of which the attacks, the objective and what is evaluated are read
        return found

    def _both(self, networks: Networks) -> tuple[float, float]:
        """FLOP/s of a worker on encoder and decoder."""
        recipe, engine = networks.recipe, Engine(self.device, networks.recipe.precision)
        self.precisions[engine.precision] = None
        part = recipe.encoder
        key = ("encoder", part.name, part.width, networks.shape, networks.encoder.num_classes, part.micro)
        first = self._speed((*key, engine.precision), lambda: encoder_speed(networks, engine, self.threads, AIM_S))
        if recipe.decoder is None:
            return first, first
        part = recipe.decoder
        key = ("decoder", part.name, networks.feature_shape, networks.shape, part.micro)
        return first, self._speed(
            (*key, engine.precision), lambda: decoder_speed(networks, engine, self.threads, AIM_S)
        )

    def _speed(self, key: tuple[Hashable, ...], measure: Callable[[], float]) -> float:
        if key not in self._speeds:
            known = [speed for other, speed in self._speeds.items() if other[0] == key[0]]
            if known and self._spent > LIMIT_S:
                self.assumed += 1
                self._speeds[key] = median(known)
            else:
                begun = time.monotonic()
                self._speeds[key] = measure()
                self._spent += time.monotonic() - begun
                self.timed += 1
        return self._speeds[key]


def _architecture(recipe: Recipe) -> tuple[object, ...]:
    """All that networks and the passes through them depend on, the images apart."""
    part, decoder = recipe.encoder, recipe.decoder
    encoder = [part.name, part.width, part.layer]
    if decoder is None:
        return (encoder,)
    terms = [decoder.losses.preset, bool(decoder.losses.feature), bool(decoder.losses.adversarial)]
    comparator = decoder.comparator.model_dump() if decoder.comparator else None
    return encoder, decoder.name, decoder.normalisation, comparator, terms


def _bytes(recipe: Recipe, networks: Networks) -> tuple[int, int]:
    """Of the model folder, and of the states kept: the newest, the best, and one being written.

    A decoder's folder holds its encoder too, but none of the encoder's states.
    """
    encoder = model = parameters(networks.encoder)
    state = encoder * (1 + SGD + bool(recipe.encoder.ema))
    if recipe.decoder is not None:
        assert networks.decoder is not None
        decoder = parameters(networks.decoder)
        trained = decoder + (parameters(networks.discriminator) if networks.discriminator else 0)
        model, state = encoder + decoder, trained * (1 + ADAM) + decoder * bool(recipe.decoder.ema)
    return model * FLOAT, state * (recipe.state.keep + 2) * FLOAT


def _pictures(decoder: Decoder, looks: int | None, n_train: int, shape: Shape) -> int:
    """At most: a look leaves a picture of some images and what is made of them, before PNG packs it."""
    epochs = decoder.total_steps(n_train) * decoder.batch // n_train
    count = looks or epochs // max(1, epochs // 10) + 1
    return count * 2 * PICTURES * shape[0] * shape[1] * shape[2]
