"""Robust accuracy for less: the cascade of two attacks against the whole of AutoAttack.

Two networks are really trained (small-cnn on Fashion-MNIST's 60,000 training images, PGD-7, l2 1.5 and l-inf 0.1, 1,060
steps), and each is judged on the same 1,000 test images by `kind: cascade` (APGD-CE, then targeted APGD on who is left,
100 steps each) and by AutoAttack's standard suite (APGD-CE, targeted APGD, FAB, Square) as `pyautoattack` has it.
Measured: images that pass through the network, n = 1 (both are deterministic), and CPU seconds of one thread. Every
sample on which the two disagree is listed.

`python -m benchmarks.evaluate` takes some 30 minutes and writes `results/evaluate/fashion-mnist.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arae import metrics
from arae.attacks import Threat, attack, autoattack
from arae.config import Attack, Part, Recipe
from arae.data.augment import to_float
from arae.data.encode import EncodeOptions, encode
from arae.data.load import open_source
from arae.evaluate.measure import evenly
from arae.files import write_text
from arae.models.autoencoder import load_autoencoder
from arae.runs import RunFolder
from arae.train.run import train
from benchmarks.harness import RESULTS, Made, here

OUT = RESULTS / "evaluate" / "fashion-mnist.json"
IMAGES, BATCH, SEED = 1000, 250, 0
ATTACKS = {"l2": Attack(norm="l2", eps=1.5, steps=7), "linf": Attack(norm="linf", eps=0.1, steps=7)}
CPU = torch.device("cpu")


class Verdict(Part):
    """What one evaluation found."""

    robust: int
    """Images classified correctly under it."""
    evaluations: int
    """Images that passed through the network."""
    seconds: float
    """CPU seconds."""


class Judged(Part):
    """One network."""

    network: str
    clean: int
    cascade: Verdict
    autoattack: Verdict
    broken_by: dict[str, int]
    """What AutoAttack's attacks broke, each of those that the ones before it left."""
    only_cascade: tuple[int, ...]
    """Test images that the cascade breaks and AutoAttack does not."""
    only_autoattack: tuple[int, ...]

    def line(self) -> str:
        """The result in words."""
        less = self.cascade.evaluations / self.autoattack.evaluations
        low, high = metrics.wilson(self.autoattack.robust, IMAGES)
        return (
            f"{self.network}: cascade {self.cascade.robust / IMAGES:.1%}, AutoAttack "
            f"{self.autoattack.robust / IMAGES:.1%} (95 %: {low:.1%} – {high:.1%}), for {less:.3f} of its evaluations "
            f"({self.cascade.evaluations / IMAGES:.0f} and {self.autoattack.evaluations / IMAGES:.0f} an image) and "
            f"{self.cascade.seconds / self.autoattack.seconds:.3f} of its CPU seconds; broken by the cascade alone: "
            f"{list(self.only_cascade)}, by AutoAttack alone: {list(self.only_autoattack)}"
        )


class Record(Made):
    """What `results/evaluate/fashion-mnist.json` holds."""

    about: str
    networks: tuple[Judged, ...] = ()


class Counting(nn.Module):
    """A network that counts what passes through it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.count = network, 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] of images [N, C, H, W]."""
        self.count += len(images)
        return self.network(images)


def trained(against: Attack, place: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained against an attack; test images [1000, 1, 28, 28] in [0, 1], evenly spread, and labels."""
    paths = {split: str(place / f"{split}.beton") for split in ("train", "test")}
    if not Path(paths["test"]).exists():
        encode("fashion-mnist", Path(paths["train"]), EncodeOptions(split="train"))
        encode("fashion-mnist", Path(paths["test"]), EncodeOptions(split="test"))
    document: dict[str, Any] = {
        "name": f"judged-{against.norm}",
        "data": {"name": "fashion-mnist", **paths},
        "encoder": {
            "name": "small-cnn",
            "attack": against.model_dump(exclude_defaults=True),
            "steps": 1060,
            "batch": 128,
            "lr": 0.05,
            "weight_decay": 5e-4,
            "schedule": {"kind": "linear", "warmup": 0.1},
        },
    }
    recipe = Recipe.model_validate(document)
    folder = RunFolder(place / recipe.name)
    folder.create(recipe)
    train(recipe, folder, CPU)
    source = open_source(recipe.data, "test", CPU)
    where = evenly(source.n, IMAGES)
    images = to_float(next(iter(source.batches(where[None]))))
    return load_autoencoder(folder.path).encoder.eval(), images, source.labels[torch.from_numpy(where)]


def judged(name: str, against: Attack, place: Path) -> Judged:
    """Train a network and evaluate it both ways."""
    network, x, y = trained(against, place)
    assert against.norm is not None
    threat = Threat(against.norm, against.eps)
    clean = correct(network, x, y)
    kind = Attack(kind="cascade", norm=against.norm, eps=against.eps)

    def by_cascade(model: nn.Module) -> Tensor:
        made = []
        for i, (images, labels) in enumerate(zip(x.split(BATCH), y.split(BATCH), strict=True)):
            made.append(attack(model, images, labels, kind, torch.Generator().manual_seed(SEED + i)))
        return correct(network, torch.cat(made), y)

    broken_by: dict[str, int] = {}

    def by_autoattack(model: nn.Module) -> Tensor:
        outcome = autoattack(model, x, y, threat, batch=BATCH, seed=SEED, progress=tell)
        broken_by.update(outcome.broken_by)
        return outcome.robust

    (one, cascade), (two, whole) = (evaluated(work, network) for work in (by_cascade, by_autoattack))
    where = evenly(10_000, IMAGES)
    return Judged(
        network=f"small-cnn, {name} {against.eps:g}",
        clean=int(clean.sum()),
        cascade=cascade,
        autoattack=whole,
        broken_by=broken_by,
        only_cascade=tuple(where[(~one & two).numpy()].tolist()),
        only_autoattack=tuple(where[(one & ~two).numpy()].tolist()),
    )


def evaluated(work: Callable[[nn.Module], Tensor], network: nn.Module) -> tuple[Tensor, Verdict]:
    """Which samples stand, bool [N], and what that took."""
    counting, begun = Counting(network).eval(), time.process_time()
    standing = work(counting)
    seconds = time.process_time() - begun
    return standing, Verdict(robust=int(standing.sum()), evaluations=counting.count, seconds=round(seconds, 1))


@torch.no_grad()
def correct(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether each image is classified correctly, bool [N]."""
    return torch.cat([network(part).argmax(1) for part in x.split(BATCH)]) == y


def tell(name: str, done: int, total: int) -> None:
    """How far AutoAttack has come."""
    print(f"{name}: {done}/{total}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both networks' results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    # One network after the other takes the place of its older self: what is stopped leaves a whole record.
    old = Record.model_validate_json(given.out.read_text()).networks if given.out.is_file() else ()
    networks = {each.network: each for each in old}
    with tempfile.TemporaryDirectory(prefix="arae-evaluate-") as place:
        for name, against in ATTACKS.items():
            made = judged(name, against, Path(place))
            networks[made.network] = made
            torch.set_num_threads(1)
            record = Record(about=about, networks=tuple(networks.values()), **here(CPU))
            write_text(given.out, record.model_dump_json(indent=1) + "\n")
    print("\n".join(each.line() for each in networks.values()))


if __name__ == "__main__":
    main()
