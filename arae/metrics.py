"""What is measured: the formulas, and for each metric its direction, range, unit and reference.

Images are float in [0, 1], [N, C, H, W]; image metrics give one value an image, [N], in float32.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import tempfile
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arae.errors import AraeError, InputError, NotFinite
from arae.models.weights import read_weights

SSIM_WINDOW = 11  # px
PSNR_CEILING = 100.0  # dB, for images that are equal (or nearly): a mean over images stays finite


@dataclass(frozen=True)
class Metric:
    """A metric's meaning: which way is better, in what unit and range, after which source."""

    name: str
    direction: Literal["higher", "lower"]
    unit: str
    range: tuple[float, float]
    reference: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("clean_accuracy", "higher", "fraction", (0, 1), "share of images classified as labelled"),
        Metric(
            "robust_accuracy", "higher", "fraction", (0, 1), "Madry et al. 2018: the same, under the threat's attack"
        ),
        Metric("psnr", "higher", "dB", (0, PSNR_CEILING), "10 log10(1 / MSE), of each image, averaged over images"),
        Metric(
            "ssim", "higher", "1", (-1, 1), "Wang et al. 2004: 11 px Gaussian window of sigma 1.5, mean over channels"
        ),
        Metric("lpips", "lower", "1", (0, math.inf), "Zhang et al. 2018, package lpips, version 0.1 heads"),
        Metric(
            "seam",
            "lower",
            "1",
            (0, math.inf),
            "mean step of the reconstruction's error across the borders of its tiles, over its mean step: 1 is no seam",
        ),
    )
}


class MetricUnavailable(AraeError):  # noqa: N818 -- a state of the world, not a fault; its text becomes a record's reason
    """The metric can't be measured here; the message says why and how to mend it."""


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [N], of each image x against y, [N, C, H, W]; at most 100 dB (equal images).

    Raises ValueError (`NotFinite`) for images that hold NaN or infinity, as all image metrics do.
    """
    _check(x, y)
    mse = (x.float() - y.float()).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(10 ** (-PSNR_CEILING / 10)).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, [N], of each image x to y, [N, C, H, W], in [-1, 1] (Wang et al. 2004, Eq. 13).

    Gaussian window of 11 px and sigma 1.5, only where it fits inside the image; K1 = 0.01, K2 = 0.03; the map is
    averaged over space and channels. Raises ValueError for images smaller than the window.
    """
    _check(x, y)
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least 11×11 px, its window, not {x.shape[2]}×{x.shape[3]}")
    a, b = x.float(), y.float()
    n = len(a)
    with torch.autocast(a.device.type, enabled=False):  # differences of squares: half precision would lose them
        means = _window(torch.cat([a, b, a * a, b * b, a * b]))
    mu_a, mu_b, aa, bb, ab = (means[i * n : (i + 1) * n] for i in range(5))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    structure = (2 * (ab - mu_a * mu_b) + c2) / (aa - mu_a**2 + bb - mu_b**2 + c2)
    return (luminance * structure).flatten(1).mean(1)


Backbone = Literal["alex", "vgg", "squeeze"]
# torchvision's file of ImageNet weights, whose name ends in the start of its SHA-256; the smallest side that fits.
_BACKBONES: dict[str, tuple[str, int]] = {
    "alex": ("alexnet-owt-7be5be79.pth", 31),
    "vgg": ("vgg16-397923af.pth", 16),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", 17),
}
_HUB = "https://download.pytorch.org/models/"
_TIMEOUT = 10.0  # seconds without an answer


@torch.no_grad()
def lpips(x: Tensor, y: Tensor, net: Backbone = "alex", weights: str | Path | None = None) -> Tensor:
    """Learned perceptual distance, [N], of images x to y, [N, 3|1, H, W] (grey ones are repeated to RGB).

    net: the ImageNet network whose features are compared. weights: its file in torchvision's names; else torch's cache
    is looked up, then a download tried. Raises MetricUnavailable, with the reason, where the package or the weights
    can't be had or the images are too small for the network; InputError for weights that are not the network's.
    """
    _check(x, y)
    if net not in _BACKBONES:
        raise ValueError(f"net {net!r}: write one of {', '.join(_BACKBONES)}")
    smallest = _BACKBONES[net][1]
    if min(x.shape[2:]) < smallest:
        size = f"{x.shape[2]}×{x.shape[3]}"
        raise MetricUnavailable(f"LPIPS ({net}) needs images of at least {smallest}×{smallest} px, not {size}")
    model = _lpips_model(net, str(_backbone_file(net, weights))).to(x.device)
    with torch.autocast(x.device.type, enabled=False):
        a, b = (2 * images.float().expand(-1, 3, -1, -1) - 1 for images in (x, y))
        return model(a, b).flatten()


@lru_cache(maxsize=2)
def _lpips_model(net: str, path: str) -> nn.Module:
    try:
        import lpips as package
    except ImportError as error:
        raise MetricUnavailable(f"LPIPS needs the package lpips ({error}): pip install 'arae[eval]'") from None
    with warnings.catch_warnings():
        # lpips asks torchvision for untrained networks by an argument that torchvision has renamed.
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
        model = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    _fill_trunk(model.net, read_weights(path), path)
    return model.eval().requires_grad_(False)


def _fill_trunk(trunk: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load torchvision's `features.I…` into lpips' `sliceK.I…`, with nothing missing and nothing left over."""
    own = {"features." + name.split(".", 1)[1]: parameter for name, parameter in trunk.named_parameters()}
    given = {name: tensor for name, tensor in weights.items() if name.startswith("features.")}
    odd = sorted(own.keys() ^ given.keys()) or sorted(name for name in own if own[name].shape != given[name].shape)
    if odd:
        raise InputError(f"{where}: not the weights of this LPIPS backbone; these do not match: {', '.join(odd[:8])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])


def backbone_at_hand(net: Backbone, weights: str | Path | None = None) -> bool:
    """Whether LPIPS' file of ImageNet weights is on this machine, by that name or in torch's cache."""
    return (Path(weights) if weights is not None else _cached(net)).is_file()


def _cached(net: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONES[net][0]


def _backbone_file(net: str, weights: str | Path | None) -> Path:
    if weights is not None:
        if not Path(weights).is_file():
            raise MetricUnavailable(f"LPIPS ({net}): no file {weights}; give the backbone's ImageNet weights")
        return Path(weights)
    cached = _cached(net)
    if not cached.is_file():
        _download(_HUB + cached.name, cached)
    return cached


_FAILED: dict[str, str] = {}  # address -> why its download failed: not to be waited for again at every batch


def _download(url: str, target: Path) -> None:
    """Fetch a file whose name ends in the start of its SHA-256; all or nothing."""
    if url not in _FAILED:
        try:
            return _fetch(url, target)
        except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
            _FAILED[url] = str(getattr(error, "reason", error))
    folder = str(target.parent).replace(str(Path.home()), "~", 1)
    raise MetricUnavailable(
        f"LPIPS backbone weights could not be downloaded ({_FAILED[url]}): fetch {url} elsewhere and put it into "
        f"{folder}, or name it in evaluate.lpips_weights"
    )


def _fetch(url: str, target: Path) -> None:
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        urllib.request.urlopen(url, timeout=_TIMEOUT) as answer,
        tempfile.TemporaryDirectory(dir=target.parent) as here,
    ):
        part = Path(here) / target.name
        with part.open("wb") as file:
            while chunk := answer.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if not digest.hexdigest().startswith(target.stem.rsplit("-", 1)[1]):
            raise ValueError(f"its SHA-256 is {digest.hexdigest()[:8]}…, not the one in its name")
        part.replace(target)


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, from k successes in n trials (Wilson 1927)."""
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"{k} successes in {n} trials can't be")
    z = statistics.NormalDist().inv_cdf(0.975)
    p, spread = k / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def mean_interval(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of independent values, by the normal approximation; of one value, itself twice."""
    data = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(data) == 0 or not data.isfinite().all():
        raise ValueError(f"the mean of {'values that are no numbers' if len(data) else 'no values'} has no interval")
    mean = data.mean().item()
    if len(data) == 1:
        return mean, mean
    half = statistics.NormalDist().inv_cdf(0.975) * data.std().item() / math.sqrt(len(data))
    return mean - half, mean + half


def _window(images: Tensor) -> Tensor:
    """Gaussian means over 11×11 windows, one axis after the other."""
    channels = images.shape[1]
    offsets = torch.arange(11, device=images.device, dtype=images.dtype) - 5
    weights = (-(offsets**2) / (2 * 1.5**2)).exp()
    line = (weights / weights.sum()).expand(channels, 1, 11)
    rows = F.conv2d(images, line.unsqueeze(2), groups=channels)
    return F.conv2d(rows, line.unsqueeze(3), groups=channels)


def _check(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"give two batches [N, 3|1, H, W] of one shape, not {tuple(x.shape)} and {tuple(y.shape)}")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"images must be float in [0, 1], not {x.dtype} and {y.dtype}: divide 8-bit images by 255")
    for which, images in (("first", x), ("second", y)):
        whole = images.isfinite().flatten(1).all(1)
        if not whole.all():
            bad = int(whole.logical_not().nonzero()[0])
            raise NotFinite(
                f"image {bad} of the {which} batch holds NaN or infinity: mend what made it, or leave it out"
            )
