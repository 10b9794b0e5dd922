"""AutoAttack's standard suite (Croce & Hein 2020), run through `pyautoattack`, with a state that survives a kill.

The suite is cut into units: one attack on one batch of the samples that all attacks before it left standing. A unit's
random numbers are addressed by (seed, attack, batch), and its outcome is written, whole or not at all, before the next
begins. Going on after a kill reads what there is and computes the rest, and ends where an unbroken run would have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from arae.attacks.apgd import apgd
from arae.attacks.gradient import Model, check_images, evaluation_mode
from arae.attacks.ledger import Ledger, Unit, describe
from arae.attacks.sanity import NO_GRADIENT, checks, square_remark
from arae.attacks.threat import Threat
from arae.errors import InputError
from arae.seeds import mix

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
STEPS = 100  # of APGD and FAB
QUERIES = 5000  # of Square
TARGETS = 9
ROUNDING = 1e-4  # of the radius: how far beyond the ball float32 may put a point of its surface


Units = Callable[[str, Sequence[tuple[int, Tensor]]], Iterator[tuple[int, Unit]]]
"""(attack, [(number of the batch, its rows [n]), ...]) -> (place in that list, the unit's outcome), in any order."""


@dataclass(frozen=True)
class Outcome:
    """What the suite left of N samples."""

    robust: Tensor
    """bool [N]: classified correctly under every attack."""
    adversarial: Tensor
    """[N, C, H, W] float32 in [0, 1], on the CPU: of a broken sample the image that broke it, else the image itself."""
    broken_by: dict[str, int]
    """Attack -> samples it broke, of those that the attacks before it left."""
    flags: tuple[str, ...]
    """Remarks of `arae.attacks.sanity`, one line each; empty where nothing is suspicious."""
    kept: Path | None = None
    """The job's folder under `state`: of no more use once the outcome is safe elsewhere."""


def _silent(attack: str, done: int, total: int) -> None:
    pass


def _unheard(line: str) -> None:
    pass


def autoattack(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    batch: int,
    seed: int,
    state: Path | None = None,
    progress: Callable[[str, int, int], None] = _silent,
    log: Callable[[str], None] = _unheard,
    attacks: Sequence[str] = STANDARD,
    units: Units | None = None,
) -> Outcome:
    """The worst case of each sample over the attacks of the suite, each run only on the samples still standing.

    model: images [N, C, H, W] in [0, 1] -> logits [N, K], K >= 2. x: float in [0, 1], or uint8 levels; moved to the
    model's device by the batch. y: class indices [N]. With fewer than ten classes, all K - 1 wrong ones are targets;
    with fewer than four, arae's own APGD stands in for the targeted DLR attack (see `arae.attacks.apgd`).

    state: a folder for finished units; the same call goes on from it, bit for bit (on a CPU). A folder inside it
    belongs to one job: the same weights, images, labels, threat, seed, batch, attacks and versions; others' are left
    alone. progress: called with (attack, batches done, batches) after each batch. log: told in a line what was found.
    units: computes units elsewhere, several at a time (each is `suite_unit`'s); default: here, one after the other.

    Torch's global random state, gradients and modes of the model are as before. Raises InputError where `pyautoattack`
    is missing; ValueError for images not in [0, 1], unknown attacks, or a state for a model that is no `nn.Module`.
    """
    unknown = [name for name in attacks if name not in STANDARD]
    if unknown or batch < 1 or len(set(attacks)) != len(attacks):
        raise ValueError(
            f"attacks {list(attacks)} in batches of {batch}: name each of {', '.join(STANDARD)} once at most"
        )
    if find_spec("pyautoattack") is None:
        raise InputError("AutoAttack needs the package pyautoattack: pip install 'arae[eval]'")
    if len(y) != len(x):
        raise ValueError(f"{len(x)} images need as many class indices, not {len(y)}")
    suite = _Suite(model, x, y, threat, batch, seed)
    ledger = Ledger(None)
    if state is not None:
        budget = {"batch": batch, "seed": seed, "attacks": list(attacks), "steps": STEPS, "queries": QUERIES}
        ledger = Ledger.open(state, describe(model, x, y, threat, budget), log)
    return suite.run(attacks, ledger, progress, units or suite.here)


def suite_unit(model: Model, x: Tensor, y: Tensor, threat: Threat, seed: int, name: str, index: int) -> Unit:
    """Which of a batch of samples an attack of the suite breaks, bool [N], and the images [broken, ...] that do it.

    Arguments as in `autoattack`; `index`: the batch's number among those of this attack. Wants nothing of the others.
    """
    suite = _Suite(model, x, y, threat, len(x), seed)
    with evaluation_mode(model), _frozen(model):
        return suite.unit(name, index, torch.arange(len(x)))


class _Suite:
    """One job: what all its units share."""

    def __init__(self, model: Model, x: Tensor, y: Tensor, threat: Threat, batch: int, seed: int) -> None:
        self.model, self.x, self.y, self.threat, self.batch, self.seed = model, x, y, threat, batch, seed
        parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
        self.device = next((parameter.device for parameter in parameters), x.device)

    def here(self, name: str, wanted: Sequence[tuple[int, Tensor]]) -> Iterator[tuple[int, Unit]]:
        """Units of an attack, each when it is asked for."""
        return ((place, self.unit(name, index, rows)) for place, (index, rows) in enumerate(wanted))

    def run(
        self, attacks: Sequence[str], ledger: Ledger, progress: Callable[[str, int, int], None], units: Units
    ) -> Outcome:
        """All units in order."""
        standing = torch.ones(len(self.x), dtype=torch.bool)
        adversarial = _to_float(self.x.cpu())
        broken_by: dict[str, int] = {}
        with evaluation_mode(self.model), _frozen(self.model):
            flags = checks(self.model, *self.samples(torch.arange(min(len(self.x), self.batch))), self.threat)
            if NO_GRADIENT in flags and set(attacks) - {"square"}:
                raise InputError(f"AutoAttack: {NO_GRADIENT}; name it alone in `attacks`")
            for name in ("clean", *attacks):
                broken_by[name] = 0
                void = not standing.any() or (self.threat.eps == 0 and name != "clean")
                batches = () if void else torch.nonzero(standing).squeeze(1).split(self.batch)
                for done, (i, (broken, images)) in enumerate(self._found(name, batches, ledger, units), start=1):
                    rows = batches[i]
                    adversarial[rows[broken]] = images
                    standing[rows[broken]] = False
                    broken_by[name] += int(broken.sum())
                    progress(name, done, len(batches))
        del broken_by["clean"]
        flags += square_remark(broken_by, len(self.x))
        return Outcome(standing.to(self.x.device), adversarial, broken_by, tuple(flags), ledger.folder)

    @staticmethod
    def _found(name: str, batches: Sequence[Tensor], ledger: Ledger, units: Units) -> Iterator[tuple[int, Unit]]:
        """The outcome of every unit of an attack with its number: those that are there, then the others as they come,
        each kept before it is told of."""
        wanted = []
        for i, rows in enumerate(batches):
            unit = ledger.read(name, i)
            if unit is None:
                wanted.append((i, rows))
            else:
                yield i, unit
        for place, unit in units(name, wanted):
            i = wanted[place][0]
            yield i, ledger.keep(name, i, unit)

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of these rows, on the model's device."""
        images = _to_float(self.x[rows.to(self.x.device)].to(self.device))
        return images.contiguous(), self.y[rows.to(self.y.device)].to(self.device)

    def unit(self, name: str, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these samples an attack breaks, bool [rows], and the images that do it [broken, C, H, W]."""
        x, y = self.samples(rows)
        check_images(x, y)
        found = x
        if name != "clean":
            seed = mix(self.seed, "autoattack", name, index)
            with _own_randomness(self.device):
                found = self.attacked(name, x, y, seed).detach().clamp(0, 1)
        with torch.no_grad():
            wrong = self.model(found).argmax(1) != y
        # The verdict is ours, not the package's: wrong, and inside the ball.
        broken = wrong & (self.threat.length(found - x) <= self.threat.eps * (1 + ROUNDING))
        return broken.cpu(), found[broken].cpu()

    def attacked(self, name: str, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """Images [n, C, H, W] of one attack of the suite, with the published settings."""
        with torch.no_grad():
            classes = self.model(x[:1]).shape[1]
        if name == "apgd-t" and classes < 4:
            generator = torch.Generator(self.device).manual_seed(seed)
            return apgd(self.model, x, y, self.threat, STEPS, "dlr-targeted", targets=TARGETS, generator=generator)
        return _published(name, self.logits, self.threat, seed, self.device, min(TARGETS, classes - 1))(x, y)

    def logits(self, images: Tensor) -> Tensor:
        """What the package attacks: float32, and a copy, for Square writes into it."""
        return self.model(images).to(images.dtype).clone()


def _published(
    name: str, logits: Model, threat: Threat, seed: int, device: torch.device, targets: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """An attack of `pyautoattack`, as its version `standard` sets it up."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    norm: Literal["Linf", "L2"] = "Linf" if threat.norm == "linf" else "L2"
    eps = threat.eps
    if name == "square":
        square = SquareAttack(
            logits, norm=norm, n_queries=QUERIES, eps=eps, seed=seed, resc_schedule=False, device=device
        )
        return square.perturb
    if name == "fab-t":
        fab = FABAttack_PT(
            logits, norm, 1, STEPS, eps, seed=seed, targeted=True, device=device, n_target_classes=targets
        )
        return fab.perturb
    # A logger of no hierarchy whose one handler is mute: what its checks would warn of, `sanity` says.
    logger = logging.Logger("autoattack")
    logger.addHandler(logging.NullHandler())
    if name == "apgd-ce":
        return APGDAttack(logits, STEPS, norm, 1, eps, seed, "ce", device=device, logger=logger).perturb
    targeted = APGDAttack_targeted(
        logits, STEPS, norm, 1, eps, seed, n_target_classes=targets, device=device, logger=logger
    )
    return targeted.perturb


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No parameter takes gradients: FAB's backward pass would leave its own in them."""
    taking = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Torch's global generators put back afterwards: the package seeds them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _to_float(images: Tensor) -> Tensor:
    """A copy of images or 8-bit levels as float32 in [0, 1]."""
    found = images.to(torch.float32, copy=True)
    return found.div_(255) if images.dtype == torch.uint8 else found
