"""Other projects' networks, rebuilt plainly, and their checkpoints as those projects write them."""

import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


def spectral(layer: nn.Module) -> nn.Module:
    """torch's older spectral norm, which the authors' files were written with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(layer)


def used(model: nn.Module) -> nn.Module:
    """Weights, statistics and singular vectors as of a trained network, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def triple(layer: nn.Module, channels: int) -> list[nn.Module]:
    return [spectral(layer), nn.BatchNorm2d(channels), nn.ReLU()]


def conv(inp: int, out: int) -> list[nn.Module]:
    return triple(nn.Conv2d(inp, out, 3, padding=1, bias=False), out)


def tconv(inp: int, out: int, stride: int = 2) -> list[nn.Module]:
    return triple(nn.ConvTranspose2d(inp, out, 4, stride=stride, padding=1, bias=False), out)


def near(inp: int, out: int) -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2, mode="nearest"), *conv(inp, out)]


LAST = lambda: [spectral(nn.Conv2d(3, 3, 3, padding=1)), nn.Tanh()]  # noqa: E731
GENERATORS: dict[str, tuple[str, Callable[[], list[nn.Module]]]] = {
    "alexnet-conv5": ("conv5", lambda: [
        *conv(256, 256), *tconv(256, 256, 1), *conv(256, 256), *tconv(256, 256), *conv(256, 256), *tconv(256, 128),
        *conv(128, 128), *tconv(128, 64), *conv(64, 64), *tconv(64, 32), *conv(32, 32), *tconv(32, 3), *LAST(),
    ]),
    "alexnet-conv5-interp": ("conv5", lambda: [
        *conv(256, 256), *tconv(256, 256, 1), *conv(256, 256), *near(256, 256), *near(256, 128), *near(128, 64),
        *near(64, 32), *near(32, 3), *LAST(),
    ]),
    "alexnet-conv2": ("conv2", lambda: [
        *conv(192, 192), *tconv(192, 192, 1), *conv(192, 96), *near(96, 96), *conv(96, 64), *near(64, 64),
        *near(64, 64), *near(64, 32), *conv(32, 3), *LAST(),
    ]),
    "alexnet-conv1": ("conv1", lambda: [
        *conv(64, 64), *tconv(64, 64, 1), *conv(64, 64), *near(64, 64), *conv(64, 32), *near(32, 32), *near(32, 16),
        *conv(16, 3), *LAST(),
    ]),
}  # fmt: skip
"""The authors' generators by layer, as plain sequences: their names, gen.N, are the places in the row."""


class TheirDiscriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        specs = [(3, 32, 7, 4, 1), (32, 64, 5, 1, 0), (64, 128, 3, 2, 0), (128, 256, 3, 1, 0), (256, 256, 3, 2, 0)]
        rows = [[spectral(nn.Conv2d(*spec)), nn.ReLU(), nn.Identity()] for spec in specs]
        self.features = nn.Sequential(*(layer for row in rows for layer in row))
        self.classifier01 = nn.Sequential(
            spectral(nn.Linear(9216, 1024)), nn.ReLU(), spectral(nn.Linear(1024, 512)), nn.ReLU()
        )
        self.classifier02 = nn.Sequential(
            nn.Dropout(), spectral(nn.Linear(768, 512)), nn.ReLU(), nn.Dropout(), spectral(nn.Linear(512, 1))
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.classifier02(torch.cat([self.features(x).mean((2, 3)), self.classifier01(z.flatten(1))], 1))


def alexnet(classes: int = 12) -> nn.Module:
    """torchvision's, with dense layers that keep the files small."""
    return used(torchvision.models.alexnet(num_classes=classes))


def robustness_file(net: nn.Module) -> dict[str, object]:
    """A checkpoint as the robustness library writes it."""
    weights = {key.replace("classifier.6.", "last_layer."): value for key, value in net.state_dict().items()}
    mean, std = (value.view(3, 1, 1) for value in IMAGENET)
    model = OrderedDict({"module.normalizer.new_mean": mean, "module.normalizer.new_std": std})
    model |= {f"module.model.{key}": value for key, value in weights.items()}
    model |= {f"module.attacker.model.{key}": value for key, value in weights.items()}
    model |= {"module.attacker.normalize.new_mean": mean, "module.attacker.normalize.new_std": std}
    return {"model": model, "optimizer": {"state": {}, "param_groups": []}, "schedule": None, "epoch": 90, "amp": None}


def generator_file(
    net: nn.Module, generator: nn.Module, layer: str, discriminator: nn.Module | None
) -> dict[str, object]:
    """A checkpoint as the authors' code writes it: the encoder up to the tap, the generator, the discriminator."""
    ends = {"conv1": 3, "conv2": 6, "conv5": 13}
    features = {k: v for k, v in net.state_dict().items() if k.startswith("features")}
    encoder = {k: v for k, v in features.items() if int(k.split(".")[1]) < ends[layer]}
    model = {f"module.classifier.{key}": value for key, value in encoder.items()}
    model |= {f"module.generator.{key}": value for key, value in generator.state_dict().items()}
    found = discriminator and {f"module.{key}": value for key, value in discriminator.state_dict().items()}
    rest = {"optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 3e-4, "betas": (0, 0.9)}]}, "epoch": 90}
    return {"model": model, "discriminator": found, "schedule": {"last_epoch": 3}, **rest}


def authors_network(name: str) -> nn.Module:
    """A generator with random weights; what is not used lies in the files, too."""
    theirs = nn.Module()
    theirs.gen = used(nn.Sequential(*GENERATORS[name][1]()))
    theirs.linear1, theirs.linear2 = nn.Linear(3, 4), nn.Linear(3, 4)
    return theirs


HAAR = {"LL": (1, 1, 1, 1), "LH": (-1, 1, -1, 1), "HL": (-1, -1, 1, 1), "HH": (1, -1, -1, 1)}  # twice, row by row
WAVELET = {
    "conv7_1": (256, 256), "conv6_1": (256, 256), "conv5_1": (256, 256), "conv5_2": (256, 192), "conv4_1": (192, 128),
    "conv4_2": (128, 64), "conv3_1": (64, 64), "conv2": (64, 32), "conv2_1": (32, 32), "conv1": (32, 3),
}  # fmt: skip


class TheirWavelets(nn.Module):
    """The denoiser: AlexNet's convolutions with Haar pooling, and the generator with its skips."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        places = {"conv1_1": 0, "conv2_1": 3, "conv3_1": 6, "conv3_2": 8, "conv3_3": 10}
        self.classifier = nn.ModuleDict({name: net.features[place] for name, place in places.items()})
        self.generator = nn.ModuleDict()
        for name, (inp, out) in WAVELET.items():
            self.generator[name] = spectral(nn.Conv2d(inp, out, 3, padding=1, bias=False))
            self.generator[name.replace("conv", "bn")] = nn.BatchNorm2d(out)
        self.generator["conv1_1"] = spectral(nn.Conv2d(3, 3, 3, padding=1))
        for level, channels in ((1, 64), (2, 192), (3, 256)):
            for part, kind in ((self.classifier, "pool"), (self.generator, "unpool")):
                bands = nn.ModuleDict(
                    {band: nn.Conv2d(channels, channels, 2, 2, groups=channels, bias=False) for band in HAAR}
                )
                for band, conv_ in bands.items():
                    conv_.weight.data = (torch.tensor(HAAR[band]) / 2).view(1, 1, 2, 2).repeat(channels, 1, 1, 1)
                part[f"{kind}{level}"] = bands

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1] of images normalised to [-1, 1]."""
        skips = {}
        for names, level in ((["conv1_1"], 1), (["conv2_1"], 2), (["conv3_1", "conv3_2", "conv3_3"], 3)):
            for name in names:
                x = F.relu(self.classifier[name](x))
            skips[level] = {band: pool(x) for band, pool in self.classifier[f"pool{level}"].items()}
            x = skips[level]["LL"]
        x = self._rows(x, "conv7_1")
        x = self._rows(self._unpool(x, skips, 3), "conv6_1")
        x = self._rows(F.pad(x, (1, 0, 0, 1), mode="reflect"), "conv5_1", "conv5_2")
        x = F.pad(self._unpool(x, skips, 2), (1, 0, 0, 1), mode="reflect")
        x = F.pad(self._unpool(self._rows(x, "conv4_1", "conv4_2"), skips, 1), (2, 0, 0, 2), mode="reflect")
        x = self._rows(F.interpolate(self._rows(x, "conv3_1"), scale_factor=2), "conv2", "conv2_1")
        x = self._rows(F.interpolate(x, scale_factor=2), "conv1")
        return (torch.tanh(self.generator["conv1_1"](x)) + 1) / 2

    def _rows(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = F.relu(self.generator[name.replace("conv", "bn")](self.generator[name](x)))
        return x

    def _unpool(self, low: Tensor, skips: dict[int, dict[str, Tensor]], level: int) -> Tensor:
        bands = skips[level] | {"LL": low}
        filters = self.generator[f"unpool{level}"]
        made = [F.conv_transpose2d(x, filters[band].weight, stride=2, groups=x.shape[1]) for band, x in bands.items()]
        return torch.stack(made).sum(0)


class ResNetBlock(nn.Module):
    """A basic block under the names of CIFAR ResNets."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and inp == out
        self.shortcut = nn.Sequential(
            *([] if same else [nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out)])
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class CifarResNet18(nn.Module):
    """RobustBench's ResNet-18 at 1/8 of its width: no normalisation, pooling of 4×4."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        for i, (inp, out) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)], start=1):
            stride = 1 if i == 1 else 2
            setattr(self, f"layer{i}", nn.Sequential(ResNetBlock(inp, out, stride), ResNetBlock(out, out, 1)))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class WideBlock(nn.Module):
    """A block under the names of TRADES' WideResNet."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inp), nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        if inp != out:
            self.convShortcut = nn.Conv2d(inp, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        made = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return made + (self.convShortcut(active) if hasattr(self, "convShortcut") else x)


class WideResNet(nn.Module):
    """TRADES' WideResNet of depth 28 at 1/10 of its width, with the block that it makes and never runs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        stages = {"block1": (16, 16, 1), "sub_block1": (16, 16, 1), "block2": (16, 32, 2), "block3": (32, 64, 2)}
        for name, (inp, out, stride) in stages.items():
            stage = nn.Module()
            stage.layer = nn.Sequential(WideBlock(inp, out, stride), *(WideBlock(out, out, 1) for _ in range(3)))
            self.add_module(name, stage)
        self.bn1, self.fc = nn.BatchNorm2d(64), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return self.fc(F.avg_pool2d(F.relu(self.bn1(x)), 8).flatten(1))
