"""Training, evaluation and commands at the edges: eps 0, one image, one channel, two classes, tiny images, NaN."""

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import test_cli
import torch
from PIL import Image
from test_cli import Run, refused
from torch import Tensor
from training import tiny_recipe

from arae.config import Attack, Evaluate, Objective, Recipe, dump_recipe
from arae.errors import InputError
from arae.evaluate import evaluate
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.models.autoencoder import load_autoencoder
from arae.pictures import reconstruct_files
from arae.runs import RunFolder
from arae.train.decoder import DecoderTrainer
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro
from arae.train.run import train

CPU = torch.device("cpu")
OBJECTIVES = get_args(Objective.model_fields["kind"].annotation)
PROTOCOLS = get_args(Evaluate.model_fields["protocol"].annotation)
KINDS = get_args(Attack.model_fields["kind"].annotation)
arae_here = test_cli.arae_here


def micro(n: int, channels: int, classes: int, side: int = 8) -> Micro:
    torch.manual_seed(1)
    return Micro(torch.rand(n, channels, side, side), torch.arange(n) % classes, 0)


def after_steps(recipe: Recipe, one: Micro, classes: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights before and after two encoder steps; the losses must be numbers."""
    torch.manual_seed(0)
    model = create_encoder("small-cnn", classes, one.images.shape[1], width=0.25)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = EncoderTrainer(recipe, model, Engine(CPU, "fp32"), total=4)
    for step in (1, 2):  # GAIRAT weights from the second on
        assert all(value.isfinite() for value in trainer.step(step, [one]).values())
    return before, trainer.exported()


@pytest.mark.parametrize(("n", "channels", "classes"), [(1, 3, 3), (4, 1, 3), (4, 3, 2), (1, 1, 2)])
@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_encoder_learns_from_one_image_one_channel_two_classes(
    tiny_npz: Path, kind: str, eps: float, n: int, channels: int, classes: int
) -> None:
    objective = {"encoder.objective.kind": kind, "encoder.label_smoothing": 0.0, "encoder.attack.eps": eps}
    recipe = tiny_recipe(tiny_npz).replace({**objective, "encoder.ema": 0.0})
    before, after = after_steps(recipe, micro(n, channels, classes), classes)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(before["net.fc.weight"], after["net.fc.weight"])


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES if kind != "at"])
def test_at_radius_zero_every_objective_is_standard_training(tiny_npz: Path, kind: str) -> None:
    plain = tiny_recipe(tiny_npz).replace({"encoder.label_smoothing": 0.0, "encoder.attack.eps": 0.0})
    both = [after_steps(one, micro(4, 3, 3), 3)[1] for one in (plain, plain.replace({"encoder.objective.kind": kind}))]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 16])
def test_a_decoder_learns_from_one_image(tiny_npz: Path, channels: int, side: int) -> None:
    one = micro(1, channels, 2, side)
    encoder = create_encoder("small-cnn", 2, channels, width=0.25)
    shapes = encoder.feature_shape((channels, side, side), "conv1"), (channels, side, side)
    generator, discriminator = create_decoder("mirror", *shapes), create_discriminator("mirror", *shapes)
    recipe = tiny_recipe(tiny_npz).replace({"encoder.layer": "conv1"})
    trainer = DecoderTrainer(recipe, encoder, generator, discriminator, Engine(CPU, "fp32"), total=4)
    for step in range(2):
        seen = trainer.step(step, [one])
        assert {"pixel", "feature", "adversarial", "discriminator_loss"} <= set(seen)
        assert all(value.isfinite() for value in seen.values())


# --- whole runs ---------------------------------------------------------------------------------------------------


def smallest(folder: Path, **overrides: object) -> Recipe:
    """Five grey images of 8 px in two classes, learnt from one by one, with the clean image for an attack."""
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    np.savez(folder / "smallest.npz", images=images, labels=np.arange(5) % 2)
    given: dict[str, Any] = {"data.size": None, "data.channels": None, "encoder.width": 0.25, "encoder.layer": "conv1"}
    for stage in ("encoder", "decoder"):
        given |= {f"{stage}.batch": 1, f"{stage}.micro_batch": None, f"{stage}.steps": 2}
    given |= {"encoder.attack.eps": 0.0, "evaluate.n": 1, "evaluate.batch": 1, "evaluate.factors": [1, 2]}
    given |= {"evaluate.attacks": [{"norm": "l2", "eps": 0, "kind": kind} for kind in KINDS]}
    given |= {"evaluate.inversion": {"steps": 2}, "evaluate.images": str(folder / "photographs")}
    return tiny_recipe(folder / "smallest.npz").replace(given | overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("smallest")
    recipe = smallest(folder)
    (folder / "photographs").mkdir()
    Image.fromarray(np.full((9, 11), 100, np.uint8)).save(folder / "photographs" / "grey.png")
    run = RunFolder(folder / "run")
    run.create(recipe)
    train(recipe, run, CPU)
    return run


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_grey_image_of_two_classes_is_evaluated(trained: RunFolder, protocol: str) -> None:
    recipe = smallest(trained.path.parent, **{"evaluate.protocol": protocol})
    records = evaluate(recipe, trained, CPU)
    assert records
    for record in records:
        assert (record.value is None) == (record.reason is not None)
        assert record.value is None or math.isfinite(record.value)
        assert record.n in (None, 1, len(recipe.evaluate.factors))
    found = {(r.metric, r.threat.attack if r.threat else None): r.value for r in records}
    for kind in KINDS if protocol in ("map", "robustness") else ():
        assert found["robust_accuracy", kind] == found["clean_accuracy", None]  # eps 0 is the clean image


def test_a_dot_is_reconstructed(trained: RunFolder, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(tmp_path / "dot.png")
    model = load_autoencoder(trained.path)
    ((path, quality),) = reconstruct_files(model, [tmp_path / "dot.png"], tmp_path / "out")
    assert path == tmp_path / "out" / "dot-reconstruction.png"
    assert path.is_file()
    assert math.isfinite(quality)


@pytest.mark.parametrize("verb", ["validate", "train"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["data.train=nan.npz"], ["nan.npz", "float32", "uint8"]),
        (["data.train=one.npz", "data.test=one.npz"], ["data.train", "class", "two or more"]),
        (
            ["encoder.name=alexnet", "encoder.layer=null", "encoder.width=1", "data.channels=3"],
            ["alexnet", "(3, 8, 8)"],
        ),
        (["encoder.attack.eps=.nan"], ["encoder.attack.eps", "nan"]),
        (["decoder.lr=.nan"], ["decoder.lr"]),
        (["encoder.layer=conv4", "decoder.batch=1"], ["decoder.batch = 1", "batch norm"]),
    ],
)
def test_commands_refuse_in_one_line(
    arae_here: Run, tmp_path: Path, verb: str, change: list[str], said: list[str]
) -> None:
    (tmp_path / "smallest.yaml").write_text(dump_recipe(smallest(tmp_path)))
    np.savez(tmp_path / "nan.npz", images=np.full((4, 8, 8), np.nan, np.float32), labels=np.arange(4) % 2)
    np.savez(tmp_path / "one.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(4, np.int64))
    refused(arae_here(verb, "smallest.yaml", *change), *said)


def test_encoding_arrays_of_nan_is_refused_in_one_line(arae_here: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "nan.npz", images=np.full((4, 8, 8), np.nan, np.float32), labels=np.arange(4) % 2)
    refused(arae_here("encode", "nan.npz", "nan.beton"), "nan.npz", "float32", "uint8")
    assert not (tmp_path / "nan.beton").exists()


def test_evaluating_no_images_is_refused(trained: RunFolder) -> None:
    with pytest.raises(InputError, match=r"evaluate\.n"):
        smallest(trained.path.parent, **{"evaluate.n": 0})
