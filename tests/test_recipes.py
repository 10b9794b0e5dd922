"""Every shipped recipe: parses, says what it must in its header, and names networks that fit each other."""

import math
import re

import pytest
import torch
from written_commands import check_arae, split_commands

from arae.config import Losses, Preset, Recipe, Schedule, difference, dump_recipe, load_recipe, shipped_recipes
from arae.data.catalog import DATASETS
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.train.losses import resolved
from arae.train.objectives import check_objective

NAMES = sorted(shipped_recipes())
# The full-scale recipes of the paper, and the preset of its weights that each trains with.
PAPER: dict[str, Preset] = {
    "imagenet-alexnet": "inversion",
    "imagenet-vgg16": "inversion-pixel-feature",
    "cifar10-resnet18": "inversion-pixel-feature",
    "cifar10-wrn28-10": "inversion-pixel-feature",
}


def header(name: str) -> list[str]:
    lines = shipped_recipes()[name].read_text().splitlines()
    return [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]


def shapes(recipe: Recipe) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the recipe's images and features."""
    assert recipe.data.channels
    assert recipe.data.size
    image = (recipe.data.channels, recipe.data.size, recipe.data.size)
    with torch.device("meta"):
        encoder = create_encoder(recipe.encoder.name, 10, image[0], width=recipe.encoder.width)
    return image, encoder.feature_shape(image, recipe.encoder.layer)


def test_there_are_recipes() -> None:
    full = {"imagenet-alexnet", "imagenet-vgg16", "cifar10-resnet18", "cifar10-wrn28-10"}
    assert {"demo", "demo-images", *full} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_parses_and_is_named_as_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.data.name in DATASETS
    assert recipe.decoder is not None
    assert recipe.evaluate.attacks, "nothing would say how robust the encoder is"


@pytest.mark.parametrize("name", NAMES)
def test_its_header_says_command_cost_and_outcome(name: str) -> None:
    lines = header(name)
    assert re.fullmatch(r"[^:]{20,}.*\.", lines[0]), "the first line says what it is: `arae ls` shows it"
    fields = dict(line.split(": ", 1) for line in lines[1:])
    assert {"Command", "Cost", "Reaches"} <= set(fields)
    assert all(len(fields[key]) > 10 for key in ("Cost", "Reaches"))
    commands = split_commands(fields["Command"])
    assert any(name in command or command[1] in ("demo", "reproduce") for command in commands)
    for program, *words in commands:
        assert program == "arae"
        check_arae(words)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_its_header_write_what_it_reads(name: str) -> None:
    recipe = load_recipe(name)
    encoded = {words[3] for words in split_commands(header(name)[1].removeprefix("Command: ")) if words[1] == "encode"}
    assert encoded == {path for path in (recipe.data.train, recipe.data.test) if path}


@pytest.mark.parametrize("name", NAMES)
def test_its_networks_fit_its_images(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.decoder is not None
    image, features = shapes(recipe)
    check_objective(recipe.encoder)
    with torch.device("meta"):
        decoder = create_decoder(recipe.decoder.name, feature_shape=features, image_shape=image)
        create_discriminator(recipe.decoder.name, feature_shape=features, image_shape=image)
        assert tuple(decoder.eval()(torch.empty(1, *features)).shape[1:]) == image


def test_the_papers_recipes_are_those_of_this_table() -> None:
    assert {name for name in NAMES if load_recipe(name).scale == "full"} - {"demo-images"} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_the_decoder_trains_with_the_papers_weights(name: str) -> None:
    """Whether the recipe names the preset or writes the numbers, it is exactly the preset at its shapes."""
    recipe = load_recipe(name)
    assert recipe.decoder is not None
    image, features = shapes(recipe)
    elements = math.prod(image), math.prod(features)
    assert resolved(recipe.decoder.losses, *elements) == resolved(Losses(preset=PAPER[name]), *elements)
    assert (recipe.decoder.lr, recipe.decoder.discriminator_lr, recipe.decoder.betas) == (3e-4, 12e-4, (0.0, 0.9))
    assert (recipe.decoder.epochs, recipe.decoder.batch) == (90, 128)
    assert recipe.decoder.schedule == Schedule(kind="step", every=1 / 3, gamma=0.1)


# Of each encoder: its features, what it is trained against, and its epochs, batch and rate.
ENCODERS = {
    "imagenet-alexnet": ((256, 6, 6), ("l2", 3.0, 7, 0.5, "at"), (90, 256, 0.1)),
    "imagenet-vgg16": ((512, 14, 14), ("linf", 0.01, 10, None, "at"), (90, 256, 0.01)),
    "cifar10-resnet18": ((512, 4, 4), ("l2", 1.0, 7, None, "at"), (150, 128, 0.1)),
    "cifar10-wrn28-10": ((640, 8, 8), ("linf", 8 / 255, 10, 0.007, "gairat"), (120, 128, 0.1)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoders_are_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    part, attack = recipe.encoder, recipe.encoder.attack
    features, against, stage = ENCODERS[name]
    assert shapes(recipe)[1] == features
    assert (attack.norm, attack.eps, attack.steps, attack.step_size, part.objective.kind) == against
    assert (part.epochs, part.batch, part.lr) == stage


def test_the_demo_map_is_fixed_beforehand() -> None:
    recipe = load_recipe("demo")
    assert recipe.map is not None
    assert len(recipe.map.radii) >= 3
    assert min(recipe.map.radii) == 0
    largest = max(recipe.map.radii)
    at_largest = {(a.steps, a.restarts) for a in recipe.evaluate.attacks if a.eps == largest}
    assert {(10, 1), (50, 5)} <= at_largest, "two strengths of attack at the largest radius show that it has converged"
    assert (recipe.evaluate.n or 1000) >= 1000
    assert recipe.scale == "small"
    assert load_recipe("demo-images", ["data.source=/somewhere"]).scale == "small"


@pytest.mark.parametrize("name", NAMES)
def test_the_difference_is_what_the_file_and_the_overrides_say(name: str) -> None:
    recipe = load_recipe(name, ["encoder.attack.eps=0.125"])
    changed = difference(recipe)
    assert changed["encoder.attack.eps"] == 0.125
    if recipe.base == name:
        assert changed == {"encoder.attack.eps": 0.125}


@pytest.mark.parametrize("name", NAMES)
def test_it_survives_a_run_folder(name: str, tmp_path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path) == recipe
