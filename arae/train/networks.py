"""Which networks the decoder's stage trains and compares with, derived from the recipe and the images' shape.

Training, `validate` and `plan` all ask here, so that they cannot disagree.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from arae.config import Comparator, Decoder, Losses, Recipe
from arae.errors import InputError
from arae.models import Encoder, create_decoder, create_discriminator, create_encoder
from arae.models.autoencoder import load_encoder, read_config
from arae.models.taps import own_names
from arae.models.wavelet import WaveletCode, WaveletEncoder
from arae.models.weights import read_weights
from arae.precision import full
from arae.runs import runs_root
from arae.storage import fetched
from arae.train import losses

Shape = tuple[int, int, int]
RUN = "run:"


@dataclass(frozen=True)
class Decoding:
    """The decoder's stage for images of one shape: what is decoded, what is compared, and what counts how much."""

    part: Decoder
    layers: str
    """The encoder's taps, in words."""
    layer: str
    images: Shape
    features: Shape
    """What the decoder decodes."""
    compared: Shape
    """What the feature loss and the discriminator compare."""
    weights: Losses
    """The preset, if any, resolved."""

    @property
    def apart(self) -> bool:
        """Whether the images are encoded a second time, for what is compared is not what is decoded."""
        return self.part.comparator is not None or self.part.normalisation != "encoder"

    def generator(self) -> nn.Module:
        """The decoder, with random weights; InputError, with the layers there are, where it can't fit them."""
        try:
            made = create_decoder(self.part.name, feature_shape=self.features, image_shape=self.images)
            # On tensors without data: a look must move neither running statistics nor spectral norm's vectors.
            bare = copy.deepcopy(made).to("meta").eval()
            shape = tuple(bare(torch.empty(1, *self.features, device="meta")).shape[1:])
            if shape != self.images:
                raise InputError(f"it makes images of shape {shape}, not {self.images}")
            if self.part.recompute > 1:
                made.recompute(self.part.recompute)
        except InputError as error:
            raise self._refusal("decoder", str(error)) from None
        return made

    def discriminator(self) -> nn.Module | None:
        """The discriminator that goes with the decoder; None where no adversarial loss asks for one."""
        if not self.weights.adversarial:
            return None
        try:
            return create_discriminator(self.part.name, feature_shape=self.compared, image_shape=self.images)
        except InputError as error:
            raise self._refusal("discriminator", str(error)) from None

    def _refusal(self, kind: str, why: str) -> InputError:
        return InputError(
            f"decoder.name = {self.part.name}: no {kind} for features {self.features} at {self.layer} ({why}); "
            f"set decoder.name to mirror, or encoder.layer to another of {self.layers}"
        )


def decoding(recipe: Recipe, encoder: Encoder, comparator: Encoder | None, images: Shape) -> Decoding:
    """What the recipe's decoder does for images (C, H, W) encoded by `encoder`.

    comparator: the recipe's, with any weights; None where it has none. InputError for layers that do not exist.
    """
    part = recipe.decoder
    assert part is not None
    features = compared = encoder.feature_shape(images, recipe.encoder.layer)
    if part.comparator is not None:
        assert comparator is not None, "the recipe has a comparator: load_comparator"
        compared = comparator.feature_shape(images, part.comparator.layer)
    weights = losses.resolved(part.losses, math.prod(images), math.prod(compared))
    layer = recipe.encoder.layer or encoder.layer
    return Decoding(part, encoder.layers_in_words(), layer, images, features, compared, weights)


def code(encoder: Encoder, images: Tensor, layer: str | None) -> Tensor | WaveletCode:
    """What a decoder decodes, in float32: the features, or a wavelet encoder's code with the details it left."""
    read = encoder.coded if isinstance(encoder, WaveletEncoder) else encoder.features
    made = read(images, layer)
    return made.full() if isinstance(made, WaveletCode) else full(made)


def load_comparator(part: Comparator | None, images: Shape) -> Encoder | None:
    """The frozen comparator for images (C, H, W), on the CPU; None where the recipe has none.

    InputError where its weights are missing or those of another network, or it has no such layer.
    """
    if part is None:
        return None
    where, config = located(part.weights), read_config(model_folder(part.weights))
    if where.is_dir() and (config is None or "encoder" not in config):
        raise InputError(f"decoder.comparator.weights = {where}: no model there; train or import one, or name a file")
    if config is not None:
        name = config["encoder"]["name"]
        if name != part.name:
            raise InputError(f"decoder.comparator.name = {part.name}, but {where} holds {name}: set it to {name}")
        made = load_encoder(model_folder(part.weights), config)
    else:
        made = create_encoder(part.name, _classes(part, images[0]), images[0], images[1], pretrained=where)
    made.feature_shape(images, part.layer)
    return made.eval().requires_grad_(False)


def _classes(part: Comparator, channels: int) -> int:
    """The number of classes in a file of weights: the length of the network's last bias there."""
    like = create_encoder(part.name, 2, channels)
    weights = own_names(like, read_weights(located(part.weights)))
    last = list(like.net.state_dict())[-1]
    found = weights.get(last, weights.get(f"net.{last}"))
    return len(found) if found is not None and found.dim() == 1 else 1000  # 1000: the refusal says what is missing


def located(where: str) -> Path:
    """The path that a recipe's `weights` name: `run:NAME` is the run of that name, wherever the runs lie."""
    if not where.startswith(RUN):
        return Path(where)
    path = runs_root() / where.removeprefix(RUN)
    return path if path.exists() else fetched(path)


def model_folder(where: str) -> Path:
    """The model folder of a run folder; else the path itself."""
    path = located(where)
    return path / "model" if (path / "model").is_dir() else path


def weights_file(where: str) -> Path:
    """The file of an encoder's weights: in a run folder or a model folder, or the path itself."""
    return model_folder(where) / "encoder.safetensors" if located(where).is_dir() else located(where)


def sha256_of(where: str) -> str:
    """SHA-256 of an encoder's file of weights."""
    with weights_file(where).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
