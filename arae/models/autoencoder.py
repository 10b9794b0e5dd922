"""Encoder and decoder as one: images to features and back; and the model folder they are kept in.

A model folder holds `config.json`, `encoder.safetensors` and, once there is one, `decoder.safetensors`. The config
names each file's sha256 and the training that earned it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from arae.errors import InputError
from arae.files import write_bytes, write_text
from arae.models import Decoder, Encoder, create_decoder, create_encoder
from arae.models.fit import Fit
from arae.models.wavelet import WaveletCode, WaveletEncoder

Packed = tuple[dict[str, Any], list[dict[str, Tensor]]]
SLACK = 1e-3  # that images may lie outside [0, 1]: the rounding of half precision


class Autoencoder:
    """A frozen encoder and the decoder that inverts it. Calls keep no gradients and change no mode."""

    def __init__(self, encoder: Encoder, decoder: Decoder | None, config: Mapping[str, Any]) -> None:
        """`config`: the model folder's; see `save_part`."""
        self.encoder = encoder.eval().requires_grad_(False)
        self.decoder = decoder.eval().requires_grad_(False) if decoder is not None else None
        self.config = dict(config)
        self.layer: str = config["encoder"]["layer"]
        self.image_shape: tuple[int, int, int] = tuple(config["image_shape"])
        self.normalisation: Literal["encoder", "signed"] = config.get("decoder", {}).get("normalisation", "encoder")
        self._fit = Fit(self.encoder, self.layer, self.decoder) if self.decoder is not None else None

    def packed(self) -> Packed:
        """Config and weights, on the CPU, to be sent elsewhere: networks with spectral norm can't be pickled."""
        parts = [part for part in (self.encoder, self.decoder) if part is not None]
        return self.config, [{k: v.detach().cpu() for k, v in part.state_dict().items()} for part in parts]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.encoder.parameters()).device

    def to(self, device: torch.device) -> Autoencoder:
        """Move the networks; returns itself."""
        self.encoder.to(device)
        if self.decoder is not None:
            self.decoder.to(device)
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor | WaveletCode:
        """Features [N, c, h, w] at the tap, of images x [N, C, H, W] float in [0, 1]; h and w grow with H and W.

        Images are normalised as the decoder's training had it. Wavelet encoders give a `WaveletCode`. Raises ValueError
        for anything that is not a batch of such images, NaN among it; InputError for images that are too small.
        """
        self._refuse_other_than_images(x)
        return self._encoded(x)

    @torch.no_grad()
    def decode(self, z: Tensor | WaveletCode) -> Tensor:
        """Images [N, C, H, W] in [0, 1] from features. Raises InputError where there is no decoder."""
        if self.decoder is None:
            raise InputError("this model has no decoder yet: train one with a recipe that has a `decoder`")
        return self.decoder(z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """`decode(encode(x))` at the size of x, whatever that is: [N, C, H, W] in [0, 1].

        Where that size would not come back, the images are padded to the next one that does, at the right and the
        bottom by repeating the edge (as the authors' code does), and the result is cropped; nothing is resized. Errors
        as in `encode`, `decode` and `fitting_size`.
        """
        self._refuse_other_than_images(x)
        height, width = x.shape[2:]
        tall, wide = self.fitting_size(height, width)
        if (tall, wide) == (height, width):
            return self.decode(self._encoded(x))
        padded = F.pad(x, (0, wide - width, 0, tall - height), mode="replicate")
        return self.decode(self._encoded(padded))[:, :, :height, :width]

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """The smallest (H, W) at or above height×width that comes back from `decode(encode(x))` as it went in.

        Raises InputError where there is none (a decoder that enlarges by another factor than the encoder reduces by,
        such as DeePSiM's, fits up to its training size alone), and where there is no decoder.
        """
        if self._fit is None:
            raise InputError("this model has no decoder yet: train one with a recipe that has a `decoder`")
        return self._fit.size(height, width)

    def _encoded(self, x: Tensor) -> Tensor | WaveletCode:
        encoder = self.encoder.normalised_by(self.normalisation)
        return (encoder.coded if isinstance(encoder, WaveletEncoder) else encoder.features)(x, self.layer)

    def _refuse_other_than_images(self, x: Tensor) -> None:
        channels = self.image_shape[0]
        if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point() or not x.numel():
            raise ValueError(f"images must be float [N, {channels}, H, W] in [0, 1], not {x.dtype} {list(x.shape)}")
        low, high = (bound.item() for bound in x.aminmax())  # both are NaN where any pixel is
        if not (low >= -SLACK and high <= 1 + SLACK):
            raise ValueError(f"images must lie in [0, 1], not from {low:g} to {high:g}: divide 8-bit images by 255")


def save_part(
    folder: Path, part: str, weights: Mapping[str, Tensor], entry: Mapping[str, Any], common: Mapping[str, Any]
) -> None:
    """Write `<part>.safetensors` and its entry in `config.json`, the weights first: a config names only what is there.

    An entry holds `name`, `digest`, `steps`, `training` and, for the encoder, `layer` and `num_classes`; `common` holds
    `image_shape`, `classes`, `train_norm` and `train_eps`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors(dict(weights))
    write_bytes(folder / f"{part}.safetensors", data)
    config = read_config(folder) or {}
    if part == "encoder":
        config.pop("decoder", None)  # it inverted another encoder
    config |= {"format": 1, **common, part: {**entry, "sha256": hashlib.sha256(data).hexdigest()}}
    write_text(folder / "config.json", json.dumps(config, indent=1))


def read_config(folder: Path) -> dict[str, Any] | None:
    """The model folder's config; None where there is none."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise InputError(f"{folder / 'config.json'}: not JSON; delete the folder to train anew") from None


def load_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file; InputError where it is missing, damaged, or not the one its config names."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: no weights ({error.strerror})") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(
            f"{path}: sha256 differs from config.json's: the file was changed or damaged; train or export it again"
        )
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None


def load_encoder(folder: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Encoder:
    """The encoder of a model folder, on the CPU, its weights in `dtype`."""
    encoder = _new_encoder(config).to(dtype)
    encoder.load_state_dict(load_weights(folder / "encoder.safetensors", config["encoder"]["sha256"]))
    return encoder


def _new_encoder(config: Mapping[str, Any]) -> Encoder:
    """The encoder of a config, with random weights."""
    entry = config["encoder"]
    channels, size, _ = config["image_shape"]
    return create_encoder(
        entry["name"],
        num_classes=entry["num_classes"],
        in_channels=channels,
        image_size=size,
        width=entry.get("width", 1.0),  # models of before there were widths have none
    )


def find_model(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The model folder that a path is or has in it, and its config. InputError where there is no model."""
    from arae.storage import fetched

    folder = fetched(path)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    config = read_config(folder)
    if config is None or "encoder" not in config:
        raise InputError(f"{folder}: no model (config.json is missing); `arae train` makes one")
    return folder, config


def load_autoencoder(path: str | Path) -> Autoencoder:
    """The autoencoder of a run folder or a model folder, on the CPU, in eval mode.

    Raises InputError where there is no model, or its files are damaged.
    """
    folder, config = find_model(path)
    try:
        encoder = load_encoder(folder, config)
        return Autoencoder(encoder, load_decoder(folder, config, encoder), config)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: not an arae model (no {error})") from None


def load_decoder(folder: Path, config: Mapping[str, Any], encoder: Encoder) -> Decoder | None:
    """The decoder of a model folder, on the CPU; None where it has none."""
    if "decoder" not in config:
        return None
    decoder = _new_decoder(config, encoder)
    decoder.load_state_dict(load_weights(folder / "decoder.safetensors", config["decoder"]["sha256"]))
    return decoder


def _new_decoder(config: Mapping[str, Any], encoder: Encoder) -> Decoder:
    """The decoder of a config, with random weights."""
    image_shape = tuple(config["image_shape"])
    feature_shape = encoder.feature_shape(image_shape, config["encoder"]["layer"])
    return create_decoder(config["decoder"]["name"], feature_shape=feature_shape, image_shape=image_shape)


def unpacked(packed: Packed) -> Autoencoder:
    """What `Autoencoder.packed` took apart, on the CPU."""
    config, weights = packed
    encoder = _new_encoder(config)
    decoder = _new_decoder(config, encoder) if len(weights) > 1 else None
    for part, values in zip((encoder, decoder), weights, strict=False):
        assert part is not None
        part.load_state_dict(values)
    return Autoencoder(encoder, decoder, config)
