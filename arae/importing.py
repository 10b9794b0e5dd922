"""`arae import`: checkpoints of other projects to a model folder, all or nothing."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from arae import provenance
from arae.config import Norm, Part, Positive, Radius
from arae.errors import InputError
from arae.models import Encoder
from arae.models.autoencoder import Autoencoder, load_autoencoder, read_config, save_part
from arae.models.foreign import (
    Classifier,
    Generator,
    build_encoder,
    is_generator,
    read_classifier,
    read_generator,
    recognise,
)
from arae.models.weights import read_checkpoint

SMALL = {"resnet18-cifar": 32, "wrn-28-10": 32, "small-cnn": 32}  # pixels; all other networks are for 224
PLAIN = ("linear.weight", "block1.layer.0.bn1.weight")  # in CIFAR ResNets and WideResNets of RobustBench


class ImportOptions(Part):
    """What a checkpoint does not say itself."""

    name: str | None = None
    """The network, as in recipes (`alexnet`, `torchvision/resnet50`); default: arae's own with these very layers."""
    layer: str | None = None
    """The tap; default: the network's own, or the one that the generator inverts."""
    encoder: str | None = None
    """For a generator's file: the file, model folder or run folder of its encoder."""
    decoder: str | None = None
    """The decoder; default: the one with these very layers."""
    normalisation: Literal["encoder", "signed"] | None = None
    """What the decoder's images are normalised by before they are encoded; default: `signed` (2x - 1) for generators
    whose file has no mean and deviation, as the authors' scripts make them."""
    mean: tuple[float, ...] | None = None
    """Mean that the classifier's images are normalised by; default: the file's, else the network's own. RobustBench's
    CIFAR networks take images as they are where their file has none: mean 0, deviation 1."""
    std: tuple[Positive, ...] | None = None
    """Deviation, likewise."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Height and width of the images in pixels; default: 32 for CIFAR's networks, else 224."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for RGB."""
    width: Positive = 1.0
    """Factor on the network's channels."""
    classes: tuple[str, ...] | None = None
    """Names of the classes; default: their numbers."""
    norm: Norm | None = None
    """Norm of the attack that the classifier was trained under, for records."""
    eps: Radius = 0.0
    """Its radius, for images in [0, 1]."""


def _of_folder(options: ImportOptions) -> ImportOptions:
    """The options, completed by what the encoder's model folder says of its training."""
    folder = Path(options.encoder) if options.encoder else None
    if folder is None or not folder.is_dir():
        return options
    config = read_config(folder / "model" if (folder / "model").is_dir() else folder)
    if not config or "encoder" not in config:
        return options
    said: dict[str, Any] = {}
    if not options.eps and config["train_eps"]:
        said |= {"norm": config["train_norm"], "eps": config["train_eps"]}
    if options.classes is None:
        said["classes"] = tuple(config["classes"])
    return options.model_copy(update=said)


def import_model(source: Path, dest: Path, options: ImportOptions) -> list[str]:
    """Write the model folder `dest` from a checkpoint; returns what was found, a line each.

    `source` is a classifier (the robustness library's, RobustBench's, torchvision's or arae's own names) or one of the
    authors' generator files, for which `options.encoder` says where its encoder is. Raises InputError where a file is
    damaged, holds more than tensors, or does not match a network exactly; then nothing is written.
    """
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise InputError(f"{dest}: is there already and not empty; import into another folder, or delete it")
    if options.eps and options.norm is None:
        raise InputError(f"eps={options.eps:g} has no norm: add norm=l2 or norm=linf")
    options = _of_folder(options)
    content = read_checkpoint(source)
    generator = read_generator(content, source, options.decoder) if is_generator(content) else None
    if generator is None:
        for key in ("encoder", "decoder", "normalisation"):
            if getattr(options, key) is not None:
                raise InputError(f"{key}={getattr(options, key)} is for a generator's file, and {source} is none")
        encoder, note = _encoder(content, source, options, options.name)
    else:
        encoder, note = _encoder_of(generator, source, options)
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        _write(temporary, encoder, generator, options, source)
        notes = _described(_tried(temporary, source))
        temporary.chmod(0o755)
        temporary.replace(dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [note, *notes]


def _encoder_of(generator: Generator, source: Path, options: ImportOptions) -> tuple[Encoder, str]:
    """The encoder that a generator inverts, from its own file; it must be the one the generator was trained on."""
    if options.encoder is None:
        raise InputError(f"{source}: a generator, whose encoder lies in another file: add encoder=FILE")
    path, name = Path(options.encoder), options.name
    if path.is_dir():
        folder = path / "model" if (path / "model").is_dir() else path
        entry = (read_config(folder) or {}).get("encoder")
        if entry is None:
            raise InputError(f"encoder={path}: no model in this folder; give the encoder's file or its model folder")
        path, name = folder / "encoder.safetensors", name or entry["name"]
    if generator.decoder.name.startswith("alexnet-wavelet") and name in (None, "alexnet"):
        name = "alexnet-wavelet"  # the same weights with another pooling
    encoder, note = _encoder(read_checkpoint(path), path, options, name)
    own = encoder.net.state_dict()
    for key, value in generator.encoder_part.items():
        if key not in own:
            raise InputError(
                f"{source}: its encoder has {key}, which {encoder.name} has not: give name= of its encoder"
            )
        if own[key].shape != value.shape or not torch.equal(own[key], value):
            raise InputError(f"{source}: was trained on another encoder than {path}: {key} differs; give that one")
    return encoder, note


def _encoder(content: Mapping[str, Any], path: Path, options: ImportOptions, name: str | None) -> tuple[Encoder, str]:
    """The classifier of a checkpoint with the normalisation it was trained under, and a line on it."""
    found = read_classifier(content, path)
    name = name or recognise(found.weights, path, channels=options.channels, width=options.width)
    encoder = build_encoder(name, found.weights, path, channels=options.channels, width=options.width).eval()
    mean, std, whose = _normalisation(found, encoder, options)
    shown = []
    for key, buffer, values in (("mean", encoder.mean, mean.flatten()), ("std", encoder.std, std.flatten())):
        if len(values) not in (1, buffer.numel()) or (key == "std" and values.min() <= 0):
            raise InputError(f"{path}: {key} {values.tolist()} can't normalise images of {buffer.numel()} channels")
        buffer.copy_(values.view(1, -1, 1, 1).expand_as(buffer))
        shown.append(f"{key} {', '.join(f'{value:.4g}' for value in values.tolist())}")
    return encoder, f"encoder: {name}, {encoder.num_classes} classes; {'; '.join(shown)} ({whose})"


def _normalisation(found: Classifier, encoder: Encoder, options: ImportOptions) -> tuple[Tensor, Tensor, str]:
    """Mean, deviation, and whose word that is."""
    if (options.mean is None) != (options.std is None) or (found.mean is None) != (found.std is None):
        raise InputError("a mean without a deviation, or the reverse: give both mean=[…] and std=[…]")
    if options.mean is not None and options.std is not None:
        return torch.tensor(options.mean), torch.tensor(options.std), "as given"
    if found.mean is not None and found.std is not None:
        pairs = ((found.mean, encoder.mean), (found.std, encoder.std))
        usual = all(
            theirs.numel() in (1, ours.numel()) and ((theirs.flatten() - ours.flatten()).abs() < 1e-3).all()
            for theirs, ours in pairs
        )
        return found.mean, found.std, "the file's" if usual else "the file's, not the network's usual ones"
    if any(key in found.weights for key in PLAIN):
        return (
            torch.zeros(1),
            torch.ones(1),
            "none in the file: images go in as they are, unless mean= and std= are given",
        )
    return encoder.mean.clone(), encoder.std.clone(), "the network's own"


def _write(folder: Path, encoder: Encoder, generator: Generator | None, options: ImportOptions, source: Path) -> None:
    size = options.size or SMALL.get(encoder.name, 224)
    image_shape = (options.channels, size, size)
    classes = options.classes or tuple(map(str, range(encoder.num_classes)))
    if len(classes) != encoder.num_classes:
        raise InputError(f"classes: {len(classes)} names for {encoder.num_classes} classes; give one name a class")
    layer = options.layer or (_inverted(encoder, generator) if generator else encoder.layer)
    encoder.feature_shape(image_shape, layer)  # an unknown layer, or images that do not fit, are refused here
    common = {
        "image_shape": list(image_shape),
        "classes": list(classes),
        "train_norm": options.norm if options.eps else None,
        "train_eps": options.eps,
    }
    training = {"imported": source.name, "sha256": _sha256(source), "time": provenance.now()}
    origin = {"digest": "imported", "images": None, "steps": 0, "training": training}
    entry = {"name": encoder.name, "layer": layer, "num_classes": encoder.num_classes, "width": options.width}
    save_part(folder, "encoder", encoder.state_dict(), entry | origin, common)
    if generator is None:
        return
    normalisation = options.normalisation or ("signed" if generator.signed else "encoder")
    entry = {"name": generator.decoder.name, "normalisation": normalisation}
    save_part(folder, "decoder", generator.decoder.state_dict(), entry | origin, common)
    if generator.discriminator is not None:
        entry = {"name": generator.discriminator.name}
        save_part(folder, "discriminator", generator.discriminator.state_dict(), entry | origin, common)


def _inverted(encoder: Encoder, generator: Generator) -> str:
    """The tap whose features the decoder takes."""
    wanted, image = generator.decoder.feature_shape, generator.decoder.image_shape
    shapes = {layer: encoder.feature_shape(image, layer) for layer in encoder.layers}
    fitting = [layer for layer, shape in shapes.items() if shape == wanted]
    if not fitting:
        raise InputError(f"decoder {generator.decoder.name} takes features {wanted}, which {encoder.name} has nowhere")
    return fitting[0]


def _tried(folder: Path, source: Path) -> Autoencoder:
    """The model as anyone would load it, run once: a file may be whole and its numbers still be of no use."""
    model = load_autoencoder(folder)
    grey = torch.full((1, *model.image_shape), 0.5)
    out = model.encoder.features(grey, model.layer) if model.decoder is None else model.reconstruct(grey)
    if not out.isfinite().all():
        raise InputError(f"{source}: its network makes numbers that are not finite; get the file anew")
    return model


def _described(model: Autoencoder) -> list[str]:
    shape = "×".join(map(str, model.encoder.feature_shape(model.image_shape, model.layer)))
    lines = [f"features: {shape} at {model.layer}, for images of {'×'.join(map(str, model.image_shape))}"]
    if model.decoder is not None:
        how = {"encoder": "the encoder's own normalisation", "signed": "2x - 1"}[model.normalisation]
        lines.append(f"decoder: {model.config['decoder']['name']}; images are encoded for it by {how}")
    if "discriminator" in model.config:
        lines.append("discriminator: kept beside them, as discriminator.safetensors")
    return lines


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
