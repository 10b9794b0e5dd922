"""PGD: against a step-by-step reference, and what must hold of any attack."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arae.attacks import Threat, evaluating, fgsm, perturb, pgd
from arae.config import Attack
from arae.errors import NotFinite

SHAPE = (3, 6, 6)
CLASSES = 4


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # the arrays are small: threads would only wait for one another


class Tanh(nn.Module):
    """logits = V tanh(W x + b): small, nowhere linear, and its gradient can be written down."""

    def __init__(self, seed: int = 0, shape: tuple[int, ...] = SHAPE, classes: int = CLASSES) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(16, int(np.prod(shape)), generator=g) / 5)
        self.b = nn.Parameter(torch.randn(16, generator=g))
        self.v = nn.Parameter(torch.randn(classes, 16, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.w.T + self.b) @ self.v.T


class Fragile(nn.Module):
    """Dropout and batch norm: its output depends on its mode, and its batch norm on what ran in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.head = Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x)))


class Void(nn.Module):
    """Sound logits that favour one class, and a gradient that is NaN everywhere: the root of zero."""

    def __init__(self, favourite: int) -> None:
        super().__init__()
        self.inner, self.favourite = Tanh(), favourite

    def forward(self, x: Tensor) -> Tensor:
        bonus = torch.zeros(CLASSES).index_fill(0, torch.tensor(self.favourite), 100)
        return self.inner(x) + bonus + (0 * x).sqrt().sum((1, 2, 3))[:, None]


class Faulty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no logits today")


def images(n: int = 8, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, *shape, generator=g) * 1.4 - 0.2).clamp(0, 1)  # some values at the ends of the range
    return x, torch.randint(0, CLASSES, (n,), generator=g)


def reference(
    model: Tanh, x: np.ndarray, label: int, norm: str, eps: float, steps: int, size: float, start: np.ndarray
):
    """PGD on one image, in NumPy and float64, with the gradient by hand."""
    w, b, v = (p.detach().numpy().astype(np.float64) for p in (model.w, model.b, model.v))
    x = x.astype(np.float64).ravel()
    now = start.astype(np.float64).ravel()
    for _ in range(steps):
        hidden = np.tanh(w @ now + b)
        logits = v @ hidden
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        gradient = ((probabilities - np.eye(CLASSES)[label]) @ v * (1 - hidden**2)) @ w
        if norm == "linf":
            now = np.clip(now + size * np.sign(gradient), x - eps, x + eps)
        else:
            moved = now + size * gradient / np.linalg.norm(gradient) - x
            length = np.linalg.norm(moved)
            now = x + (moved if length <= eps else moved * (eps / length))
        now = np.minimum(np.maximum(now, 0), 1)
    return now


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("size", [None, 0.05])
@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("l2", 3.0), ("linf", "8/255"), ("linf", 0.3)])
def test_equals_a_reference_step_by_step(norm, eps, steps, size, random_start):
    model, (x, y), threat = Tanh(), images(), Threat(norm, eps)
    found = pgd(model, x, y, threat, steps, size, random_start, generator=torch.Generator().manual_seed(5))
    noise = threat.sample(x, torch.Generator().manual_seed(5)) if random_start else torch.zeros_like(x)
    start = (x + noise).clamp(0, 1).numpy()
    size = 2.5 * threat.eps / steps if size is None else size
    expected = [
        reference(model, x[i].numpy(), int(y[i]), norm, threat.eps, steps, size, start[i]) for i in range(len(x))
    ]
    np.testing.assert_allclose(found.flatten(1).numpy(), np.stack(expected), rtol=0, atol=1e-5)
    assert (found - x).abs().max() > 0.01


BALLS = [(norm, eps) for norm in ("l2", "linf") for eps in ("8/255", 0.1, 0.5, 1.0)]


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 8, 8)])
@pytest.mark.parametrize(("random_start", "restarts"), [(False, 1), (True, 1), (True, 3)])
@pytest.mark.parametrize(("norm", "eps"), BALLS)
def test_never_leaves_the_ball_or_the_range(norm, eps, shape, random_start, restarts):
    x, y = images(6, shape)
    x[0], x[1] = 0, 1  # wholly black, wholly white
    threat = Threat(norm, eps)
    found = pgd(Tanh(shape=shape), x, y, threat, 5, random_start=random_start, restarts=restarts)
    delta = (found.double() - x.double()).flatten(1)
    length = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    assert length.max() <= threat.eps * (1 + 1e-6) + 1e-7
    assert length.min() > 0
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad
    assert found.dtype == x.dtype


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_eps_zero_is_the_identity(norm):
    x, y = images()
    assert pgd(Tanh(), x, y, Threat(norm, 0), random_start=True, restarts=3) is x
    assert perturb(Tanh(), x, y, Attack(norm=norm, eps=0)) is x
    assert perturb(Tanh(), x, y, Attack()) is x


def test_restarts_keep_the_worst_case_of_each_sample():
    model, (x, y), threat = Tanh(), images(64), Threat("linf", 0.03)

    def judged(restarts: int) -> tuple[Tensor, Tensor]:
        found = pgd(model, x, y, threat, 3, restarts=restarts, generator=torch.Generator().manual_seed(0))
        logits = model(found).detach()
        return logits.argmax(1) != y, nn.functional.cross_entropy(logits, y, reduction="none")

    runs = [judged(restarts) for restarts in (1, 2, 5, 20)]
    for (wrong, loss), (now_wrong, now_loss) in itertools.pairwise(runs):
        assert bool((now_wrong >= wrong).all())
        assert bool((now_loss >= loss - 1e-6)[now_wrong == wrong].all())
    assert runs[-1][1].sum() > runs[0][1].sum()


def test_restarting_survivors_only_breaks_the_same_samples_at_less_cost():
    class Counting(Tanh):
        images = 0

        def forward(self, x: Tensor) -> Tensor:
            self.images += len(x)
            return super().forward(x)

    (x, y), threat, broken, cost = images(64), Threat("linf", 0.03), [], []
    for survivors_only in (False, True):
        model = Counting()
        generator = torch.Generator().manual_seed(0)
        found = pgd(model, x, y, threat, 3, restarts=8, generator=generator, survivors_only=survivors_only)
        cost.append(model.images)
        broken.append(model(found).argmax(1) != y)
    assert torch.equal(*broken)
    assert 0 < broken[0].sum() < len(x)
    assert cost[1] < cost[0] / 1.5


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_gets_its_own_mode_back(fails):
    model = nn.Sequential(Fragile(), Faulty()) if fails else nn.Sequential(Fragile(), nn.Identity())
    model.train()
    model[0].norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x, y = images()
    if fails:
        with pytest.raises(RuntimeError, match="no logits today"):
            pgd(model, x, y, Threat("l2", 1.0))
    else:
        pgd(model, x, y, Threat("l2", 1.0), restarts=2)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert before[""] is True
    assert before["0.norm"] is False
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_attacks_in_evaluation_mode():
    model, (x, y) = Fragile(), images()
    waking = pgd(model.train(), x, y, Threat("l2", 1.0))
    assert torch.equal(waking, pgd(model.eval(), x, y, Threat("l2", 1.0)))  # no dropout, no batch statistics


def test_evaluating_takes_several_models():
    a, b = nn.Dropout().train(), nn.Dropout().eval()
    with evaluating(a, b):
        assert not a.training
        assert not b.training
    assert a.training
    assert not b.training


def test_leaves_gradients_of_weights_as_they_are():
    model, (x, y) = Tanh(), images()
    model(x).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    pgd(model, x, y, Threat("linf", 0.1), restarts=2)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_sample_does_not_depend_on_its_batch(norm):
    model, (x, y), threat = Tanh(), images(16), Threat(norm, 0.2)
    together = pgd(model, x, y, threat)
    alone = torch.cat([pgd(model, x[i : i + 1], y[i : i + 1], threat) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


def test_the_generator_decides_the_start():
    model, (x, y), threat = Tanh(), images(), Threat("l2", 0.5)

    def attacked(seed: int) -> Tensor:
        torch.rand(3)  # the global generator must not matter
        return pgd(model, x, y, threat, 2, 0.1, random_start=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(attacked(1), attacked(1))
    assert not torch.equal(attacked(1), attacked(2))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("restarts", [1, 2])
def test_a_model_with_constant_output_gives_no_nan(norm, restarts):
    model, (x, y) = Tanh(), images()
    nn.init.zeros_(model.w)
    found = pgd(model, x, y, Threat(norm, 0.5), restarts=restarts)
    assert torch.isfinite(found).all()
    if restarts == 1:
        assert torch.equal(found, x)


def test_a_vanishing_gradient_still_gives_a_whole_step():
    x, y = images()
    x = x * 0.5 + 0.25
    model = Tanh()
    found = pgd(lambda images: model(images) * 1e-30, x, y, Threat("l2", 0.2), steps=1, step_size=0.2)
    torch.testing.assert_close((found - x).flatten(1).norm(dim=1), torch.full((len(x),), 0.2), rtol=1e-5, atol=0)


def test_works_where_the_caller_keeps_no_gradients():
    model, (x, y), threat = Tanh(), images(), Threat("linf", 0.1)
    with torch.no_grad():
        silent = pgd(model, x, y, threat, restarts=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(silent, pgd(model, x, y, threat, restarts=2, generator=torch.Generator().manual_seed(0)))


def test_a_model_that_detaches_is_refused():
    x, y = images()
    with pytest.raises(ValueError, match="no gradient"):
        pgd(lambda x: Tanh()(x).detach(), x, y, Threat("l2", 1))


@pytest.mark.parametrize("favourite", [0, 1])  # NaN logits count as class 0
@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 0.05)])
def test_a_gradient_that_is_not_a_number_voids_the_attack(norm, eps, favourite):
    x, _ = images(3)
    with pytest.raises(NotFinite, match="not finite on 3 of 3 images"):
        pgd(Void(favourite), x, torch.full((3,), favourite), Threat(norm, eps))


def test_stays_in_float32_under_autocast():
    x, y = images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), CLASSES))
    with torch.autocast("cpu", torch.bfloat16):
        found = pgd(model, x, y, Threat("l2", 0.5), restarts=2)
    assert found.dtype == torch.float32
    assert (found - x).flatten(1).norm(dim=1).max() <= 0.5 * (1 + 1e-6)


def test_fgsm_is_one_step_of_the_radius():
    model, (x, y) = Tanh(), images()
    found = fgsm(model, x, y, Threat("linf", "8/255"))
    inside = x.requires_grad_()
    gradient = torch.autograd.grad(nn.functional.cross_entropy(model(inside), y), inside)[0]
    torch.testing.assert_close(found, (inside + 8 / 255 * gradient.sign()).clamp(0, 1).detach(), rtol=0, atol=1e-6)


def test_perturb_is_pgd_as_the_recipe_says():
    model, (x, y) = Tanh(), images()
    attack = Attack(norm="l2", eps=0.7, steps=4, step_size=0.3, random_start=True, restarts=2)
    found = perturb(model, x, y, attack, torch.Generator().manual_seed(3))
    threat = Threat("l2", 0.7)
    expected = pgd(model, x, y, threat, 4, 0.3, True, 2, torch.Generator().manual_seed(3))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 255, y), r"lie in \[0, 1\]"),
        (lambda x, y: (x - 0.5, y), r"lie in \[0, 1\]"),
        (lambda x, y: (x * float("nan"), y), r"lie in \[0, 1\]"),
        (lambda x, y: ((x * 255).byte(), y), "divide 8-bit images"),
        (lambda x, y: (x.half(), y), "float32"),
        (lambda x, y: (x, y[:3]), "class indices"),
        (lambda x, y: (x, y.float()), "class indices"),
    ],
)
def test_bad_images_and_labels_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pgd(Tanh(), *change(*images()), Threat("l2", 1))


@pytest.mark.parametrize("bad", [{"steps": 0}, {"restarts": 0}, {"step_size": -0.1}, {"step_size": float("nan")}])
def test_impossible_arguments_are_refused(bad):
    with pytest.raises(ValueError, match="PGD needs"):
        pgd(Tanh(), *images(), Threat("l2", 1), **bad)
