"""Other people's code that a benchmark is paired with. None of it is part of arae, and what is not there is left out.

`make bench` puts the packages of `peers.txt` into `.peers/`, each without its dependencies, for they would pull in
much that is neither run nor measured here. Beside them it clones the code of the paper's authors, which is no package
and has no licence: it is run here, and no part of arae. A result that was measured beside anything else says so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

PEERS = Path(__file__).resolve().parent.parent / ".peers"
COMMIT = "0ab709d4ed3038f516d562f2adcda6eb8ce88d80"
"""Of the authors' code."""
COPY = "The authors' side is not the clone of their code, but a copy of what its step runs."
MISSING = "its code is not there: `make bench` fetches it"


def robustness() -> ModuleType | None:
    """The reference library of adversarial training (MadryLab/robustness 1.2.1), or None."""
    if not (PEERS / "robustness").is_dir():
        return None
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    # Its logger, and a module of torchvision's that is gone: neither is run in a step of training.
    for name in ("cox", "torchvision.models.utils"):
        sys.modules.setdefault(name, _Nothing(name))
    import robustness  # type: ignore[import-not-found]
    import robustness.attacker  # type: ignore[import-not-found]
    import robustness.cifar_models  # type: ignore[import-not-found]
    import robustness.imagenet_models  # type: ignore[import-not-found]

    return robustness


def reference_step(
    library: Any,
    net: nn.Module,
    statistics: tuple[Sequence[float], Sequence[float]],
    attack: dict[str, Any],
    images: Tensor,
    labels: Tensor,
    autocast: Callable[[], Any],
) -> Callable[[], object]:
    """One step as `robustness.train` makes it: attack, loss, SGD; `net` is of the library's own networks."""
    mean, std = (torch.tensor(values) for values in statistics)
    model = library.attacker.AttackerModel(net, SimpleNamespace(mean=mean, std=std)).to(images.device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    # The library's default keeps the best of the steps, which costs one more look at the images.
    how = {"random_start": False, "use_best": True, **attack}

    def step() -> None:
        with autocast(), staying(images.device):
            logits, _ = model(images, target=labels, make_adv=True, **how)
            loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def authors() -> ModuleType | None:
    """The networks and the loop of the paper's authors (renanrojasg/adv_robust_autoencoder): `alexnet`, `loop`; or
    None."""
    place = PEERS / "adv_robust_autoencoder"
    if not (place / "models" / "alexnet.py").is_file():
        return None
    for path in (PEERS, place):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    # What it imports for its pictures and files: not run in a step of training.
    for name in ("cox", "cox.utils", "piqa", "utils.infer_utils"):
        sys.modules.setdefault(name, _Nothing(name))
    found = ModuleType("authors")
    found.alexnet = import_module("models.alexnet")  # type: ignore[attr-defined]
    found.loop = import_module("utils.train_utils")  # type: ignore[attr-defined]
    found.tools = import_module("utils.core_utils")  # type: ignore[attr-defined]
    found.clone = commit_of(place) == COMMIT  # type: ignore[attr-defined]
    return found


def commit_of(place: Path) -> str:
    """The commit that a folder is the checkout of, with nothing changed in it; or nothing."""
    if not (place / ".git").is_dir():  # git would look for a checkout further up
        return ""
    git = partial(subprocess.run, cwd=place, capture_output=True, text=True, check=False)
    changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
    return "" if changed else git(["git", "rev-parse", "--verify", "-q", "HEAD"]).stdout.strip()


def authors_step(
    theirs: Any, images: Tensor, statistics: tuple[Sequence[float], Sequence[float]], autocast: Callable[[], Any]
) -> Callable[[], object]:
    """One step as `train_generator.py` makes it for AlexNet's conv5: discriminator, then generator, all three losses.

    With the settings of their script: spectral norms, sums over the batch, the comparator beside the encoder, which get
    the images each under a normalisation of its own, so that they are encoded twice.
    """
    device = images.device
    mean, std = (torch.tensor(values) for values in statistics)
    shared = {"output_layer": "conv5", "num_classes": 1000, "mean": mean, "std": std}
    model = theirs.alexnet.AlexNetEncDec(upsample_mode="conv5_tconv", spectral_init=True, **shared)
    comparator = theirs.alexnet.AlexNetComp(**shared)
    discriminator = theirs.alexnet.AlexNetDisc(disc_bn=False, disc_model="original", spectral_init=True)
    for network in (model.classifier, comparator.classifier):  # as their `…_config` leaves them
        network.requires_grad_(False)
        for name in ("avgpool", "classifier", "last_layer"):
            setattr(network, name, nn.Sequential())
    for name in ("linear1", "linear2", "linear3"):
        setattr(model.generator, name, nn.Sequential())
    model.normalize = theirs.tools.InputScaling()
    model, comparator, discriminator = (
        nn.DataParallel(one.to(device)) for one in (model, comparator.eval(), discriminator)
    )
    rates = zip((model, discriminator), (3e-4, 1.2e-3), strict=True)
    optimizers = [torch.optim.Adam(one.parameters(), lr=rate, betas=(0.0, 0.9)) for one, rate in rates]
    pixel, feature, adversarial = theirs.loop.set_criteria("l1_loss", "l2_loss", True, "sum")
    loader = [(images, torch.zeros(len(images), dtype=torch.int64))]

    def step() -> None:
        with autocast(), staying(device):
            theirs.loop._model_loop(
                noise_level=0, loop_type="train", loader=loader, model=model, discriminator=discriminator,
                comparator=comparator, denormalize=theirs.tools.InputDescaling().to(device), norm_flag=True,
                g_opt=optimizers[0], d_opt=optimizers[1], epoch=0, disc_labels=(0.0, 1.0), disc_normalize=False,
                pix_c=pixel, feat_c=feature, adv_c=adversarial, pix_loss="l1_loss", feat_loss="l2_loss", adv_loss=True,
                pix_loss_weight=2e-6, feat_loss_weight=0.01, adv_loss_weight=100.0, disc_loss_weight=100.0,
            )  # fmt: skip

    return step


def staying(device: torch.device) -> AbstractContextManager[object]:
    """The library calls `.cuda()` whatever the device is: on a CPU that leaves tensors where they are."""
    if device.type == "cuda":
        return nullcontext()
    return mock.patch.object(Tensor, "cuda", lambda tensor, *_, **__: tensor)


class _Nothing(ModuleType):
    """A module in which every name is None."""

    def __getattr__(self, name: str) -> None:
        return None
