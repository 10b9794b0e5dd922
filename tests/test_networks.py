"""The decoder's networks as the recipe names them: presets, comparators, weights from folders, what can't fit."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training import tiny_recipe

from arae.check import check
from arae.config import Comparator, Losses, Recipe
from arae.cost import Networks
from arae.errors import InputError
from arae.evaluate.measure import described
from arae.models import Encoder, create_encoder
from arae.models.autoencoder import load_autoencoder, read_config, save_part
from arae.models.wavelet import WaveletCode
from arae.runs import RunFolder, runs_root
from arae.train.decoder import DecoderTrainer
from arae.train.engine import Engine
from arae.train.losses import resolved
from arae.train.micro import Micro
from arae.train.networks import decoding, load_comparator, weights_file
from arae.train.run import train

CPU = torch.device("cpu")
IMAGES = (3, 16, 16)


def short(images: Path, **overrides: object) -> Recipe:
    """One step of each stage."""
    return tiny_recipe(images, encoder__steps=1, decoder__steps=1, **overrides)


def trained(recipe: Recipe, path: Path) -> dict:
    """The model folder's config after the recipe's training."""
    folder = RunFolder(path)
    folder.create(recipe)
    train(recipe, folder, CPU)
    config = read_config(folder.model)
    assert config is not None
    return config


def other_network() -> Encoder:
    torch.manual_seed(5)
    return create_encoder("small-cnn", 7, 3, 16)


def in_a_file(suffix: str, part: Callable[[Encoder], torch.nn.Module]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path, weights = folder / f"other{suffix}", part(other_network()).state_dict()
        save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
        return path

    return write


def in_a_model_folder(folder: Path) -> Path:
    entry = {"name": "small-cnn", "layer": "conv4", "num_classes": 7, "width": 1.0}
    save_part(folder / "imported", "encoder", other_network().state_dict(), entry, {"image_shape": list(IMAGES)})
    return folder / "imported"


def in_a_run_folder(folder: Path) -> Path:
    in_a_model_folder(folder).rename(folder / "model")
    return folder


def in_a_named_run(_folder: Path) -> Path:
    in_a_run_folder(runs_root() / "sweep" / "one")
    return Path("run:sweep/one")


PLACES = {
    "safetensors": in_a_file(".safetensors", lambda encoder: encoder),
    "pt of the network alone": in_a_file(".pt", lambda encoder: encoder.net),
    "model folder": in_a_model_folder,
    "run folder": in_a_run_folder,
    "name of a run": in_a_named_run,
}


def refused_before_training(recipe: Recipe, run: Path, says: list[str]) -> None:
    """Training and `validate` both refuse the recipe, in one line that says all of `says`; nothing is made."""
    for what in (lambda: trained(recipe, run), lambda: list(check(recipe, CPU))):
        with pytest.raises(InputError) as caught:
            what()
        assert [part for part in says if part not in str(caught.value)] == [], str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (run / "model").exists()


@pytest.mark.parametrize("place", PLACES)
def test_a_comparator_is_loaded_from_wherever_weights_may_lie(tmp_path: Path, place: str) -> None:
    where = PLACES[place](tmp_path)
    made = load_comparator(Comparator(name="small-cnn", weights=str(where)), IMAGES)
    assert made is not None
    assert not made.training
    assert not any(p.requires_grad for p in made.parameters())
    x = torch.rand(2, *IMAGES)
    torch.testing.assert_close(made.features(x, "conv2"), other_network().features(x, "conv2"))
    assert weights_file(str(where)).is_file()


def test_without_a_comparator_there_is_none() -> None:
    assert load_comparator(None, IMAGES) is None


REFUSED = [
    ({"weights": "nowhere.safetensors"}, ["nowhere.safetensors", "no such file"]),
    ({"weights": "empty"}, ["decoder.comparator.weights = empty", "no model there"]),
    ({"weights": "imported", "name": "alexnet"}, ["decoder.comparator.name = alexnet", "holds small-cnn"]),
    ({"weights": "other.safetensors", "name": "resnet18-cifar"}, ["other.safetensors", "not the weights"]),
    ({"weights": "imported", "layer": "conv9"}, ["conv9", "conv1, conv2, conv3, conv4"]),
    ({"weights": "imported", "name": "smallcnn"}, ["smallcnn"]),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
def test_a_comparator_is_refused_before_anything_is_trained(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, says: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    in_a_model_folder(tmp_path)
    PLACES["safetensors"](tmp_path)
    recipe = short(tiny_npz, decoder__comparator={"name": "small-cnn", **change})
    refused_before_training(recipe, tmp_path / "run", says)


def test_a_model_says_what_it_was_trained_with(tiny_npz: Path, tmp_path: Path) -> None:
    where = PLACES["safetensors"](tmp_path)
    recipe = short(
        tiny_npz,
        decoder__normalisation="signed",
        decoder__losses={"preset": "inversion"},
        decoder__comparator={"name": "small-cnn", "weights": str(where), "layer": "conv2"},
    )
    entry = trained(recipe, tmp_path / "run")["decoder"]
    weights = resolved(Losses(preset="inversion"), 3 * 16 * 16, 64 * 4 * 4)
    assert entry["normalisation"] == "signed"
    assert entry["losses"] == {"pixel": weights.pixel, "feature": weights.feature, "adversarial": weights.adversarial}
    assert entry["comparator"]["sha256"] == hashlib.sha256(where.read_bytes()).hexdigest()
    model = load_autoencoder(tmp_path / "run")
    assert described(recipe, model).losses == entry["losses"]
    x = torch.rand(2, *IMAGES)
    own = model.encoder
    torch.testing.assert_close(model.encode(x), own.features((2 * x - 1) * own.std + own.mean))


def test_a_comparator_that_was_replaced_is_refused(tiny_npz: Path, tmp_path: Path) -> None:
    where = PLACES["safetensors"](tmp_path)
    recipe = short(tiny_npz, decoder__comparator={"name": "small-cnn", "weights": str(where), "layer": "conv2"})
    trained(recipe, tmp_path / "run")
    made, first = (tmp_path / "run" / "model" / "decoder.safetensors").read_bytes(), where.read_bytes()
    save_file(create_encoder("small-cnn", 7, 3, 16).state_dict(), where)
    with pytest.raises(InputError, match=r"^decoder\.comparator\.weights = [^\n]*holds other weights"):
        trained(recipe, tmp_path / "run")
    where.write_bytes(first)
    trained(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "decoder.safetensors").read_bytes() == made


def test_a_preset_trains_as_its_numbers_do(tiny_npz: Path, tmp_path: Path) -> None:
    weights = resolved(Losses(preset="inversion"), 3 * 16 * 16, 128 * 2 * 2).model_dump()
    made = []
    for i, losses in enumerate(({"preset": "inversion"}, weights)):
        trained(short(tiny_npz, decoder__losses=losses), tmp_path / str(i))
        made.append((tmp_path / str(i) / "model" / "decoder.safetensors").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("place", ["model folder", "run folder"])
def test_an_encoder_starts_from_a_folder(tiny_npz: Path, tmp_path: Path, place: str) -> None:
    torch.manual_seed(5)
    encoder = create_encoder("small-cnn", 3, 3, 16)
    folder = tmp_path / "given" / ("model" if place == "run folder" else "")
    entry = {"name": "small-cnn", "layer": "conv4", "num_classes": 3, "width": 1.0}
    save_part(folder, "encoder", encoder.state_dict(), entry, {"image_shape": list(IMAGES)})
    recipe = tiny_recipe(tiny_npz, encoder__weights=str(tmp_path / "given"), encoder__steps=0, decoder=None)
    trained(recipe, tmp_path / "run")
    got = load_autoencoder(tmp_path / "run").encoder.state_dict()
    assert all(torch.equal(got[key], value) for key, value in encoder.state_dict().items())


UNFIT = [
    ({"encoder__layer": "conv7"}, ["conv7", "conv1, conv2, conv3, conv4"]),
    ({"decoder__name": "alexnet-conv5"}, ["decoder.name = alexnet-conv5", "conv1, conv2, conv3, conv4", "mirror"]),
]


@pytest.mark.parametrize(("overrides", "says"), UNFIT)
def test_what_cannot_fit_is_refused_with_the_layers_there_are(
    tiny_npz: Path, tmp_path: Path, overrides: dict, says: list[str]
) -> None:
    recipe = short(tiny_npz, **overrides)
    refused_before_training(recipe, tmp_path / "run", says)


def test_validation_says_what_compares_and_what_counts(tiny_npz: Path, tmp_path: Path) -> None:
    where = in_a_model_folder(tmp_path)
    comparator = {"name": "small-cnn", "weights": str(where), "layer": "conv1"}
    recipe = short(tiny_npz, decoder__losses={"preset": "style-robust"}, decoder__comparator=comparator)
    lines = list(check(recipe, CPU))
    assert "comparator: small-cnn, features (32, 8, 8) at conv1" in lines
    assert "losses: style-robust, pixel 0.196608, feature 2621.44" in lines


def test_a_look_at_the_decoder_does_not_move_it(tiny_npz: Path) -> None:
    """The check of its output leaves running statistics and spectral norm's vectors as they were made."""
    recipe = short(tiny_npz)
    networks = decoding(recipe, create_encoder("small-cnn", 3, 3, 16), None, IMAGES)
    torch.manual_seed(1)
    made = networks.generator().state_dict()
    torch.manual_seed(1)
    again = networks.generator().state_dict()
    assert all(torch.equal(made[key], again[key]) for key in made)
    assert made["layers.1.running_mean"].abs().sum() == 0


def test_a_wavelet_code_goes_to_its_decoder_whole_and_is_compared_by_its_low_band(tiny_npz: Path) -> None:
    recipe = short(
        tiny_npz,
        encoder__name="alexnet-wavelet",
        decoder__name="alexnet-wavelet",
        decoder__losses={"pixel": 1.0, "feature": 0.1},
    )
    encoder = create_encoder("alexnet-wavelet", 2)
    networks = decoding(recipe, encoder, None, (3, 224, 224))
    assert networks.compared == (256, 6, 6)
    trainer = DecoderTrainer(recipe, encoder, networks.generator(), None, Engine(CPU, "fp32"), total=1)
    images = torch.rand(1, 3, 224, 224)
    codes = trainer._encode(images)
    assert isinstance(codes.decoded, WaveletCode)
    assert torch.equal(codes.compared, trainer.encoder.features(images))
    assert set(trainer.step(0, [Micro(images, torch.zeros(1, dtype=torch.int64), 0)])) == {"loss", "pixel", "feature"}


def test_objectives_and_comparators_are_counted(tiny_npz: Path, tmp_path: Path) -> None:
    def counted(**overrides: object) -> Networks:
        return Networks(short(tiny_npz, encoder__label_smoothing=0.0, **overrides), IMAGES, 3)

    plain = counted()
    attack = plain.recipe.encoder.attack
    classify = plain.classify
    at = plain.encoder_step(attack)
    assert counted(encoder__objective={"kind": "gairat"}).encoder_step(attack) == at
    assert counted(encoder__objective={"kind": "mart"}).encoder_step(attack) == at + classify.to_weights
    trades = counted(encoder__objective={"kind": "trades"})
    assert trades.encoder_step(attack) == at + classify.to_weights + classify.forward
    assert trades.encoder_step(attack.model_copy(update={"eps": 0.0})) == classify.to_weights
    comparing = counted(decoder__comparator={"name": "small-cnn", "weights": "not there yet", "layer": "conv1"})
    assert comparing.compare.forward < plain.tap.forward
    assert [n.role for n in comparing.listed()] == ["encoder", "decoder", "discriminator", "comparator"]
    extra = counted(decoder__normalisation="signed").decoder_step(1) - plain.decoder_step(1)
    assert extra == plain.tap.forward
