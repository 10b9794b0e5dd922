"""Robust accuracy by our attacks beside published ones, on a network that is not ours and on one that is."""

import gzip
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from arae.attacks import Threat, apgd, perturb, pgd
from arae.config import Attack
from arae.metrics import wilson
from arae.models import create_encoder

N, STEPS = 100, 20


class Subject(NamedTuple):
    """A network with images in [0, 1] and labels that it was not trained on."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: dict[str, float]  # norm -> a radius at which some stand and some fall


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def theirs(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A published robust CIFAR-10 network (alpha-beta-CROWN's `cifar_cnn_a_adv`) on real test images."""
    folder = tmp_path_factory.mktemp("weights")
    with tarfile.open(test_data / "weights.tar") as tar:
        [member] = [m for m in tar if m.name.endswith("cifar_cnn_a_adv.model")]
        member.name = "net.pt"
        tar.extract(member, folder, filter="data")
    net = nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    weights = torch.load(folder / "net.pt", weights_only=True)
    net.load_state_dict(weights.get("state_dict", weights))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    tiles = np.asarray(Image.open(test_data / "cifar10" / "test_even.webp").convert("RGB"))
    levels = tiles.reshape(25, 32, 20, 32, 3).transpose(0, 2, 4, 1, 3).reshape(500, 3, 32, 32)
    y = torch.as_tensor(np.load(test_data / "cifar10" / "labels.npz")["test_even"]).long()
    x = torch.from_numpy(levels.copy()).float() / 255
    return Subject(nn.Sequential(Normalise(mean, std), net).eval(), x[:N], y[:N], {"linf": 4 / 255, "l2": 0.4})


class Normalise(nn.Module):
    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@pytest.fixture(scope="module")
def ours(fashion_mnist: Path) -> Subject:
    """The small CNN, trained by PGD for some seconds on Fashion-MNIST's test images; the last ones are kept apart."""
    with gzip.open(fashion_mnist / "t10k-images-idx3-ubyte.gz") as file:
        x = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=16).copy()).view(-1, 1, 28, 28).float() / 255
    with gzip.open(fashion_mnist / "t10k-labels-idx1-ubyte.gz") as file:
        y = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).copy()).long()
    torch.manual_seed(0)
    model = create_encoder("small-cnn", 10, 1, 28, width=0.5).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    recipe = Attack(norm="l2", eps=0.75, steps=2)
    for start in range(0, 90 * 64, 64):
        batch, labels = x[start : start + 64], y[start : start + 64]
        loss = nn.functional.cross_entropy(model(perturb(model, batch, labels, recipe)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Subject(model.eval(), x[-N:], y[-N:], {"linf": 0.04, "l2": 0.75})


@pytest.fixture(params=["theirs", "ours"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.getfixturevalue(request.param)


def standing(subject: Subject, images: Tensor) -> int:
    with torch.no_grad():
        return int((subject.model(images).argmax(1) == subject.y).sum())


def agree(subject: Subject, mine: Tensor, published: Tensor) -> None:
    """Both leave some images standing, and each share lies in the other's 95 % interval."""
    a, b = standing(subject, mine), standing(subject, published)
    assert 0 < b < standing(subject, subject.x), "no test of strength at this radius"
    for one, other in ((a, b), (b, a)):
        low, high = wilson(other, N)
        assert low <= one / N <= high, f"ours leaves {a}, theirs {b} of {N}"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["apgd-ce", "apgd-t"])
def test_apgd_beside_pyautoattack(subject, kind, norm):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    eps, name, steps = subject.eps[norm], {"linf": "Linf", "l2": "L2"}[norm], STEPS
    model, x, y = subject.model, subject.x, subject.y
    if kind == "apgd-ce":
        peer = base.APGDAttack(model, steps, name, 1, eps, 0, "ce", device=x.device)
    else:
        peer = base.APGDAttack_targeted(model, steps, name, 1, eps, 0, n_target_classes=3, device=x.device)
    loss = {"apgd-ce": "ce", "apgd-t": "dlr-targeted"}[kind]
    mine = apgd(model, x, y, Threat(norm, eps), steps, loss, targets=3, generator=torch.Generator().manual_seed(0))
    agree(subject, mine, peer.perturb(x, y))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_beside_the_adversarial_robustness_toolbox(subject, norm):
    art = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    eps, steps = subject.eps[norm], STEPS
    step = 2.5 * eps / steps
    model, x, y = subject.model, subject.x, subject.y
    wrapped = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    peer = art.ProjectedGradientDescent(
        wrapped,
        norm={"linf": np.inf, "l2": 2}[norm],
        eps=eps,
        eps_step=step,
        max_iter=steps,
        batch_size=N,
        verbose=False,
    )
    published = torch.from_numpy(peer.generate(x.numpy(), y.numpy()))
    agree(subject, pgd(model, x, y, Threat(norm, eps), steps, step), published)
