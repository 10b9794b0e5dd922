"""`arae import` refuses what is not exactly a network it knows, in one line, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch
from checkpoints import TheirWavelets, authors_network
from safetensors.torch import save_file
from torch import nn

from arae.errors import InputError
from arae.importing import ImportOptions, import_model
from arae.models import create_encoder


class Harmful:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def small() -> dict[str, torch.Tensor]:
    return dict(create_encoder("small-cnn", 5).net.state_dict())


def without(key: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in small().items() if k != key}


ZERO = torch.zeros(3)
BAD = {
    "a missing layer": (lambda: without("fc.bias"), "lacks weights for: fc.bias; that was the nearest"),
    "a layer too many": (lambda: small() | {"fc2.bias": torch.zeros(3)}, "the file has besides: fc2.bias"),
    "a wrong shape": (
        lambda: small() | {"conv2.weight": torch.zeros(64, 32, 5, 5)}, r"conv2.weight \(64, 32, 5, 5\) for"
    ),
    "values that are not finite": (lambda: small() | {"fc.bias": torch.full((5,), torch.nan)}, "fc.bias .* not finite"),
    "two state dicts": (lambda: {"model": small(), "state_dict": small()}, "several state dicts: model, state_dict"),
    "no state dict": (lambda: {"epoch": 3, "optimizer": {"lr": 0.1}}, r"no state dict .* epoch, optimizer"),
    "nothing": (dict, "nothing"),
    "no mapping": (lambda: [torch.zeros(3)], "holds a list"),
    "two normalisations": (lambda: small() | {"mean": ZERO, "mu": torch.ones(3), "std": torch.ones(3)}, "two ways"),
    "a mean alone": (lambda: small() | {"mu": ZERO}, "mean without a deviation"),
    "a deviation of zero": (lambda: small() | {"mu": ZERO, "sigma": ZERO}, r"std \[0.0, 0.0, 0.0\]"),
    "a mean of four channels": (lambda: small() | {"mu": torch.zeros(4), "sigma": ZERO + 1}, "images of 3 channels"),
    "a generator alone": (lambda: {"model": wavelets()}, r"add encoder=FILE"),
    "a generator of another depth": (lambda: {"model": shallow()}, "not the weights of this decoder"),
}  # fmt: skip


def wavelets() -> dict[str, torch.Tensor]:
    net = nn.Module()
    convs = [(3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
    net.features = {place: nn.Conv2d(*spec) for place, spec in zip((0, 3, 6, 8, 10), convs, strict=True)}
    return {f"module.{key}": value for key, value in TheirWavelets(net).state_dict().items()}


def shallow() -> dict[str, torch.Tensor]:
    gen = authors_network("alexnet-conv1").gen[:-6]
    return {f"module.generator.gen.{key}": value for key, value in gen.state_dict().items()}


@pytest.mark.parametrize("fault", list(BAD))
def test_what_is_not_exactly_a_network_is_refused(tmp_path, fault):
    make, said = BAD[fault]
    torch.save(make(), tmp_path / "net.pt")
    with pytest.raises(InputError, match=said) as refused:
        import_model(tmp_path / "net.pt", tmp_path / "model", ImportOptions())
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]  # nothing half is left


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_named_and_not_run(tmp_path, new_format):
    torch.save(
        {"model": small(), "args": Harmful(tmp_path / "made")},
        tmp_path / "net.pt",
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(InputError, match=r"it holds .*(Path|getattr).*weights_only=False"):
        import_model(tmp_path / "net.pt", tmp_path / "model", ImportOptions())
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.98])
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_file_that_breaks_off_is_refused(tmp_path, name, kept):
    path = tmp_path / name
    save_file(small(), path) if path.suffix == ".safetensors" else torch.save(small(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match=f"{name}: can't be read as weights"):
        import_model(path, tmp_path / "model", ImportOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "resnet18-cifar"}, "lacks weights for: bn1.weight.* the file has besides: conv1.bias"),
        ({"name": "small-cmn"}, "did you mean 'small-cnn'"),
        ({"layer": "conv44"}, "conv4"),
        ({"classes": ("a", "b")}, "2 names for 5 classes"),
        ({"mean": (0.0, 0.0, 0.0)}, "give both"),
        ({"encoder": "x.pt"}, "for a generator's file"),
        ({"eps": 0.5}, "norm=l2"),
        ({"width": 0.5}, "shapes differ"),
        ({"channels": 1}, "shapes differ"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, said):
    torch.save(small(), tmp_path / "net.pt")
    with pytest.raises(InputError, match=said):
        import_model(tmp_path / "net.pt", tmp_path / "model", ImportOptions(**options))
    assert not (tmp_path / "model").exists()
