"""At the edges (eps 0, one image, one channel, two classes, tiny images, NaN) all works or is refused in one line."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from training import tiny_recipe

from arae.attacks import Threat, apgd, attack, fgsm, pgd
from arae.check import check
from arae.config import Attack
from arae.data.arrays import read_npz
from arae.data.images import UnusableImageError, open_rgb
from arae.errors import InputError
from arae.metrics import lpips, mean_interval, psnr, ssim
from arae.models import create_decoder, create_discriminator, create_encoder
from arae.models.autoencoder import Autoencoder
from arae.models.decoder import DECODERS, Decoder
from arae.models.discriminator import DISCRIMINATORS
from arae.models.encoder import ENCODERS, Encoder
from arae.models.registry import Shape
from arae.models.taps import without_data
from arae.pictures import reconstruct_files

CPU = torch.device("cpu")
NAN = float("nan")


def one_line(error: BaseException) -> str:
    said = str(error)
    assert said
    assert "\n" not in said
    return said


# --- attacks ------------------------------------------------------------------------------------------------------

KINDS = [kind for kind in get_args(Attack.model_fields["kind"].annotation) if kind != "autoattack"]
ATTACKS: dict[str, Callable[[nn.Module, Tensor, Tensor, Threat], Tensor]] = {
    "pgd": lambda model, x, y, threat: pgd(model, x, y, threat, steps=3, random_start=True, restarts=2),
    "fgsm": fgsm,
    "apgd-ce": lambda model, x, y, threat: apgd(model, x, y, threat, 5, "ce"),
    "apgd-dlr": lambda model, x, y, threat: apgd(model, x, y, threat, 5, "dlr"),
    "cascade": lambda model, x, y, threat: attack(
        model, x, y, Attack(kind="cascade", norm=threat.norm, eps=threat.eps, steps=3)
    ),
    "apgd-t": lambda model, x, y, threat: apgd(model, x, y, threat, 5, "dlr-targeted"),
}


def classifier(shape: tuple[int, ...], classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.Tanh(), nn.Linear(8, classes))


def test_every_kind_of_attack_is_in_the_table() -> None:
    assert set(KINDS) <= set(ATTACKS)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize(
    ("n", "shape", "classes"),
    [(1, (3, 4, 4), 5), (4, (1, 4, 4), 5), (4, (3, 4, 4), 2), (4, (3, 4, 4), 3), (1, (1, 1, 1), 2)],
)
def test_attacks_take_one_image_one_channel_and_few_classes(
    norm: str, name: str, n: int, shape: tuple[int, int, int], classes: int
) -> None:
    model, x, threat = classifier(shape, classes), torch.rand(n, *shape), Threat(norm, 0.2)  # type: ignore[arg-type]
    y = model(x).argmax(1)  # all right, so that all are attacked
    found = ATTACKS[name](model, x, y, threat)
    assert found.shape == x.shape
    assert found.isfinite().all()
    assert threat.length(found - x).max() <= threat.eps * (1 + 1e-5)
    assert not torch.equal(found, x)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attacks_at_radius_zero_return_the_images_themselves(name: str) -> None:
    x = torch.rand(2, 3, 4, 4)
    assert ATTACKS[name](classifier((3, 4, 4), 2), x, torch.tensor([0, 1]), Threat("linf", 0)) is x


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipes_attack_at_radius_zero_returns_the_images_themselves(kind: str) -> None:
    x, given = torch.rand(2, 3, 4, 4), Attack.model_validate({"kind": kind, "norm": "l2", "eps": 0})
    assert attack(classifier((3, 4, 4), 2), x, torch.tensor([0, 1]), given) is x


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_attacks_refuse_nan(name: str, eps: float) -> None:
    x = torch.rand(3, 3, 4, 4)
    x[1, 0, 2, 2] = NAN
    with pytest.raises(ValueError, match="nan") as refused:
        ATTACKS[name](classifier((3, 4, 4), 2), x, torch.tensor([0, 1, 0]), Threat("l2", eps))
    one_line(refused.value)


# --- metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("value", [NAN, math.inf])
@pytest.mark.parametrize("metric", [psnr, ssim, lpips])
def test_metrics_refuse_what_is_no_number(metric: Callable[..., Tensor], value: float, which: str) -> None:
    x, y = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    (x if which == "first" else y)[2, 1, 5, 5] = value
    with pytest.raises(ValueError, match=f"image 2 of the {which} batch holds NaN") as refused:
        metric(x, y)
    one_line(refused.value)


@pytest.mark.parametrize(("metric", "side"), [(psnr, 1), (ssim, 11)])
@pytest.mark.parametrize("channels", [1, 3])
def test_metrics_take_one_image_as_small_as_can_be(metric: Callable[..., Tensor], side: int, channels: int) -> None:
    x = torch.rand(1, channels, side, side)
    assert metric(x, 1 - x).shape == (1,)
    assert metric(x, 1 - x).isfinite().all()
    assert metric(x[:0], x[:0]).shape == (0,)


def test_a_mean_of_no_numbers_has_no_interval() -> None:
    with pytest.raises(ValueError, match="no numbers"):
        mean_interval([1.0, NAN])


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, math.inf, 0.5])
def test_arrays_of_floats_are_refused(tmp_path: Path, value: float) -> None:
    np.savez(tmp_path / "x.npz", images=np.full((4, 8, 8, 3), value, np.float32), labels=np.arange(4) % 2)
    with pytest.raises(InputError, match=r"x\.npz: images are float32; they must be uint8") as refused:
        read_npz(tmp_path / "x.npz")
    one_line(refused.value)


def test_labels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, NAN]))
    with pytest.raises(InputError, match="whole-number labels, not float64"):
        read_npz(tmp_path / "x.npz")


def test_an_image_file_of_nan_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), NAN, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UnusableImageError, match="nan"):
        open_rgb(tmp_path / "x.tif")


# --- networks -----------------------------------------------------------------------------------------------------


def on_meta(build: Callable[[], nn.Module]) -> nn.Module | str:
    """The network without memory, so that large ones cost nothing; or the one line that it is refused by."""
    try:
        with torch.device("meta"):
            return build().eval()
    except InputError as error:
        return one_line(error)
    except NotImplementedError:  # it reads a number of its own while it is made
        return build().eval()


SIZES = [1, 4, 8, 16, 32, 64, 128, 224]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_takes_images_from_some_size_on(name: str, channels: int) -> None:
    """Every size below is refused by name and size, every size above gives features and the logits of two classes."""
    made = on_meta(lambda: create_encoder(name, 2, channels))
    if isinstance(made, str):
        assert channels == 1
        assert "data.channels" in made
        return
    assert isinstance(made, Encoder)
    refused, said = list[int](), ""
    for size in SIZES:
        one = torch.zeros(1, channels, size, size, device="meta")
        try:
            made.refuse_unfit(one.shape[1:])
        except InputError as error:
            refused.append(size)
            said = one_line(error)
            continue
        assert without_data(made, one).shape == (1, 2)
        if size == SIZES[len(refused)]:
            assert all(len(made.feature_shape(one.shape[1:], at)) == 3 for at in made.layers)
    assert refused == SIZES[: len(refused)]
    assert len(refused) < len(SIZES)
    if refused:
        assert name in said
        assert str((channels, refused[-1], refused[-1])) in said


SHAPES = {"mirror": ((8, 3, 3), (3, 28, 28))}


@cache
def native(name: str) -> tuple[Shape, Shape]:
    """Features and images that the networks of a name are made for."""
    made = on_meta(lambda: create_decoder(name, *SHAPES.get(name, (None, None))))
    assert isinstance(made, Decoder), made
    return made.feature_shape, made.image_shape


@pytest.mark.parametrize("name", list(DECODERS))
def test_a_decoder_takes_one_code_and_refuses_what_it_cannot_make(name: str) -> None:
    features, (channels, height, width) = native(name)
    code = torch.zeros(1, *features, device="meta")
    for image in ((channels, height, width), (1, height, width), (channels, 1, 1), (channels, height + 3, width + 5)):
        made = on_meta(lambda image=image: create_decoder(name, features, image))
        if isinstance(made, str):
            assert name in made
            assert image != (channels, height, width)
        else:
            assert made(code).shape == (1, *image)


@pytest.mark.parametrize("name", list(DISCRIMINATORS))
def test_a_discriminator_takes_one_image_of_what_its_decoder_makes(name: str) -> None:
    features, (channels, height, width) = native(name)
    code = torch.zeros(1, *features, device="meta")
    for image in ((channels, height, width), (1, height, width)):
        if isinstance(on_meta(lambda image=image: create_decoder(name, features, image)), str):
            continue
        made = on_meta(lambda image=image: create_discriminator(name, features, image))
        assert not isinstance(made, str), made
        assert made(torch.zeros(1, *image, device="meta"), code).shape == (1,)


def autoencoder(channels: int = 3) -> Autoencoder:
    torch.manual_seed(0)
    encoder = create_encoder("small-cnn", 2, channels, 16, width=0.1)
    decoder = create_decoder("mirror", encoder.feature_shape((channels, 16, 16)), (channels, 16, 16))
    return Autoencoder(encoder, decoder, {"encoder": {"layer": "conv4"}, "image_shape": (channels, 16, 16)})


@pytest.mark.parametrize("channels", [1, 3])
def test_an_autoencoder_takes_one_image(channels: int) -> None:
    x = torch.rand(1, channels, 16, 16)
    assert autoencoder(channels).reconstruct(x).shape == x.shape


@pytest.mark.parametrize("value", [NAN, math.inf])
@pytest.mark.parametrize("call", ["encode", "reconstruct"])
def test_an_autoencoder_refuses_what_is_no_number(call: str, value: float) -> None:
    x = torch.rand(3, 3, 16, 16)
    x[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=str(value)) as refused:
        getattr(autoencoder(), call)(x)
    one_line(refused.value)


def test_a_reconstruction_that_is_no_image_is_not_written(tmp_path: Path) -> None:
    model = autoencoder()
    nn.init.constant_(model.encoder.net.get_parameter("conv1.weight"), NAN)  # a broken model: the images are whole
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="NaN"):
        list(reconstruct_files(model, [tmp_path / "x.png"], tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*"))


# --- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.size": 16, "encoder.name": "alexnet"}, r"encoder alexnet .*\(3, 16, 16\)"),
        (
            {"data.channels": 1, "data.size": 64, "encoder.name": "alexnet"},
            r"encoder alexnet takes RGB.*data\.channels",
        ),
        (
            {"encoder.name": "resnet18-cifar", "encoder.width": 0.1, "encoder.micro_batch": 1, "data.size": 8},
            r"encoder\.micro_batch",
        ),
        (
            {"encoder.name": "resnet18-cifar", "encoder.width": 0.1, "decoder.micro_batch": 1, "data.size": 8},
            r"decoder\.micro_batch",
        ),
        ({"decoder.name": "alexnet-conv5"}, "alexnet-conv5 "),
    ],
)
def test_a_recipe_that_cannot_train_is_refused_by_the_key_to_change(
    tiny_npz: Path, change: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said) as refused:
        list(check(tiny_recipe(tiny_npz).replace(change), CPU))
    one_line(refused.value)
