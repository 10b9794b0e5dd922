"""Every shipped recipe: parses, says what it must in its header, and names networks that fit each other."""

import re

import pytest
from written_commands import check_arae, split_commands

from arae.config import Recipe, difference, dump_recipe, load_recipe, shipped_recipes
from arae.data.catalog import DATASETS
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.train.losses import from_paper

NAMES = sorted(shipped_recipes())
# Weights for sums over batches of 128, as the authors ran them, where they ran them: pixel, feature, adversarial.
PAPER = {"imagenet-alexnet": (2e-6, 1e-2, 100.0), "cifar10-resnet18": (2e-6, 1e-2, 0.0)}


def header(name: str) -> list[str]:
    lines = shipped_recipes()[name].read_text().splitlines()
    return [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]


def shapes(recipe: Recipe) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the recipe's images and features."""
    assert recipe.data.channels
    assert recipe.data.size
    image = (recipe.data.channels, recipe.data.size, recipe.data.size)
    encoder = create_encoder(recipe.encoder.name, num_classes=10, in_channels=image[0])
    return image, encoder.feature_shape(image, recipe.encoder.layer)


def test_there_are_recipes() -> None:
    assert {"demo", "demo-images", "cifar10-resnet18", "imagenet-alexnet"} <= set(NAMES)


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
    assert any(name in command or command[1] == "demo" for command in commands)
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
    decoder = create_decoder(recipe.decoder.name, feature_shape=features, image_shape=image)
    discriminator = create_discriminator(recipe.decoder.name, feature_shape=features, image_shape=image)
    assert sum(p.numel() for p in decoder.parameters()) > 0
    assert sum(p.numel() for p in discriminator.parameters()) > 0


def test_the_papers_weights_are_those_of_this_table() -> None:
    assert {name for name in NAMES if "The paper's 2e-6" in shipped_recipes()[name].read_text()} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_weights_are_the_papers_for_these_shapes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.decoder is not None
    losses = recipe.decoder.losses
    pixel, feature, adversarial = PAPER[name]
    (c, h, w), (fc, fh, fw) = shapes(recipe)
    assert losses.pixel == pytest.approx(from_paper(pixel, c * h * w), rel=1e-6)
    assert losses.feature == pytest.approx(from_paper(feature, fc * fh * fw), rel=1e-6)
    assert losses.adversarial == pytest.approx(from_paper(adversarial, 1), rel=1e-6)
    assert (recipe.decoder.lr, recipe.decoder.discriminator_lr, recipe.decoder.betas) == (3e-4, 12e-4, (0.0, 0.9))


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
