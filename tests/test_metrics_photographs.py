"""PSNR, SSIM and LPIPS of distorted photographs against published libraries, in colour and grey, no image square."""

import io
import tarfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lpips as published_lpips
import numpy as np
import piqa
import pytest
import torch
import torchvision
from PIL import Image, ImageFilter
from pytorch_msssim import ssim as msssim_ssim
from torch import Tensor

from arae.data.load import to_channels
from arae.metrics import lpips, psnr, ssim

Pair = tuple[Tensor, Tensor]
# Archive, how many of its photographs, and the largest width and height cut from each, in pixels.
PHOTOGRAPHS = [("imagenet_even.tar", 3, (192, 256)), ("denoise.tar", 2, (240, 320)), ("highres.tar", 1, (480, 270))]


def noisy(image: Image.Image) -> Image.Image:
    levels = np.asarray(image) + np.random.default_rng(0).normal(0, 25, np.asarray(image).shape)
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(2))


def compressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=15)
    return Image.open(buffer).convert("RGB")


def darkened(image: Image.Image) -> Image.Image:
    return image.point(lambda level: level * 0.7)


DISTORTIONS = [noisy, blurred, compressed, darkened]


def photographs(archive: Path, count: int) -> Iterator[Image.Image]:
    """RGB photographs, evenly over the archive."""
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if name.lower().endswith((".png", ".jpg", ".jpeg")))
        for name in names[:: len(names) // count][:count]:
            file = tar.extractfile(name)
            assert file is not None
            yield Image.open(io.BytesIO(file.read())).convert("RGB")


def tensor(image: Image.Image, channels: int) -> Tensor:
    """[1, channels, H, W] float in [0, 1]."""
    return to_channels(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], channels).float() / 255


@pytest.fixture(params=[3, 1], ids=["colour", "grey"])
def pairs(request: pytest.FixtureRequest, test_data: Path) -> list[Pair]:
    return distorted(test_data, request.param)


@cache
def distorted(folder: Path, channels: int) -> list[Pair]:
    """Each photograph and each of its distortions, [1, C, H, W]."""
    found = []
    for name, count, (width, height) in PHOTOGRAPHS:
        for photograph in photographs(folder / name, count):
            cut = photograph.crop((0, 0, min(width, photograph.width), min(height, photograph.height - 7)))
            assert cut.width != cut.height
            found += [(tensor(cut, channels), tensor(distort(cut), channels)) for distort in DISTORTIONS]
    return found


def piqa_ssim(x: Tensor, y: Tensor) -> float:
    return piqa.SSIM(n_channels=x.shape[1])(x, y).item()


REFERENCES: list[tuple[Any, Callable[[Tensor, Tensor], float], float]] = [
    (psnr, lambda x, y: piqa.PSNR(epsilon=0)(x, y).item(), 1e-3),
    (ssim, lambda x, y: msssim_ssim(x, y, data_range=1).item(), 1e-4),
    (ssim, piqa_ssim, 1e-4),
]


@pytest.mark.parametrize(
    ("metric", "published", "tolerance"), REFERENCES, ids=lambda value: getattr(value, "__name__", None)
)
def test_equals_published(
    pairs: list[Pair],
    metric: Callable[[Tensor, Tensor], Tensor],
    published: Callable[[Tensor, Tensor], float],
    tolerance: float,
) -> None:
    found = torch.cat([metric(x, y) for x, y in pairs])
    expected = torch.tensor([published(x, y) for x, y in pairs])
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert found.std() > 10 * tolerance  # photographs and distortions that a wrong formula could not all get right


def test_a_mean_of_a_batch_is_not_a_metric_of_a_batch(pairs: list[Pair]) -> None:
    """Distortions of one photograph as one batch: each image's value, not that of their mean error."""
    x, y = (torch.cat(side) for side in zip(*pairs[: len(DISTORTIONS)], strict=True))
    for metric in (psnr, ssim):
        alone = torch.cat([metric(a, b) for a, b in pairs[: len(DISTORTIONS)]])
        torch.testing.assert_close(metric(x, y), alone, rtol=0, atol=1e-5)


BACKBONES = {
    "alex": torchvision.models.alexnet,
    "squeeze": torchvision.models.squeezenet1_1,
    "vgg": torchvision.models.vgg16,
}


@pytest.mark.parametrize("net", list(BACKBONES))
def test_lpips_equals_the_package(test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: str) -> None:
    """The same random backbone in the package's own network, which normalises [0, 1] itself."""
    for skipped in ("normal_", "kaiming_normal_", "kaiming_uniform_"):  # for VGG it takes seconds, and is overwritten
        monkeypatch.setattr(torch.nn.init, skipped, lambda tensor, *_args, **_options: tensor)
    with torch.device("meta"):  # of VGG, the classifier is most
        layers = BACKBONES[net]().features.state_dict()
    weights = {f"features.{name}": torch.randn(layer.shape) / layer[0].numel() ** 0.5 for name, layer in layers.items()}
    torch.save(weights, tmp_path / "backbone.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the package's way to ask torchvision for a network is old
        reference = published_lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for parameter, value in zip(reference.net.parameters(), weights.values(), strict=True):  # in the layers' order
        parameter.data.copy_(value)
    some = [pair for channels in (3, 1) for pair in distorted(test_data, channels)[::5]]
    cut = [(x[..., :48, :64], y[..., :48, :64]) for x, y in some]
    found = torch.cat([lpips(x, y, net=net, weights=tmp_path / "backbone.pth") for x, y in cut])  # type: ignore[arg-type]
    with torch.no_grad():
        rgb = [[side.expand(-1, 3, -1, -1) for side in pair] for pair in cut]
        expected = torch.cat([reference(x, y, normalize=True).flatten() for x, y in rgb])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert found.min() > 0
