"""Metrics against published libraries and SciPy; what they refuse; where LPIPS finds its weights."""

import hashlib
import io
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pytorch_msssim import ssim as published_ssim
from scipy import stats

from arae import metrics
from arae.errors import InputError
from arae.metrics import METRICS, MetricUnavailable, lpips, mean_interval, psnr, ssim, wilson


def pair(n: int = 4, channels: int = 3, height: int = 40, width: int = 32, noise: float = 0.1):
    """Smooth images, and noisy ones."""
    g = torch.Generator().manual_seed(0)
    low = torch.rand(n, channels, 6, 6, generator=g)
    x = torch.nn.functional.interpolate(low, (height, width), mode="bicubic").clamp(0, 1)
    return x, (x + noise * torch.randn(x.shape, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("noise", [0.001, 0.1, 1.0])
def test_psnr_is_the_mean_of_each_image(channels, noise):
    x, y = pair(channels=channels, noise=noise)
    mse = ((x.double() - y.double()) ** 2).numpy().reshape(len(x), -1).mean(1)
    np.testing.assert_allclose(psnr(x, y).numpy(), 10 * np.log10(1 / mse), rtol=1e-5)


def test_psnr_of_equal_images_is_the_ceiling():
    x, _ = pair()
    assert psnr(x, x).tolist() == [100.0] * 4


def test_psnr_by_hand():
    x = torch.zeros(1, 1, 2, 2)
    assert psnr(x, x + 0.1).item() == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("size", [(11, 11), (28, 28), (64, 33)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
def test_ssim_equals_published(size, channels, noise):
    x, y = pair(channels=channels, height=size[0], width=size[1], noise=noise)
    expected = published_ssim(x, y, data_range=1.0, size_average=False)
    torch.testing.assert_close(ssim(x, y), expected, rtol=0, atol=1e-4)


def test_ssim_equals_piqa():
    piqa = pytest.importorskip("piqa")
    x, y = pair()
    expected = piqa.SSIM(reduction="none")(x, y)
    torch.testing.assert_close(ssim(x, y), expected, rtol=0, atol=1e-4)


def test_ssim_extremes():
    x, _ = pair()
    torch.testing.assert_close(ssim(x, x), torch.ones(4))
    assert ssim(x, 1 - x).max() < 0.3
    assert ssim(torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)).item() < 1e-3


def test_image_metrics_take_each_image_for_itself():
    x, y = pair()
    for metric in (psnr, ssim):
        alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(metric(x, y), alone)


@pytest.mark.parametrize("metric", [psnr, ssim, lpips])
def test_what_is_no_pair_of_images_is_refused(metric):
    x, y = pair()
    with pytest.raises(ValueError, match="one shape"):
        metric(x, y[:2])
    with pytest.raises(ValueError, match="one shape"):
        metric(x[0], y[0])
    with pytest.raises(ValueError, match="8-bit"):
        metric((x * 255).byte(), (y * 255).byte())


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="11×11"):
        ssim(*pair(height=10))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of AlexNet's convolutions, in torchvision's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("trunk") / "alexnet.pth"
    weights = torchvision.models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{name}": tensor for name, tensor in weights.items()}, path)
    return path


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, and no server."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(metrics, "_HUB", "http://127.0.0.1:9/")
    monkeypatch.setattr(metrics, "_FAILED", {})
    return tmp_path / "hub" / "checkpoints"


def direct_lpips(x: torch.Tensor, y: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """LPIPS (v0.1, AlexNet) written out: unit-length features after each ReLU, weighted square differences."""
    import lpips as package

    heads = torch.load(Path(package.__file__).parent / "weights/v0.1/alex.pth", "cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    net = torchvision.models.alexnet(weights=None).features
    net.load_state_dict({name.removeprefix("features."): tensor for name, tensor in weights.items()})
    total = torch.zeros(len(x))
    a, b = ((2 * images - 1 - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for images in (x, y))
    for i, layer in enumerate(net):
        a, b = layer(a), layer(b)
        if i in (1, 4, 7, 9, 11):
            unit = [f / f.square().sum(1, keepdim=True).sqrt() for f in (a, b)]
            head = heads[f"lin{(1, 4, 7, 9, 11).index(i)}.model.1.weight"]
            total += ((unit[0] - unit[1]) ** 2 * head).sum(1).mean((1, 2))
    return total.detach()


def test_lpips_equals_its_definition(trunk):
    x, y = pair(height=64, width=64)
    found = lpips(x, y, weights=trunk)
    weights = torch.load(trunk, weights_only=True)
    torch.testing.assert_close(found, direct_lpips(x, y, weights), rtol=1e-4, atol=1e-6)
    assert found.shape == (4,)
    assert found.min() > 0
    assert lpips(x, x, weights=trunk).abs().max() < 1e-6


def test_lpips_repeats_grey_to_rgb(trunk):
    x, y = pair(channels=1, height=64, width=64)
    grey, rgb = lpips(x, y, weights=trunk), lpips(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1), weights=trunk)
    torch.testing.assert_close(grey, rgb)


def test_lpips_finds_weights_in_the_cache(trunk, no_cache):
    no_cache.mkdir(parents=True)
    shutil.copy(trunk, no_cache / "alexnet-owt-7be5be79.pth")
    assert torch.isfinite(lpips(*pair(height=64, width=64))).all()


def test_lpips_without_weights_says_why(no_cache):
    for _ in range(2):  # the second time from memory
        with pytest.raises(MetricUnavailable, match=r"refused.*alexnet-owt-7be5be79\.pth"):
            lpips(*pair(height=64, width=64))
    assert not list(no_cache.glob("*"))


@pytest.mark.parametrize("honest", [True, False])
def test_lpips_downloads_what_its_hash_vouches_for(trunk, no_cache, tmp_path, monkeypatch, honest):
    data = trunk.read_bytes()
    name = f"alexnet-{hashlib.sha256(data).hexdigest()[:8] if honest else '00000000'}.pth"
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / name).write_bytes(data)
    monkeypatch.setattr(metrics, "_HUB", (tmp_path / "server").as_uri() + "/")
    monkeypatch.setitem(metrics._BACKBONES, "alex", (name, 31))
    if honest:
        assert torch.isfinite(lpips(*pair(height=64, width=64))).all()
    else:
        with pytest.raises(MetricUnavailable, match="SHA-256"):
            lpips(*pair(height=64, width=64))
    assert (no_cache / name).is_file() == honest
    assert len(list(no_cache.glob("*"))) == honest  # no half file


def test_lpips_refuses_what_does_not_fit(trunk, tmp_path):
    with pytest.raises(MetricUnavailable, match="31×31"):
        lpips(*pair(height=28, width=28), weights=trunk)
    with pytest.raises(MetricUnavailable, match="no file"):
        lpips(*pair(), weights=tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="backbone"):
        lpips(*pair(), net="squeeze", weights=trunk)
    with pytest.raises(ValueError, match="write one of"):
        lpips(*pair(), net="resnet")


@pytest.mark.parametrize(
    ("net", "smallest"), [(net, size) for net, (_, size) in metrics._BACKBONES.items() if net != "vgg"]
)
def test_lpips_takes_the_smallest_size_it_names(net, smallest, tmp_path):
    path = tmp_path / "weights.pth"
    build = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}[net]
    torch.save(build(weights=None).state_dict(), path)
    assert torch.isfinite(lpips(*pair(height=smallest, width=smallest), net=net, weights=path)).all()


def test_lpips_with_real_weights(tmp_path):
    folder = os.environ.get("ARAE_TEST_DATA")
    if not folder or not (Path(folder) / "weights.tar").is_file():
        pytest.skip("ARAE_TEST_DATA does not name a folder with weights.tar")
    with tarfile.open(Path(folder) / "weights.tar") as archive:
        file = archive.extractfile("weights/squeezenet1_1_caffe_fp16.pt")
        assert file is not None
        weights = torch.load(io.BytesIO(file.read()), weights_only=True)
    torch.save(weights, tmp_path / "squeeze.pt")
    x, y = pair(height=64, width=64, noise=0.05)
    slight, heavy = (
        lpips(x, other, net="squeeze", weights=tmp_path / "squeeze.pt")
        for other in (y, pair(height=64, width=64, noise=0.5)[1])
    )
    assert bool((slight < heavy).all())


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (623, 1000), (9999, 10000)])
def test_wilson_equals_published(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    low, high = wilson(k, n)
    assert (low, high) == (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9))
    assert 0 <= low <= k / n <= high <= 1


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="can't be"):
        wilson(k, n)


def test_mean_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    expected = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert mean_interval(torch.from_numpy(values)) == pytest.approx(expected, rel=1e-9)
    assert mean_interval(values.tolist()) == pytest.approx(expected, rel=1e-9)
    assert mean_interval([2.5]) == (2.5, 2.5)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_each_metric_says_what_it_means():
    assert {"clean_accuracy", "robust_accuracy", "psnr", "ssim", "lpips"} <= set(METRICS)
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.direction in ("higher", "lower")
        assert metric.range[0] < metric.range[1]
        assert metric.unit
        assert metric.reference
    assert METRICS["lpips"].direction == "lower"
    assert math.isinf(METRICS["lpips"].range[1])
