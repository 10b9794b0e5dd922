"""The encoder: a classifier whose first layer normalises, and whose inner layers can be tapped as features.

A tap runs the network itself and leaves it at the tapped layer, so it costs only what comes before, shares its
parameters with the classifier, and works in every mode (no_grad, autograd, autocast, channels_last, train or eval).
"""

from __future__ import annotations

import copy
import difflib
import itertools
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from arae.errors import InputError
from arae.modes import evaluating

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SIGNED = 0.5  # mean and standard deviation that map [0, 1] to [-1, 1]
MOST_NAMES = 40  # layers that an error lists in full
LARGEST_TRIED = 1024  # pixels

Value = TypeVar("Value")
Rule = tuple[str, str | None]  # a pattern in published files' names, and our name for it; None: no part of the network
_UNFIT = (RuntimeError, ValueError, AssertionError)  # what networks raise for images that do not fit


class Encoder(nn.Module):
    """A classifier and its feature taps. Images are float in [0, 1], [N, C, H, W]; the first layer normalises them."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        net: nn.Module,
        *,
        layers: Mapping[str, str],
        layer: str,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        refused: Mapping[str, str] | None = None,
        published: Sequence[Rule] = (),
    ) -> None:
        """`layers`: tap -> path of the submodule of `net` whose output it is; `layer`: the default one.

        `refused`: submodule -> why it is no tap. `published`: see `own_names`.
        """
        super().__init__()
        self.name, self.layer, self.num_classes = name, layer, num_classes
        self.layers, self.refused, self.published = dict(layers), dict(refused or {}), tuple(published)
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images x [N, C, H, W] in [0, 1]. Raises InputError for images that do not fit."""
        return self._run_or_refuse(x, None)

    def features(self, x: Tensor, layer: str | None = None) -> Tensor:
        """Output [N, c, h, w] of a tap (default: the network's own, `self.layer`) for images x [N, C, H, W] in [0, 1].

        The layers after the tap are not run. Raises InputError for a tap that the network does not have, and for
        images that do not fit.
        """
        layer = layer or self.layer
        self._path(layer)
        return self._run_or_refuse(x, layer)

    def feature_shape(self, image_shape: Sequence[int], layer: str | None = None) -> tuple[int, int, int]:
        """(c, h, w) of a tap for images of shape (C, H, W), without arithmetic. Raises InputError as `features`."""
        layer = layer or self.layer
        self._path(layer)
        self.refuse_unfit(image_shape, layer)
        c, h, w = self._shape(image_shape, layer)[1:]
        return c, h, w

    def refuse_unfit(self, image_shape: Sequence[int], layer: str | None = None) -> None:
        """Raise InputError if images (C, H, W) do not fit the network up to `layer` (None: the whole classifier).

        The error names the smallest size that does.
        """
        self._refuse_channels(image_shape[0])
        try:
            self._shape(image_shape, layer)
        except _UNFIT as error:
            least = self.min_size(layer)
            too_small = least is not None and min(image_shape[1:]) < least
            said = (str(error) or type(error).__name__).splitlines()[0]
            why = f"it needs {least}×{least} px at least" if too_small else said
            what = f"encoder {self.name}" + (f" up to {layer}" if layer else "")
            raise InputError(f"{what} can't take images of shape {tuple(image_shape)}: {why}") from None

    def min_size(self, layer: str | None = None) -> int | None:
        """Side in pixels of the smallest square images that fit up to `layer` (None: the whole classifier).

        None where no size is a bound: a network made for images of one size.
        """

        def fits(side: int) -> bool:
            try:
                self._shape((self.mean.shape[1], side, side), layer)
            except _UNFIT:
                return False
            return True

        size = next((2**k for k in range(LARGEST_TRIED.bit_length()) if fits(2**k)), None)
        if size is None:
            return None
        low, high = size // 2, size  # low does not fit (or is 0), high does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def normalised_by(self, kind: Literal["encoder", "signed"]) -> Encoder:
        """The same network under another normalisation of its images: "encoder" is its own and returns the encoder.

        "signed" is 2x - 1, which the authors' scripts feed their encoder with. The two share parameters, buffers and
        mode; move the encoder to its device first.
        """
        if kind == "encoder":
            return self
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other.mean, other.std = torch.full_like(self.mean, SIGNED), torch.full_like(self.std, SIGNED)
        return other

    def layers_in_words(self) -> str:
        """The taps, for a message: all of them, or the outer ones and how many lie inside those."""
        names = list(self.layers)
        depth = max(name.count(".") for name in names)
        while depth and len(names) > MOST_NAMES:
            names, depth = [name for name in names if name.count(".") < depth], depth - 1
        inside = len(self.layers) - len(names)
        return ", ".join(names) + (f", and {inside} layers inside these" if inside else "")

    def _run_or_refuse(self, x: Tensor, layer: str | None) -> Tensor:
        self._refuse_channels(x.shape[1])  # a single channel would be spread over three without a word
        try:
            return self._run(x, layer)
        except _UNFIT:
            self.refuse_unfit(x.shape[1:], layer)
            raise  # the images fit: it was something else

    def _run(self, x: Tensor, layer: str | None) -> Tensor:
        x = (x - self.mean) / self.std
        return self.net(x) if layer is None else output_at(self.net, self.layers[layer], x)

    def _shape(self, image_shape: Sequence[int], layer: str | None) -> torch.Size:
        """Shape of the output for one image, run without data."""
        with evaluating(self):
            image = torch.empty(1, *image_shape, device="meta", dtype=self.mean.dtype)
            return without_data(_Run(self, layer), image).shape

    def _refuse_channels(self, channels: int) -> None:
        wanted = self.mean.shape[1]
        if channels != wanted:
            raise InputError(
                f"encoder {self.name} takes images of {wanted} channel(s), not {channels}: "
                f"set data.channels to {wanted}"
            )

    def _path(self, layer: str) -> str:
        if layer in self.layers:
            return self.layers[layer]
        as_deep = [name for name in self.layers if name.count(".") == layer.count(".")]
        near = difflib.get_close_matches(layer, as_deep, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        fault = f"can't tap {layer!r}, which {self.refused[layer]}" if layer in self.refused else f"has no {layer!r}"
        raise InputError(f"encoder.layer: encoder {self.name} {fault}: {hint}its layers are {self.layers_in_words()}")


def output_at(net: nn.Module, path: str, x: Tensor) -> Tensor:
    """What the submodule `path` of `net` gives first for the input x; the rest of `net` is not run."""
    found: list[Tensor] = []
    mine = threading.get_ident()

    def leave(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if threading.get_ident() != mine:  # another thread's pass through the same network
            return
        found.append(output)
        raise _Reached

    with net.get_submodule(path).register_forward_hook(leave):
        try:
            net(x)
        except _Reached:
            return found[0]
    raise RuntimeError(f"{path} was not run")


def without_data(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output for x on the meta device: shapes without arithmetic; the module stays where it is."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    with torch.no_grad():
        return functional_call(module, {name: torch.empty_like(t, device="meta") for name, t in tensors}, (x,))


def own_names(encoder: Encoder, weights: Mapping[str, Value]) -> dict[str, Value]:
    """Weights of a published file under the names of `encoder.net`, by the encoder's own rules (`published`).

    A rule renames, or leaves out a part of the file that the network never runs (the auxiliary classifiers of
    GoogLeNet, the unused copy of block1 in TRADES' WideResNet). All other names stay as they are.
    """
    named: dict[str, Value] = {}
    for name, value in weights.items():
        new: str | None = name
        for pattern, ours in encoder.published:
            if new is not None and re.search(pattern, new):
                new = None if ours is None else re.sub(pattern, ours, new)
        if new is not None:
            named[new] = value
    return named


class _Reached(Exception):  # noqa: N818 -- no error
    """The tapped layer has run."""


class _Run(nn.Module):
    """An encoder up to a layer, without its checks: those would ask for it again."""

    def __init__(self, encoder: Encoder, layer: str | None) -> None:
        super().__init__()
        self.encoder, self.layer = encoder, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder._run(x, self.layer)
