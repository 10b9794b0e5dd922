"""Checkpoints of other projects as our networks: classifiers by their state dicts, and the authors' generators.

A name that belongs to no layer is an error that lists what was left over on both sides. Only what the networks of
those projects do not run is left out: an attacker's copies of the weights, dense layers beside a generator.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arae.errors import InputError
from arae.models.blocks import Decoder
from arae.models.decoder import create_decoder
from arae.models.discriminator import Discriminator, create_discriminator
from arae.models.encoder import ENCODERS, create_encoder
from arae.models.generators import LAYOUTS
from arae.models.taps import Encoder, own_names
from arae.models.weights import load_exactly

STATE_DICTS = ("model", "state_dict", "model_state_dict", "net")  # where checkpoints keep their state dict
PREFIXES = ("module.", "model.", "net.")  # of wrappers: DataParallel, a normalising module, our own encoder
_NORMALISER = re.compile(r"(?:module\.)?(?:normali[sz]er?\.)?(?:new_)?(mean|mu|std|sigma)")

OLD_SPECTRAL_NORM = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}
"""Names of `torch.nn.utils.spectral_norm` -> of the parametrisation, which divides by the same σ = uᵀ W v."""

WAVELET_CONVS = (
    *("conv7_1", "conv6_1", "conv5_1", "conv5_2", "conv4_1", "conv4_2", "conv3_1"),
    *("conv2", "conv2_1", "conv1", "conv1_1"),
)
"""The wavelet generator's convolutions in the order they run; each but the last has its batch norm."""
WAVELET_ENCODER = {"conv1_1": 0, "conv2_1": 3, "conv3_1": 6, "conv3_2": 8, "conv3_3": 10}
"""The wavelet encoder's convolutions -> AlexNet's `features.N`."""
HAAR = {"LL": [[1, 1], [1, 1]], "LH": [[-1, 1], [-1, 1]], "HL": [[-1, -1], [1, 1]], "HH": [[1, -1], [-1, 1]]}
"""Twice the fixed filters that the authors' files keep."""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Classifier:
    """A classifier's weights in single precision, without prefixes, and the normalisation the file brings, if any."""

    weights: Weights
    mean: Tensor | None
    std: Tensor | None


@dataclass(frozen=True)
class Generator:
    """What the authors' generator file holds."""

    decoder: Decoder
    encoder_part: Weights
    """The convolutions of the encoder it was trained on, under AlexNet's names."""
    discriminator: Discriminator | None
    signed: bool
    """Its encoder's images were 2x - 1: the file has no mean and deviation of its own."""


def is_generator(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is one of the authors' generator files."""
    model = content.get("model")
    return isinstance(model, Mapping) and any(re.match(r"(module\.)?generator\.", str(key)) for key in model)


def read_classifier(content: Mapping[str, Any], where: object) -> Classifier:
    """The classifier's weights in a checkpoint. Raises InputError where there is none, or no telling which."""
    found = state_dict(content, where)
    if any(key.startswith("module.model.") for key in found):  # the robustness library: its attacker has copies of all
        found = {key: value for key, value in found.items() if not key.startswith("module.attacker.")}
    means, stds = _normalisers(found, ("mean", "mu")), _normalisers(found, ("std", "sigma"))
    for values in (means, stds):
        if any(not torch.equal(value.flatten(), next(iter(values.values())).flatten()) for value in values.values()):
            raise InputError(f"{where}: normalises in two ways ({', '.join(values)} differ); leave one in the file")
    rest = {key: value for key, value in found.items() if key not in means and key not in stds}
    while rest and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in rest)), None)):
        rest = {key.removeprefix(prefix): value for key, value in rest.items()}
    return Classifier(rest, next(iter(means.values()), None), next(iter(stds.values()), None))


def state_dict(content: Mapping[str, Any], where: object) -> Weights:
    """The one state dict of a checkpoint, in single precision.

    Raises InputError where it holds none or several, or values that are not finite.
    """
    places = [None, *STATE_DICTS]
    dicts = {place: content if place is None else content.get(place) for place in places}
    found = {place: value for place, value in dicts.items() if _all_tensors(value)}
    if len(found) != 1:
        held = "several state dicts: " + ", ".join(map(str, found)) if found else f"no state dict under {STATE_DICTS}"
        keys = ", ".join(map(str, list(content)[:12])) or "nothing"
        raise InputError(f"{where}: holds {held} (it has {keys}); save the state dict that you want alone")
    weights = {str(key): value for key, value in dict(next(iter(found.values())) or {}).items()}
    weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    bad = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise InputError(f"{where}: {bad[0]} and {len(bad) - 1} others hold values that are not finite; get it anew")
    return weights


def recognise(weights: Weights, where: object, *, channels: int, width: float) -> str:
    """The one network of arae's own whose layers these are.

    Raises InputError where there is none, with what the nearest lacks, or several.
    """
    names = [name for name in ENCODERS if "/" not in name and name != "alexnet-wavelet"]  # that has AlexNet's names
    misfits: dict[str, int] = {}
    for name in names:
        if channels == 3 or name not in ("alexnet", "vgg16"):
            blank, head = _blank(name, channels, width)
            misfits[name] = _misfits(own_names(blank, weights), blank.net, head)
    fitting = [name for name, misfit in misfits.items() if not misfit]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(f"{where}: could be {' or '.join(fitting)}; say which with name=")
    nearest = min(misfits, key=lambda name: misfits[name])
    try:
        build_encoder(nearest, weights, where, channels=channels, width=width)
    except InputError as error:
        others = f"that was the nearest of {', '.join(misfits)}: name=torchvision/… says others"
        raise InputError(f"{error}; {others}") from None
    raise AssertionError("a network that misfits was loaded")


def build_encoder(name: str, weights: Weights, where: object, *, channels: int, width: float) -> Encoder:
    """The encoder `name` with these weights. Raises InputError that lists what was left over on both sides."""
    encoder = create_encoder(name, classes_of(name, weights, channels, width), channels, width=width)
    load_exactly(encoder.net, own_names(encoder, weights), str(where))
    return encoder


def classes_of(name: str, weights: Weights, channels: int, width: float) -> int:
    """Classes of a network by the weights of its last layer; 2 at the least."""
    blank, head = _blank(name, channels, width)
    named = own_names(blank, weights)
    sides = [named[key].shape[axis] for key, axis in head.items() if key in named and named[key].ndim > axis]
    return max(2, sides[0]) if sides else 2


@functools.cache
def _blank(name: str, channels: int, width: float) -> tuple[Encoder, dict[str, int]]:
    """A network of 2 classes without data, and the axis of the classes in each weight that has one."""
    with torch.device("meta"):
        two, three = (create_encoder(name, n, channels, width=width) for n in (2, 3))
    pairs = zip(two.net.state_dict().items(), three.net.state_dict().values(), strict=True)
    axes = {key: [i for i, side in enumerate(a.shape) if side != b.shape[i]] for (key, a), b in pairs}
    return two, {key: differing[0] for key, differing in axes.items() if differing}


def read_generator(content: Mapping[str, Any], where: object, name: str | None) -> Generator:
    """The authors' generator file; `name`: the decoder, recognised by its layers where it is None.

    Raises InputError that lists what was left over on both sides.
    """
    whole = state_dict({"model": content["model"]}, where)
    whole = {key.removeprefix("module."): value for key, value in whole.items()}
    parts = {part: _below(whole, part) for part in ("generator.", "classifier.", "normalize.")}
    _none_left((key for key in whole if not key.startswith(tuple(parts))), where)
    generator = {key: value for key, value in parts["generator."].items() if not re.match(r"linear[123]\.", key)}
    generator = _without_filters(generator, "unpool", where)
    wavelet = "conv7_1" in _groups(generator)
    order = _wavelet_order() if wavelet else sorted(_groups(generator), key=_place)
    known = ["alexnet-wavelet"] if wavelet else [each for each in LAYOUTS if each.startswith("alexnet-")]
    first = generator.get(f"{order[0]}.weight_orig") if order else None
    fitting = [] if first is None else [n for n in known if n in LAYOUTS and LAYOUTS[n].features[0] == first.shape[1]]
    decoder, weights = _best([name] if name else fitting or known, generator, order)
    load_exactly(decoder, weights, str(where))
    encoder_part = _without_filters(parts["classifier."], "pool", where)
    if wavelet:
        pairs = [(key.rpartition("."), value) for key, value in encoder_part.items()]
        encoder_part = {f"features.{WAVELET_ENCODER.get(k[0], k[0])}.{k[2]}": value for k, value in pairs}
    return Generator(decoder, encoder_part, _discriminator(content, where), signed=not parts["normalize."])


def _discriminator(content: Mapping[str, Any], where: object) -> Discriminator | None:
    if content.get("discriminator") is None:
        return None
    found = {k.removeprefix("module."): v for k, v in state_dict({"model": content["discriminator"]}, where).items()}
    discriminator = create_discriminator("alexnet-conv5")
    order = sorted(_groups(found), key=lambda group: (group.partition(".")[0] != "features", _place(group)))
    load_exactly(discriminator, _in_our_names(found, order, discriminator), str(where))
    return discriminator


def _best(names: list[str], weights: Weights, order: list[str]) -> tuple[Decoder, Weights]:
    """The decoder whose layers misfit the least, and the weights under its names."""
    decoders = [create_decoder(name) for name in names]
    renamed = [_in_our_names(weights, order, decoder) for decoder in decoders]
    pairs = list(zip(decoders, renamed, strict=True))
    return min(pairs, key=lambda pair: _misfits(pair[1], pair[0]))


def _in_our_names(weights: Weights, order: list[str], model: nn.Module) -> Weights:
    """Weights of layers that come in the given order, under the names of the model's layers in theirs.

    What is beyond the order, or beyond the model's layers, keeps its name and so is left over.
    """
    ours = list(dict.fromkeys(re.sub(r"\.(parametrizations\..*|[^.]+)$", "", key) for key in model.state_dict()))
    place = {group: ours[i] for i, group in enumerate(order) if i < len(ours)}
    split = [(key.rpartition("."), value) for key, value in weights.items()]
    return {f"{place.get(k[0], k[0])}.{OLD_SPECTRAL_NORM.get(k[2], k[2])}": value for k, value in split}


def _wavelet_order() -> list[str]:
    return [name for conv in WAVELET_CONVS for name in (conv, conv.replace("conv", "bn"))][:-1]


def _without_filters(weights: Weights, kind: str, where: object) -> Weights:
    """The weights without the fixed Haar filters. Raises InputError where those are not Haar's."""
    rest = {}
    for key, value in weights.items():
        if not (found := re.fullmatch(rf"{kind}\d\.(LL|LH|HL|HH)\.weight", key)):
            rest[key] = value
        elif value.shape[1:] != (1, 2, 2) or (value - torch.tensor(HAAR[found[1]]) / 2).abs().max() > 1e-5:
            raise InputError(f"{where}: {key} is no Haar filter: this network is another than the authors'")
    return rest


def _normalisers(weights: Weights, names: tuple[str, ...]) -> Weights:
    return {key: v for key, v in weights.items() if (found := _NORMALISER.fullmatch(key)) and found[1] in names}


def _misfits(weights: Weights, model: nn.Module, head: Mapping[str, int] | None = None) -> int:
    """How many names or shapes differ; the shapes of weights in `head` may."""
    own = {key: value.shape for key, value in model.state_dict().items()}
    shapes = sum(key in weights and weights[key].shape != own[key] for key in own if key not in (head or ()))
    return shapes + len(own.keys() ^ weights.keys())


def _below(weights: Weights, prefix: str) -> Weights:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _groups(weights: Weights) -> list[str]:
    """The layers, in the order of the file."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in weights))


def _place(layer: str) -> tuple[str, int]:
    """What sorts `gen.2` before `gen.10`."""
    block, _, number = layer.rpartition(".")
    return block, int(number) if number.isdigit() else -1


def _none_left(keys: Iterable[str], where: object) -> None:
    left = list(keys)
    if left:
        raise InputError(f"{where}: not the authors' generator file: it has besides {', '.join(left[:8])}")


def _all_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())
