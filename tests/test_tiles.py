"""Images at their own size: tiles that equal the whole, the seams' measure, files of every kind."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import convolutional, through
from PIL import Image
from torch import nn
from training import tiny_recipe

from arae.errors import InputError
from arae.evaluate import highres
from arae.evaluate.highres import bytes_per_pixel, high_resolution, read_whole
from arae.evaluate.tiles import plan_tiles, reach, reconstruct_tiled, seam_ratio, stride_of
from arae.metrics import psnr
from arae.models import create_encoder
from arae.records import Record


def photograph(height: int, width: int) -> torch.Tensor:
    """Something smooth with edges and noise, [1, 3, H, W]."""
    torch.manual_seed(1)
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth + 0.05 * torch.randn(smooth.shape)).clamp(0, 1)


@pytest.mark.parametrize(
    ("name", "layer", "stride"),
    [("alexnet", "conv1", 8), ("alexnet", "conv5", 32), ("resnet18-cifar", "layer4", 8), ("small-cnn", "conv3", 4)],
)
def test_the_stride_is_the_product_of_the_layers(name: str, layer: str, stride: int) -> None:
    side = 224 if name == "alexnet" else 32
    model, _ = through(1.0)
    model.encoder, model.layer, model.image_shape = create_encoder(name, 3, 3, side), layer, (3, side, side)
    assert stride_of(model) == stride


def test_features_of_a_fixed_size_can_not_be_tiled() -> None:
    model = convolutional()
    model.encoder.net.relu2 = nn.AdaptiveAvgPool2d(4)
    with pytest.raises(InputError, match=r"small-cnn.*conv2.*evaluate\.tile"):
        plan_tiles(model, 128)


@pytest.mark.parametrize("layer", ["conv2", "conv4"])
def test_nothing_further_than_the_reach_has_a_say(layer: str) -> None:
    """Against the real weights, in double: change all of the image's left part and see what changes."""
    model = convolutional(layer=layer)
    side = 128
    far = reach(model, side, stride_of(model))
    assert far is not None
    for network in (model.encoder, model.decoder):
        assert network is not None
        network.double()
    x = photograph(side, side).double()
    changed = x.clone()
    changed[:, :, :, :64] = torch.rand(1, 3, side, 64, dtype=torch.float64)
    moved = (model.reconstruct(x) != model.reconstruct(changed)).any(0).any(0).any(0)
    last = int(moved.nonzero().max()) - 63
    assert far - stride_of(model) < last <= far  # and it is not much more than need be


@pytest.mark.parametrize(("height", "width"), [(200, 301), (40, 333), (256, 128)])
@pytest.mark.parametrize("layer", ["conv2", "conv4"])
def test_tiled_is_whole(height: int, width: int, layer: str) -> None:
    model = convolutional(layer=layer)
    tiling = plan_tiles(model, 130)
    assert tiling.exact
    assert tiling.side == 128
    x = photograph(height, width)
    again, seams = reconstruct_tiled(model, x, tiling)
    whole = model.reconstruct(x)
    assert whole.std() > 0.05
    assert torch.allclose(again, whole, atol=1e-5)
    assert bool(seams[0]) == (height > 128)
    assert bool(seams[1]) == (width > 128)


def test_tiled_is_whole_on_a_photograph_of_real_size(test_data: Path, tmp_path: Path) -> None:
    with tarfile.open(test_data / "highres.tar") as tar:
        tar.extract("highres/img_001.png", tmp_path, filter="data")
    x = read_whole(tmp_path / "highres" / "img_001.png", 3)[None]
    assert min(x.shape[2:]) > 500
    model = convolutional(layer="conv4")
    tiling = plan_tiles(model, 320)
    again, seams = reconstruct_tiled(model, x, tiling)
    whole = model.reconstruct(x)
    assert torch.allclose(again, whole, atol=1e-4)
    assert seam_ratio(again - x, seams).item() == pytest.approx(1, abs=0.2)


def test_tiles_too_small_for_the_reach_are_blended() -> None:
    model = convolutional(layer="conv4")
    tiling = plan_tiles(model, 64)
    assert not tiling.exact
    x = photograph(200, 300)
    again, _ = reconstruct_tiled(model, x, tiling)
    whole = model.reconstruct(x)
    assert not torch.allclose(again, whole, atol=1e-4)
    assert (again - whole).abs().mean() < 0.25 * (whole - whole.mean()).abs().mean()
    with pytest.raises(InputError, match=r"evaluate\.tile = 31"):
        plan_tiles(model, 31)


def test_a_seam_is_seen() -> None:
    error = 0.01 * torch.randn(2, 3, 64, 64)
    assert seam_ratio(error, ([32], [32])).tolist() == pytest.approx([1, 1], abs=0.2)
    error[1, :, 32:] += 0.1
    clean, torn = seam_ratio(error, ([32], [])).tolist()
    assert clean == pytest.approx(1, abs=0.3)
    assert torn > 5
    assert seam_ratio(error, ([], [])).tolist() == [1, 1]
    assert seam_ratio(torch.zeros(2, 3, 8, 8), ([4], [])).tolist() == [1, 1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several kinds: two sizes of colour, grey, turned, broken, empty, and no image."""
    root = tmp_path / "photographs"
    root.mkdir()
    random = np.random.default_rng(0)
    for name, shape in {"a.png": (40, 70, 3), "b.png": (33, 50, 3), "grey.png": (48, 20)}.items():
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(root / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 20), (200, 10, 10)).save(root / "turned.jpg", exif=turned)
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:500])
    (root / "empty.jpg").touch()
    (root / "notes.txt").write_text("no image")
    return root


def measured(recipe_of: Path, factor: float, **overrides: object) -> tuple[dict[str, Record], list[str]]:
    recipe = tiny_recipe(recipe_of, evaluate__protocol="high-resolution", **overrides)
    notes: list[str] = []
    records = high_resolution(recipe, through(factor)[0], lambda label, done, total: None, notes.append)
    assert {record.protocol for record in records} == {"high-resolution"}
    return {record.metric: record for record in records}, notes


def test_files_are_measured_at_their_own_size(tiny_npz: Path, folder: Path) -> None:
    records, notes = measured(tiny_npz, 0.9, evaluate__images=str(folder))
    names = ["a.png", "b.png", "grey.png", "turned.jpg"]
    images = [np.asarray(Image.open(folder / name).convert("RGB")) / 255 for name in names]
    expected = [-10 * np.log10(np.square(0.1 * image).mean()) for image in images]
    assert records["psnr"].value == pytest.approx(np.mean(expected), abs=1e-3)
    assert records["psnr"].n == 4
    assert (records["psnr"].dataset, records["psnr"].split) == ("photographs", "all")
    assert set(records) == {"psnr", "ssim"}  # nothing was tiled
    assert [note.split(":")[0] for note in notes] == ["left out broken.png", "left out empty.jpg"]
    assert records["psnr"].flags == tuple(notes)
    assert read_whole(folder / "turned.jpg", 3).shape == (3, 30, 20)
    assert read_whole(folder / "a.png", 1).shape == (1, 40, 70)


def test_a_tile_gives_the_seams(tiny_npz: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(
        tiny_npz, evaluate__protocol="high-resolution", evaluate__images=str(folder), evaluate__tile=48
    )
    model = convolutional()
    records = high_resolution(recipe, model, lambda label, done, total: None, lambda text: None)
    by_metric = {record.metric: record for record in records}
    assert by_metric["seam"].n == 2  # the others fit in one tile
    assert by_metric["seam"].direction == "lower"
    # The same where memory demands it: as if there were room for a square of 50 px.
    monkeypatch.setattr(highres, "free_memory", lambda device: int(2 * 64**2 * bytes_per_pixel(model)))
    recipe = recipe.replace({"evaluate.tile": None})
    records = high_resolution(recipe, model, lambda label, done, total: None, lambda text: None)
    assert "seam" not in {record.metric for record in records}
    monkeypatch.setattr(highres, "free_memory", lambda device: int(2 * 50**2 * bytes_per_pixel(model)))
    records = high_resolution(recipe, model, lambda label, done, total: None, lambda text: None)
    assert "seam" in {record.metric for record in records}


def test_a_folder_without_images(tiny_npz: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        measured(tiny_npz, 1.0, evaluate__images=str(tmp_path / "nowhere"))
    for name in ("a.png", "b.png", "grey.png", "turned.jpg"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="none of its 2 images can be read"):
        measured(tiny_npz, 1.0, evaluate__images=str(folder))


def test_whole_and_in_tiles_have_one_quality(tiny_npz: Path, tmp_path: Path) -> None:
    """An encoder and decoder that pad nothing they should not: the record's PSNR is the same to a hair."""
    root = tmp_path / "one"
    root.mkdir()
    levels = (photograph(160, 240)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(root / "x.png")
    model = convolutional()
    values = []
    for tile in (None, 96):
        recipe = tiny_recipe(
            tiny_npz, evaluate__protocol="high-resolution", evaluate__images=str(root), evaluate__tile=tile
        )
        records = high_resolution(recipe, model, lambda label, done, total: None, lambda text: None)
        values.append(next(r.value for r in records if r.metric == "psnr"))
    x = read_whole(root / "x.png", 3)[None]
    assert values[0] == pytest.approx(psnr(model.reconstruct(x), x).item(), abs=1e-4)
    assert values[1] == pytest.approx(values[0], abs=1e-4)
