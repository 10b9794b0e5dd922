"""Memory before compute: the peak of a step, found by running that step on tensors that have shapes but no data.

The trainers themselves run, forward, backward and update, so what is held at once is theirs to say: number formats,
copies, micro-batches, temporaries. What a kernel allocates inside (cuDNN's workspace, oneDNN's reorders) is not seen.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from arae.attacks.gradient import perturb
from arae.config import Attack, Recipe
from arae.cost import Networks
from arae.evaluate.inversion import invert
from arae.precision import resolve_precision
from arae.train.decoder import DecoderTrainer
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine, Network
from arae.train.micro import Micro

NETWORKS = ("encoder", "decoder", "discriminator", "comparator")
SOME = 3
"""Micro-batches of a step that are really gone through: the last is as all further ones would be."""
FEW = 2
"""Steps of an attack that show what all of them hold: each lets go of what the one before held."""


class _Bare(FakeTensorMode):
    """Tensors without data, of one kind in all copies of a network."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bare:
        return self


class _Held(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_iter(made):
            if isinstance(one, Tensor):
                self.count(one)
        return made

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, for as long as it lives."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


class _BareEngine(Engine):
    """The engine of one worker, for networks without data."""

    def __init__(self, device: torch.device, precision: str) -> None:
        # Scaling a loss looks at numbers. bf16 takes as much.
        found = resolve_precision(precision, device)
        super().__init__(device, "bf16" if found == "fp16" else found, alone=True)

    def place(self, module: Network) -> Network:
        """As ever; but PyTorch's own way to move a module can't be used on tensors without data."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            dtype = self.images_dtype if tensor.is_floating_point() else tensor.dtype
            form = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
            made = tensor.detach().to(self.device, dtype, memory_format=form)
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

        for part in module.modules():
            own: dict[str, Any]
            for own in (part._parameters, part._buffers):
                for name, tensor in own.items():
                    if tensor is not None:
                        own[name] = moved.setdefault(id(tensor), move(tensor))
        return module


def footprint(networks: Networks, stage: str, device: torch.device, workers: int = 1) -> dict[str, int]:
    """Bytes that one of `workers` workers holds at the peak of a training step on `device`, by what they are.

    stage: `encoder` or `decoder`, of the recipe that the networks follow. `activations` is what comes on top of all
    that stays from step to step; it and the gradients are gone in between. Resident images, PyTorch itself and what
    its allocator sets aside come on top; DeepSpeed's shares of the states are not counted as shares.
    """
    part = networks.recipe.encoder if stage == "encoder" else networks.recipe.decoder
    assert part is not None
    share = max(1, part.batch // part.micro // workers)
    found = _of_step(networks, stage, device, min(share, SOME))
    if share > SOME:  # each micro-batch more is held as the one before it: its images, and its codes
        one_less = _of_step(networks, stage, device, SOME - 1)
        found["activations"] += (share - SOME) * (found["activations"] - one_less["activations"])
    return found


def _of_step(networks: Networks, stage: str, device: torch.device, micros: int) -> dict[str, int]:
    """`footprint` of a worker with so many micro-batches a step."""
    recipe = _few_steps(networks.recipe)
    part = recipe.encoder if stage == "encoder" else recipe.decoder
    assert part is not None
    with _without_data(networks, ("encoder",) if stage == "encoder" else NETWORKS) as (held, bare):
        engine = _BareEngine(device, recipe.precision)
        trainer = _trainer(stage, recipe, bare, engine)
        for step, count in enumerate((1, micros)):  # the first makes the optimiser's states
            trainer.step(step, [_micro(networks, engine, part.micro, i, count) for i in range(count)])
        learners = [trainer.learner]
        if isinstance(trainer, DecoderTrainer) and trainer.discriminator is not None:
            learners.append(trainer.critic)
        trained = [weight for one in learners for weight in one.module.parameters()]
        frozen = [bare.encoder, *([bare.comparator] if bare.comparator else [])] if stage == "decoder" else []
        states = [one.state()["optimizer"]["state"] for one in learners]
        attacked = getattr(trainer, "quick", None)
        found = {
            "weights": _bytes([*trained, *(weight for one in frozen for weight in one.parameters())]),
            "gradients": _bytes(trained),
            "optimiser": _bytes(tree_iter(states)),
            "average": _bytes(trainer.average.shadow.values()),
            "copy to attack": _bytes(attacked.parameters()) if attacked is not None else 0,
        }
        return {k: v for k, v in found.items() if v} | {"activations": max(0, held.most - sum(found.values()))}


def evaluation_footprint(networks: Networks, device: torch.device) -> dict[str, int]:
    """The same for evaluation, in batches of the recipe's size: a gradient attack or a descent, then a reconstruction,
    as far as the recipe's protocol has them."""
    settings, protocol = networks.recipe.evaluate, networks.recipe.evaluate.protocol
    attack = next((one for one in settings.attacks if one.eps and protocol in ("map", "robustness")), None)
    with _without_data(networks, ("encoder", "decoder")) as (held, bare):
        engine = _BareEngine(device, "fp32")
        encoder = engine.place(bare.encoder).eval().requires_grad_(False)
        micro = _micro(networks, engine, settings.batch, 0, 1)
        images = micro.images
        if attack is not None:
            images = perturb(encoder, images, micro.labels, Attack(norm=attack.norm, eps=attack.eps, steps=FEW))
        weights = list(encoder.parameters())
        with torch.no_grad():
            features = encoder.features(images, networks.layer)
        if protocol == "inversion":
            invert(lambda x: encoder.features(x, networks.layer), features, images, FEW, 1.0)
        elif bare.decoder is not None and protocol != "robustness":
            decoder = engine.place(bare.decoder).eval().requires_grad_(False)
            weights += decoder.parameters()
            with torch.no_grad():
                decoder(features)
        size = _bytes(weights)
        return {"weights": size, "activations": held.most - size}


def largest_fitting(
    networks: Networks, stage: str, device: torch.device, there: int, workers: int = 1, *, below: int | None = None
) -> int | None:
    """The largest micro-batch, of those that divide the recipe's batch, whose step takes at most `there` bytes.

    below: smaller than this one. None where not even one image fits.
    """
    part = networks.recipe.encoder if stage == "encoder" else networks.recipe.decoder
    assert part is not None
    sizes = [m for m in range(1, below or part.batch + 1) if part.batch % m == 0]

    def fits(size: int) -> bool:
        smaller = networks.following(networks.recipe.replace({f"{stage}.micro_batch": size}))
        return sum(footprint(smaller, stage, device, workers).values()) <= there

    low, high = 0, len(sizes)  # all below `low` fit, none from `high` on
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None


def one_step(networks: Networks, stage: str) -> None:
    """What `footprint` predicts, on a CPU and with data: the networks are trained for two steps, the second counts."""
    recipe = _few_steps(networks.recipe)
    part = recipe.encoder if stage == "encoder" else recipe.decoder
    assert part is not None
    engine = Engine(torch.device("cpu"), recipe.precision)
    trainer = _trainer(stage, recipe, networks, engine)
    count = part.batch // part.micro
    for step in (0, 1):
        trainer.step(step, [_micro(networks, engine, part.micro, i, count) for i in range(count)])


def without_unused(networks: Networks, stage: str) -> Networks:
    """The same without the networks that a stage has nothing to do with."""
    bare = copy.copy(networks)
    if stage == "encoder":
        bare.decoder = bare.discriminator = bare.comparator = None
    return bare


def _few_steps(recipe: Recipe) -> Recipe:
    """The recipe with an attack that holds as much and is over sooner, at whole images and without data's say."""
    changes: dict[str, Any] = {"encoder.phases": [], "encoder.early_stop": None, "encoder.radius_warmup": 0.0}
    if recipe.encoder.attack.eps:
        changes |= {"encoder.attack.steps": min(recipe.encoder.attack.steps, FEW), "encoder.attack.restarts": 1}
    return recipe.replace(changes)


def _trainer(stage: str, recipe: Recipe, bare: Networks, engine: Engine) -> EncoderTrainer | DecoderTrainer:
    if stage == "encoder":
        return EncoderTrainer(recipe, bare.encoder, engine, total=FEW)
    assert bare.decoding is not None
    assert bare.decoder is not None
    losses = bare.decoding.weights
    return DecoderTrainer(
        recipe,
        bare.encoder,
        bare.decoder,
        bare.discriminator,
        engine,
        total=FEW,
        weights=losses,
        comparator=bare.comparator,
    )


def _micro(networks: Networks, engine: Engine, size: int, index: int, of: int) -> Micro:
    images = torch.full((size, *networks.shape), 0.5, device=engine.device, dtype=engine.images_dtype)
    labels = torch.zeros(size, dtype=torch.int64, device=engine.device)
    return Micro(images.contiguous(memory_format=torch.channels_last), labels, index, of)


@contextmanager
def _without_data(networks: Networks, names: Iterable[str]) -> Iterator[tuple[_Held, Networks]]:
    """Within it tensors have no data, and are counted; the networks of these names as such, in copies."""
    bare, mode = copy.copy(networks), _Bare()
    with FakeCopyMode(mode):
        bare.__dict__.update({name: copy.deepcopy(getattr(networks, name)) for name in names})
    with warnings.catch_warnings(), mode, torch.random.fork_rng(devices=[]), _Held() as held:
        warnings.filterwarnings("ignore", message="Accessing the data pointer", category=UserWarning)  # by deepcopy
        for name in names:
            module = getattr(bare, name)
            for tensor in (*module.parameters(), *module.buffers()) if module is not None else ():
                held.count(tensor)
        yield held, bare


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(one.untyped_storage().nbytes() for one in tensors if isinstance(one, Tensor))
