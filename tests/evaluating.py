"""Models and run folders to be evaluated, without training them."""

from pathlib import Path

import torch
from torch import Tensor, nn
from training import tiny_recipe

from arae.config import Recipe
from arae.data.load import open_source
from arae.models import create_decoder, create_encoder
from arae.models.autoencoder import Autoencoder, save_part
from arae.runs import RunFolder

CPU = torch.device("cpu")


def config(layer: str, side: int, channels: int = 3, *, decoder: bool = True) -> dict[str, object]:
    """What a model folder's config.json would say."""
    made: dict[str, object] = {
        "image_shape": [channels, side, side],
        "classes": ["a", "b", "c"],
        "train_norm": None,
        "train_eps": 0.0,
        "encoder": {"name": "small-cnn", "layer": layer, "training": {}},
    }
    return made | ({"decoder": {"name": "mirror", "training": {}}} if decoder else {})


class Through(nn.Module):
    """A 'decoder' of features that are images: answers `factor` times the image; keeps the shapes of what came."""

    def __init__(self, factor: float, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.name, self.image_shape, self.factor, self.seen = "through", image_shape, factor, list[tuple[int, ...]]()

    def forward(self, z: Tensor) -> Tensor:
        self.seen.append(tuple(z.shape))
        return self.factor * z

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width


def through(factor: float, side: int = 16, channels: int = 3) -> tuple[Autoencoder, Through]:
    """An autoencoder whose features are the images."""
    encoder = create_encoder("small-cnn", 3, channels, side)
    encoder.features = lambda x, layer=None: x  # type: ignore[method-assign]
    encoder.feature_shape = lambda image_shape, layer=None: tuple(image_shape)  # type: ignore[method-assign]
    decoder = Through(factor, (channels, side, side))
    return Autoencoder(encoder, decoder, config("conv4", side, channels)), decoder  # type: ignore[arg-type]


def convolutional(name: str = "small-cnn", side: int = 32, layer: str = "conv2") -> Autoencoder:
    """A fully convolutional autoencoder with untrained weights, whose reconstructions have contrast."""
    torch.manual_seed(0)
    encoder = create_encoder(name, 3, 3, side)
    decoder = create_decoder("mirror", encoder.feature_shape((3, side, side), layer), (3, side, side))
    last = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        last.bias.zero_()  # type: ignore[union-attr] -- it has one
        before_tanh = decoder.eval().layers[:-1](encoder.features(torch.rand(4, 3, side, side), layer))
        last.weight /= before_tanh.std((0, 2, 3)).view(3, 1, 1, 1)
    return Autoencoder(encoder, decoder, config(layer, side))


def run_folder(images: Path, *, decoder: bool = True, **overrides: object) -> tuple[Recipe, RunFolder]:
    """`tiny_recipe` on `images` and the run folder of its untrained model."""
    recipe = tiny_recipe(images, **overrides)
    folder = RunFolder.of(recipe)
    source = open_source(recipe.data, "test", CPU)
    torch.manual_seed(0)
    encoder = create_encoder("small-cnn", 3, *source.shape[:2])
    common = {
        "image_shape": list(source.shape),
        "classes": list(source.classes),
        "train_norm": "l2",
        "train_eps": 0.5,
    }
    entry = {"name": "small-cnn", "layer": "conv4", "num_classes": 3, "training": {}}
    save_part(folder.model, "encoder", encoder.state_dict(), entry, common)
    if decoder:
        made = create_decoder("mirror", encoder.feature_shape(source.shape), source.shape)
        save_part(folder.model, "decoder", made.state_dict(), {"name": "mirror", "training": {}}, common)
    return recipe, folder
