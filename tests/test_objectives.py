"""TRADES, MART and GAIRAT: their losses against NumPy, their attacks against brute force, their steps against torch."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from training import tiny_recipe

from arae.attacks import Threat, pgd
from arae.attacks.gradient import perturb
from arae.config import Attack, Encoder, Recipe
from arae.errors import InputError
from arae.models import create_encoder
from arae.seeds import mix
from arae.train import objectives
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro

CPU = torch.device("cpu")
L2 = Attack(norm="l2", eps=0.2, steps=4)
LINF = Attack(norm="linf", eps=0.02, steps=4)


def logits(n: int = 6, k: int = 4, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of clean and attacked images, and classes."""
    g = torch.Generator().manual_seed(seed)
    clean, attacked = (scale * torch.randn(n, k, generator=g) for _ in range(2))
    return clean, attacked, torch.randint(0, k, (n,), generator=g)


def by_hand(clean: Tensor, attacked: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Each sample's terms, in float64 and straight from the papers' formulas."""
    zp, zq = clean.double().numpy(), attacked.double().numpy()
    p, q, rows, y_ = softmax(zp, 1), softmax(zq, 1), np.arange(len(y)), y.numpy()
    others = q.copy()
    others[rows, y_] = 0
    return {
        "ce_clean": -log_softmax(zp, 1)[rows, y_],
        "ce": -log_softmax(zq, 1)[rows, y_],
        "kl": (p * (log_softmax(zp, 1) - log_softmax(zq, 1))).sum(1),
        "rival": -np.log1p(-others.max(1)),
        "missed": 1 - p[rows, y_],
    }


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("beta", [0.5, 6.0])
def test_the_losses_are_their_papers_formulas(k: int, beta: float) -> None:
    clean, attacked, y = logits(n=8, k=k)
    hand = by_hand(clean, attacked, y)
    trades = (hand["ce_clean"] + beta * hand["kl"]).mean()
    mart = (hand["ce"] + hand["rival"] + beta * hand["kl"] * hand["missed"]).mean()
    assert objectives.trades(clean, attacked, y, beta).item() == pytest.approx(trades, rel=1e-5)
    assert objectives.mart(clean, attacked, y, beta).item() == pytest.approx(mart, rel=1e-5)


def test_numbers_worked_out_on_paper() -> None:
    """Two classes with p = (3/4, 1/4) and q = (1/2, 1/2), class 0."""
    clean, attacked, y = torch.tensor([[np.log(3.0), 0.0]]), torch.zeros(1, 2), torch.tensor([0])
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert objectives.trades(clean, attacked, y, 6).item() == pytest.approx(-np.log(0.75) + 6 * kl, rel=1e-6)
    assert objectives.mart(clean, attacked, y, 5).item() == pytest.approx(2 * np.log(2) + 5 * kl * 0.25, rel=1e-6)


def test_weights_of_gairat() -> None:
    """At K = 10 and lambda = -1 a sample that falls at step 4 weighs (1 + tanh 0) / 2 before the normalisation."""
    held = torch.arange(11)
    plain = (1 + np.tanh(-1 + 5 * (1 - 2 * held.double().numpy() / 10))) / 2
    assert plain[4] == pytest.approx(0.5)
    weights = objectives.geometry_weights(held, 10, -1.0)
    np.testing.assert_allclose(weights.numpy(), plain / plain.mean(), rtol=1e-4)
    assert weights.mean().item() == pytest.approx(1, rel=1e-6)
    assert (weights.diff() < 0).all(), "who withstands more weighs less"
    safe = objectives.geometry_weights(torch.full((5,), 10), 10, -20.0)
    torch.testing.assert_close(safe, torch.ones(5))  # not 0 / 0
    _, attacked, y = logits()
    hand = by_hand(attacked, attacked, y)["ce"]
    given = torch.rand(6)
    assert objectives.gairat(attacked, y, given).item() == pytest.approx((given.numpy() * hand).mean(), rel=1e-5)


def test_limits_of_the_losses() -> None:
    clean, attacked, y = logits()
    torch.testing.assert_close(objectives.trades(clean, attacked, y, 1e-12), F.cross_entropy(clean, y))
    torch.testing.assert_close(objectives.trades(clean, clean, y, 6.0), F.cross_entropy(clean, y))
    torch.testing.assert_close(objectives.mart(clean, clean, y, 6.0), objectives.mart(clean, clean, y, 1e-12))
    torch.testing.assert_close(objectives.gairat(attacked, y, torch.ones(6)), F.cross_entropy(attacked, y))
    assert (objectives.divergence(clean, attacked) > 0).all()


@pytest.mark.parametrize("loss", [objectives.trades, objectives.mart])
def test_extreme_logits_give_numbers(loss) -> None:
    clean = torch.tensor([[80.0, -80, 0], [-90, 90, 0]], requires_grad=True)
    attacked = torch.tensor([[-80.0, 80, 0], [90, -90, 0]], requires_grad=True)
    value = loss(clean, attacked, torch.tensor([0, 0]), 5.0)
    gradients = torch.autograd.grad(value, [clean, attacked])
    assert all(torch.isfinite(found).all() for found in (value, *gradients))
    half = loss(clean.bfloat16(), attacked.bfloat16(), torch.tensor([0, 0]), 5.0)
    assert half.dtype == torch.float32


@pytest.fixture
def model() -> nn.Module:
    """A small classifier with batch norm that has seen images, in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 4))
    for _ in range(40):
        net(torch.rand(64, 3, 8, 8))
    return net.train()


def images(n: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 8, 8, generator=g), torch.randint(0, 4, (n,), generator=g)


@pytest.mark.parametrize("attack", [L2, LINF, L2.model_copy(update={"random_start": True})])
def test_the_attack_of_trades_raises_the_divergence_inside_the_ball(model: nn.Module, attack: Attack) -> None:
    x, _ = images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = objectives.perturb_divergence(model, x, attack, torch.Generator().manual_seed(3))
    again = objectives.perturb_divergence(model, x, attack, torch.Generator().manual_seed(3))
    assert torch.equal(made, again)
    assert not made.requires_grad
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    threat = Threat(attack.norm, attack.eps)  # pyright: ignore[reportArgumentType] -- it has a norm
    assert (threat.length(made - x) <= attack.eps * (1 + 1e-5)).all()
    assert made.amin() >= 0
    assert made.amax() <= 1
    model.eval()
    with torch.no_grad():
        reached = objectives.divergence(model(x), model(made))
        random = objectives.divergence(model(x), model((x + threat.sample(x)).clamp(0, 1)))
        one = objectives.perturb_divergence(
            model, x, attack.model_copy(update={"steps": 1}), torch.Generator().manual_seed(3)
        )
        assert (reached > random).all()
        assert reached.mean() > objectives.divergence(model(x), model(one)).mean() * 0.99


@pytest.mark.parametrize("attack", [L2, LINF, LINF.model_copy(update={"random_start": True})])
def test_the_attack_of_gairat_is_pgd_and_counts_the_steps_withstood(model: nn.Module, attack: Attack) -> None:
    x, y = images(40)
    own = copy.deepcopy(model).eval()(x).argmax(1)
    y = torch.where(torch.arange(40) % 4 == 0, y, own)  # some fall before the first step, some later, some never
    threat = Threat(attack.norm, attack.eps)  # pyright: ignore[reportArgumentType] -- it has a norm

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    made, held = objectives.perturb_counting(model, x, y, attack, generator())
    assert torch.equal(made, perturb(model, x, y, attack, generator()))
    assert model.training
    step = 2.5 * attack.eps / attack.steps
    start = (x + threat.sample(x, generator())).clamp(0, 1) if attack.random_start else x
    path = [start] + [
        pgd(model, x, y, threat, steps=k, step_size=step, random_start=attack.random_start, generator=generator())
        for k in range(1, attack.steps)
    ]
    model.eval()
    wrong = torch.stack([model(point).argmax(1) != y for point in path])
    first = torch.where(wrong.any(0), wrong.long().argmax(0), attack.steps)
    assert torch.equal(held, first)
    assert len(held.unique()) > 2, "the samples must differ for this to say anything"


def recipe_of(path: Path, kind: str, **more: object) -> Recipe:
    return tiny_recipe(
        path,
        encoder__objective={"kind": kind, **more},
        encoder__label_smoothing=0.0,
        encoder__ema=0.0,
        encoder__attack__random_start=False,
        encoder__attack__eps=1.0,
        encoder__schedule={"kind": "constant"},
    )


def micros(count: int, size: int = 8) -> list[Micro]:
    torch.manual_seed(1)
    return [Micro(torch.rand(size, 3, 16, 16), torch.randint(0, 3, (size,)), i, count) for i in range(count)]


def trainer_of(recipe: Recipe, name: str = "small-cnn") -> EncoderTrainer:
    torch.manual_seed(0)
    return EncoderTrainer(recipe, create_encoder(name, 3, 3, 16, width=0.5), Engine(CPU, "fp32"), total=4)


def plain_loss(kind: str, model: nn.Module, micro: Micro, recipe: Recipe, step: int) -> Tensor:
    """The objective on one micro-batch, as one would write it first."""
    x, y, attack = micro.images, micro.labels, recipe.encoder.attack
    seed = torch.Generator().manual_seed(mix(recipe.seed, "encoder", step, micro.index))
    if kind == "trades":
        attacked = objectives.perturb_divergence(model, x, attack, seed)
        return F.cross_entropy(model(x), y) + 6 * objectives.divergence(model(x), model(attacked)).mean()
    attacked = perturb(model, x, y, attack)
    if kind == "mart":
        return objectives.mart(model(x), model(attacked), y, 5.0)
    held = objectives.perturb_counting(model, x, y, attack, None)[1]
    weights = objectives.geometry_weights(held, attack.steps, -1.0)
    return (weights * F.cross_entropy(model(attacked), y, reduction="none")).mean()


@pytest.mark.parametrize("kind", ["trades", "mart", "gairat"])
def test_a_step_descends_the_objective(tiny_npz: Path, kind: str) -> None:
    """One step past GAIRAT's burn-in; not several, for TRADES's attack makes much of the last bit of the weights."""
    recipe, step = recipe_of(tiny_npz, kind), 3
    trainer = trainer_of(recipe)
    plain = copy.deepcopy(trainer.model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, weight_decay=1e-4)
    trainer.step(step, micros(2))
    losses = [plain_loss(kind, plain, micro, recipe, step) for micro in micros(2)]
    torch.stack(losses).mean().backward()
    optimizer.step()
    for ours, theirs in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["trades", "mart", "gairat"])
def test_radius_zero_is_standard_training_under_every_objective(tiny_npz: Path, kind: str) -> None:
    made = []
    for objective in ("at", kind):
        trainer = trainer_of(recipe_of(tiny_npz, objective).replace({"encoder.attack.eps": 0.0}))
        trainer.step(3, micros(2))
        made.append(trainer.exported())
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


@pytest.mark.parametrize("kind", ["at", "trades", "mart", "gairat"])
@pytest.mark.parametrize("step_size", [None, 0.4])
@pytest.mark.parametrize(("step", "share"), [(0, 1 / 3), (1, 2 / 3), (2, 1.0), (3, 1.0)])
def test_while_the_radius_warms_up_a_step_is_that_of_a_smaller_one(
    tiny_npz: Path, kind: str, step: int, share: float, step_size: float | None
) -> None:
    """Over 0.75 of the four steps, that is, three of them."""

    def after(**changes: object) -> dict[str, Tensor]:
        recipe = recipe_of(tiny_npz, kind).replace({"encoder.attack.step_size": step_size})
        trainer = trainer_of(recipe.replace({f"encoder.{key}": value for key, value in changes.items()}))
        trainer.step(step, micros(1))
        return trainer.exported()

    size = None if step_size is None else step_size * share
    smaller = after(attack={"norm": "l2", "eps": share, "steps": 2, "step_size": size})
    warming = after(radius_warmup=0.75, attack={"norm": "l2", "eps": 1.0, "steps": 2, "step_size": step_size})
    for key, value in smaller.items():
        torch.testing.assert_close(warming[key], value, msg=key)


def test_before_its_burn_in_gairat_is_plain_adversarial_training(tiny_npz: Path) -> None:
    def after(step: int, kind: str) -> dict[str, Tensor]:
        trainer = trainer_of(recipe_of(tiny_npz, kind))
        trainer.step(step, micros(1))
        return trainer.exported()

    for step, same in ((1, True), (2, False)):
        plain, ours = after(step, "at"), after(step, "gairat")
        assert all(torch.equal(plain[key], ours[key]) for key in plain) is same


def test_running_statistics_take_up_both_views_once_a_step(tiny_npz: Path) -> None:
    """Two forward passes a micro-batch: the buffers stay the mean over micro-batches, each from the step's start."""
    recipe = recipe_of(tiny_npz, "mart")

    def after(some: list[Micro]) -> dict[str, Tensor]:
        trainer = trainer_of(recipe, "resnet18-cifar")
        trainer.model.requires_grad_(True)
        trainer.step(0, some)
        return {k: v.double() for k, v in trainer.model.state_dict().items() if "running" in k or "tracked" in k}

    batch = micros(2)
    together, alone = after(batch), [after([replace(micro, of=1)]) for micro in batch]
    for key, value in together.items():
        torch.testing.assert_close(value, torch.stack([one[key] for one in alone]).mean(0), atol=1e-6, rtol=1e-5)
    trainer = trainer_of(recipe, "resnet18-cifar")
    plain, micro = trainer.model.train(), batch[0]
    attacked = perturb(plain, micro.images, micro.labels, recipe.encoder.attack)
    plain(micro.images)
    plain(attacked)
    torch.testing.assert_close(plain.state_dict()["net.bn1.running_mean"].double(), alone[0]["net.bn1.running_mean"])


REFUSED = [
    ({"kind": "trades"}, {"restarts": 3}, r"encoder\.attack\.restarts = 3.*trades"),
    ({"kind": "gairat"}, {"restarts": 2}, r"encoder\.attack\.restarts = 2.*gairat"),
    ({"kind": "at", "beta": 6}, {}, r"encoder\.objective\.beta = 6 .*not at"),
    ({"kind": "gairat", "beta": 6}, {}, r"encoder\.objective\.beta = 6 .*not gairat"),
]


@pytest.mark.parametrize(("objective", "attack", "says"), REFUSED)
def test_what_an_objective_does_not_do_is_refused(objective: dict, attack: dict, says: str) -> None:
    part = Encoder.model_validate(
        {"name": "small-cnn", "steps": 1, "objective": objective, "attack": {"norm": "l2", "eps": 1, **attack}}
    )
    with pytest.raises(InputError, match=says):
        objectives.check_objective(part)


def test_every_other_combination_is_allowed() -> None:
    for kind in ("at", "trades", "mart", "gairat"):
        objectives.check_objective(Encoder.model_validate({"name": "x", "steps": 1, "objective": {"kind": kind}}))
