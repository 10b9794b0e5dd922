"""Encoders' weights from files: ours, others' names for the same network, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from arae.errors import InputError
from arae.models import create_encoder


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _theirs_resnet(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """ResNet-18 under the names of CIFAR code, from functions alone."""

    def norm(name: str, x: Tensor) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(w[f"{name}.{key}"] for key in keys))

    x = F.relu(norm("bn1", F.conv2d(x, w["conv1.weight"], padding=1)))
    for at in (f"layer{stage}.{block}." for stage in range(1, 5) for block in (0, 1)):
        stride = 1 + (at + "shortcut.0.weight" in w)
        out = F.relu(norm(at + "bn1", F.conv2d(x, w[at + "conv1.weight"], stride=stride, padding=1)))
        out = norm(at + "bn2", F.conv2d(out, w[at + "conv2.weight"], padding=1))
        if stride == 2:
            x = norm(at + "shortcut.1", F.conv2d(x, w[at + "shortcut.0.weight"], stride=stride))
        x = F.relu(out + x)
    return F.linear(F.avg_pool2d(x, 4).flatten(1), w["linear.weight"], w["linear.bias"])


def _theirs_wideresnet(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """WideResNet-28 under the names of TRADES' code, from functions alone."""

    def active(name: str, x: Tensor) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(x, *(w[f"{name}.{key}"] for key in keys)))

    x = F.conv2d(x, w["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for at in (f"block{stage}.layer.{block}." for block in range(4)):
            first = at + "convShortcut.weight" in w
            stride = 2 if first and stage > 1 else 1
            inp = active(at + "bn1", x)
            out = F.conv2d(inp, w[at + "conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(active(at + "bn2", out), w[at + "conv2.weight"], padding=1)
            x = out + (F.conv2d(inp, w[at + "convShortcut.weight"], stride=stride) if first else x)
    return F.linear(F.avg_pool2d(active("bn1", x), 8).flatten(1), w["fc.weight"], w["fc.bias"])


def _with_statistics(net: nn.Module) -> None:
    for name, buffer in net.named_buffers():
        if name.endswith(("mean", "var")):
            nn.init.uniform_(buffer, 0.5, 1.5)


@pytest.mark.parametrize(
    ("name", "rename", "besides", "theirs"),
    [
        ("resnet18-cifar", [(r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")], [], _theirs_resnet),
        ("wrn-28-10", [], ["sub_block1.layer.0.conv1.weight"], _theirs_wideresnet),
    ],
)
def test_robustbench_files_load_and_compute_what_they_computed(tmp_path, name, rename, besides, theirs):
    source = create_encoder(name, 10, width=0.2).eval()
    _with_statistics(source.net)
    file = {key: torch.ones(1) for key in besides}
    for key, value in source.net.state_dict().items():
        for ours, named in rename:
            key = re.sub(ours, named, key)
        file[key] = value
    save_file(file, tmp_path / "theirs.safetensors")
    loaded = create_encoder(name, 10, pretrained=tmp_path / "theirs.safetensors", width=0.2).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(file, (x - loaded.mean) / loaded.std)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    save_file(file | {"stranger.weight": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(InputError, match=r"the file has besides: stranger\.weight"):
        create_encoder(name, 10, pretrained=tmp_path / "more.safetensors", width=0.2)


NETWORK_WEIGHTS = {"own": lambda encoder: encoder.state_dict(), "bare": lambda encoder: encoder.net.state_dict()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", list(NETWORK_WEIGHTS))
def test_pretrained_weights(tmp_path, suffix, kind):
    source = create_encoder("small-cnn", 10, in_channels=1)
    path = tmp_path / f"weights{suffix}"
    weights = NETWORK_WEIGHTS[kind](source)
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(create_encoder("small-cnn", 10, in_channels=1, pretrained=path)(x), source(x))
    assert not torch.equal(create_encoder("small-cnn", 10, in_channels=1)(x), source(x))


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights["net.fc.bias2"] = weights.pop("net.fc.bias")
    return weights


class Harmful:
    """Not tensors: what an unpickler would run."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, r"lacks weights for: net.fc.bias; the file has besides: net.fc.bias2"),
        (lambda w: w | {"net.fc.bias": torch.zeros(7)}, r"shapes differ: net.fc.bias \(7,\) for \(10,\)"),
        (lambda w: {"epoch": 3, "model": w}, "more than tensors.*epoch, model"),
        (lambda w: Harmful(), "can't be read as weights"),
    ],
)
def test_weights_that_do_not_match_are_refused(tmp_path, change, message):
    path = tmp_path / "weights.pt"
    torch.save(change(dict(create_encoder("small-cnn", 10).state_dict())), path)
    with pytest.raises(InputError, match=message):
        create_encoder("small-cnn", 10, pretrained=path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_damaged_or_missing_weights_are_refused(tmp_path: Path, name):
    with pytest.raises(InputError, match="no such file"):
        create_encoder("small-cnn", 10, pretrained=tmp_path / name)
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(InputError, match="can't be read as weights"):
        create_encoder("small-cnn", 10, pretrained=tmp_path / name)
