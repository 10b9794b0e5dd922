"""APGD: against a step-by-step reference, its losses by hand, and what must hold of any attack."""

import itertools

import numpy as np
import pytest
import torch
from test_attacks import CLASSES, SHAPE, Fragile, Tanh, Void, images
from torch import Tensor, nn

from arae.attacks import Threat, apgd, attack, pgd
from arae.attacks.apgd import checkpoints, dlr, dlr_targeted
from arae.config import Attack
from arae.errors import InputError, NotFinite


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # the arrays are small: threads would only wait for one another


LOSSES = ("ce", "dlr", "dlr-targeted")
BALLS = [("l2", 0.3), ("l2", 1.5), ("linf", "8/255"), ("linf", 0.3)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def right(n: int = 24, **shape: object) -> tuple[Tanh, Tensor, Tensor]:
    """A model, and images that it classifies correctly."""
    model = Tanh(**shape)
    x, _ = images(n, shape.get("shape", SHAPE))
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (1, [1]),
        (10, [3, 5, 6, 7, 8, 9, 10]),
        (50, [11, 21, 29, 35, 40, 44, 47, 50]),
    ],
)
def test_checkpoints_are_those_of_the_paper(steps, expected):
    assert checkpoints(steps) == expected


def climbed(model: Tanh, x: np.ndarray, label: int, norm: str, eps: float, steps: int, start: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper for one image, literally, in NumPy, on the cross-entropy; the best point it saw."""
    w, b, v = (p.detach().numpy() for p in (model.w, model.b, model.v))

    def judged(point: np.ndarray) -> tuple[float, np.ndarray]:
        hidden = np.tanh(w @ point + b)
        logits = v @ hidden
        log_sum = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        gradient = ((np.exp(logits - log_sum) - np.eye(CLASSES)[label]) @ v * (1 - hidden**2)) @ w
        return log_sum - logits[label], gradient

    def inside(point: np.ndarray) -> np.ndarray:
        delta = point - x
        delta = np.clip(delta, -eps, eps) if norm == "linf" else delta * min(1, eps / np.linalg.norm(delta))
        return np.clip(x + delta, 0, 1)

    def unit(g: np.ndarray) -> np.ndarray:
        return np.sign(g) if norm == "linf" else g / np.linalg.norm(g)

    walked, values = [start], [judged(start)[0]]
    best, top = start, values[0]
    size, rises, last, before, checked = 2 * eps, 0, 0, False, top
    for k in range(1, steps + 1):
        here = walked[-1]
        ahead = inside(here + size * unit(judged(here)[1]))
        share = 1.0 if k == 1 else 0.75
        walked.append(inside(here + share * (ahead - here) + (1 - share) * (here - walked[-2] if k > 1 else 0)))
        values.append(judged(walked[-1])[0])
        rises += values[-1] > values[-2]
        if values[-1] > top:
            best, top = walked[-1], values[-1]
        if k in checkpoints(steps):
            halve = rises < 0.75 * (k - last) or (not before and top == checked)
            if halve:
                size, walked[-1], values[-1] = size / 2, best, top
            rises, last, before, checked = 0, k, halve, top
    return best


@pytest.mark.parametrize("steps", [1, 30, 100])
@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.1), ("linf", 0.005)])
def test_equals_algorithm_1_step_by_step(norm, eps, steps):
    model, x, y = right(16)
    model, x, threat = model.double(), x.double(), Threat(norm, eps)
    found = apgd(model, x, y, threat, steps, generator=seeded())
    delta = threat.sample(x, seeded())
    start = (x + delta * (eps / threat.length(delta))[:, None, None, None]).clamp(0, 1)
    standing = (model(found).argmax(1) == y).nonzero().flatten()
    assert len(standing) > 8
    for i in standing:
        best = climbed(model, x[i].flatten().numpy(), int(y[i]), norm, eps, steps, start[i].flatten().numpy())
        np.testing.assert_allclose(found[i].flatten().numpy(), best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 8, 8)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("norm", "eps"), BALLS)
def test_never_leaves_the_ball_or_the_range(norm, eps, loss, shape):
    model, x, y = right(6, shape=shape)
    x[0], x[1] = 0, 1  # wholly black, wholly white
    threat = Threat(norm, eps)
    found = apgd(model, x, y, threat, 12, loss, restarts=2)
    delta = (found.double() - x.double()).flatten(1)
    length = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    assert length.max() <= threat.eps * (1 + 1e-6) + 1e-7
    assert length.max() > 0
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad
    assert found.dtype == x.dtype


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("kind", ["pgd", "apgd-ce", "apgd-dlr", "apgd-t"])
def test_eps_zero_and_no_images_give_x_itself(norm, kind):
    model, x, y = right()
    recipe = Attack(kind=kind, norm=norm, eps=0)
    assert attack(model, x, y, recipe) is x
    assert attack(model, x, y, Attack(kind=kind)) is x
    assert len(attack(model, x[:0], y[:0], recipe.model_copy(update={"eps": 0.1}))) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_already_wrong_stays_as_it_is(loss):
    model, x, y = right()
    y[::2] = (y[::2] + 1) % CLASSES
    found = apgd(model, x, y, Threat("linf", 0.05), 20, loss)
    assert torch.equal(found[::2], x[::2])
    assert bool(((found[1::2] != x[1::2]).flatten(1).any(1)).all())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.15), ("linf", 0.01)])
def test_ends_no_lower_than_it_starts(norm, eps, loss):
    model, x, y = right(64)
    threat = Threat(norm, eps)
    found = apgd(model, x, y, threat, 10, loss, targets=1, generator=seeded())
    delta = threat.sample(x, seeded())
    start = (x + delta * (eps / threat.length(delta))[:, None, None, None]).clamp(0, 1)
    second = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)

    def losses(at: Tensor) -> Tensor:
        logits = model(at).detach()
        if loss == "ce":
            return nn.functional.cross_entropy(logits, y, reduction="none")
        return dlr(logits, y) if loss == "dlr" else dlr_targeted(logits, y, second)

    standing = model(found).argmax(1) == y
    assert 0 < standing.sum() < len(x)
    assert bool((losses(found) >= losses(start) - 1e-6)[standing].all())
    assert bool((standing <= (model(start).argmax(1) == y)).all())
    assert (losses(found) - losses(start))[standing].mean() > 0.01


@pytest.mark.parametrize(("name", "counts"), [("restarts", (1, 3, 9)), ("targets", (1, 2, 3))])
def test_more_runs_only_break_more(name, counts):
    model, x, y = right(128)

    def standing(count: int) -> Tensor:
        found = apgd(
            model, x, y, Threat("linf", 0.08), 2, "dlr-targeted", **{"targets": 1, name: count}, generator=seeded()
        )
        return model(found).argmax(1) == y

    runs = [standing(count) for count in counts]
    assert all(bool((after <= before).all()) for before, after in itertools.pairwise(runs))
    assert runs[-1].sum() < runs[0].sum()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_sample_does_not_depend_on_its_batch(norm):
    model, x, y = right(32)
    threat = Threat(norm, 0.02)
    together = apgd(model, x, y, threat, 20, generator=seeded())
    few = apgd(model, x[:16], y[:16], threat, 20, generator=seeded())  # the first draws are the same
    torch.testing.assert_close(together[:16], few, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_generator_alone_decides(loss):
    model, x, y = right()
    state = torch.get_rng_state()
    once, again, other = (apgd(model, x, y, Threat("l2", 0.1), 5, loss, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("loss", LOSSES)
def test_leaves_the_model_as_it_was(loss):
    model = nn.Sequential(Fragile(), nn.Identity()).train()
    model[0].norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x, y = images()
    model(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    with torch.no_grad():
        waking = apgd(model, x, y, Threat("l2", 0.5), 5, loss, generator=seeded())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(waking, apgd(model.eval(), x, y, Threat("l2", 0.5), 5, loss, generator=seeded()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("favourite", [0, 1])  # NaN logits count as class 0
@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 0.05)])
def test_a_gradient_that_is_not_a_number_voids_the_attack(norm, eps, favourite, loss):
    x, _ = images(3)
    with pytest.raises(NotFinite, match="not finite on 3 of 3 images"):
        apgd(Void(favourite), x, torch.full((3,), favourite), Threat(norm, eps), steps=4, loss=loss)


def test_stays_in_float32_under_autocast():
    model, x, y = right()
    with torch.autocast("cpu", torch.bfloat16):
        found = apgd(model, x, y, Threat("l2", 0.5), 10)
    assert found.dtype == torch.float32
    assert (found - x).flatten(1).norm(dim=1).max() <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("logits", "y", "expected"),
    [
        ([4.0, 1.0, 0.0, -2.0], 0, (1 - 4) / (4 - 0)),
        ([4.0, 1.0, 0.0, -2.0], 1, (4 - 1) / (4 - 0)),
        ([4.0, 1.0, 0.0, -2.0], 3, (4 + 2) / (4 - 0)),
        ([2.0, 5.0, 1.0], 1, (2 - 5) / (5 - 1)),
        ([2.0, 5.0], 1, 2 - 5),
        ([2.0, 5.0], 0, 5 - 2),
    ],
)
def test_dlr_by_hand(logits, y, expected):
    assert dlr(torch.tensor([logits]), torch.tensor([y])).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("logits", "y", "target", "expected"),
    [
        ([4.0, 1.0, 0.0, -2.0, -9.0], 0, 1, (1 - 4) / (4 - (0 - 2) / 2)),
        ([4.0, 1.0, 0.0, -2.0, -9.0], 0, 4, (-9 - 4) / (4 - (0 - 2) / 2)),
        ([4.0, 1.0, 0.0], 0, 1, (1 - 4) / (4 - (1 + 0) / 2)),
        ([4.0, 1.0, 0.0], 0, 2, (0 - 4) / (4 - (1 + 0) / 2)),
        ([4.0, 1.0], 0, 1, 1 - 4),
    ],
)
def test_targeted_dlr_by_hand(logits, y, target, expected):
    found = dlr_targeted(torch.tensor([logits]), torch.tensor([y]), torch.tensor([target])).item()
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_dlr_ignores_shift_and_scale_and_never_stalls(classes):
    logits = torch.randn(64, classes, generator=seeded(), requires_grad=True)
    y = logits.argmax(1)  # classified correctly, as far as APGD climbs
    for target in logits.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True)[:, :-1].T:
        torch.testing.assert_close(dlr_targeted(7 * logits - 3, y, target), dlr_targeted(logits, y, target))
        slope = torch.autograd.grad(dlr_targeted(logits, y, target).sum(), logits)[0]
        assert slope.norm(dim=1).min() > 1e-3
    torch.testing.assert_close(dlr(7 * logits - 3, y), dlr(logits, y))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_are_attacked_as_hard_as_by_pgd(classes, loss):
    model, x, y = right(128, classes=classes)
    threat = Threat("l2", 0.5)
    by_pgd = (model(pgd(model, x, y, threat, 50, 0.03)).argmax(1) != y).sum().item()
    found = (model(apgd(model, x, y, threat, 50, loss, generator=seeded())).argmax(1) != y).sum().item()
    assert 20 < by_pgd < 110
    assert found >= by_pgd - 3


@pytest.mark.parametrize(("kind", "loss"), [("apgd-ce", "ce"), ("apgd-dlr", "dlr"), ("apgd-t", "dlr-targeted")])
def test_attack_is_what_the_recipe_says(kind, loss):
    model, x, y = right()
    recipe = Attack(kind=kind, norm="l2", eps=0.2, steps=7, restarts=2)
    expected = apgd(model, x, y, Threat("l2", 0.2), 7, loss, 2, generator=seeded())
    assert torch.equal(attack(model, x, y, recipe, seeded()), expected)
    with pytest.raises(InputError, match=f"step_size = 0.1 is for kind pgd; {kind}"):
        attack(model, x, y, recipe.model_copy(update={"step_size": 0.1}))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_cascade_is_both_attacks_on_whom_they_concern(classes):
    """What the first breaks is its work; the second sees only what is left, and nobody who was wrong already."""
    model, x, y = right(128, classes=classes)
    y = y.clone()
    y[:5] = (y[:5] + 1) % classes  # wrong from the start
    threat, recipe = Threat("l2", 0.4), Attack(kind="cascade", norm="l2", eps=0.4, steps=20)
    found = attack(model, x, y, recipe, seeded())
    assert torch.equal(found[:5], x[:5])
    generator = seeded()
    first = apgd(model, x[5:], y[5:], threat, 20, "ce", generator=generator)
    broken = model(first).argmax(1) != y[5:]
    assert torch.equal(found[5:][broken], first[broken])
    then = apgd(model, x[5:][~broken], y[5:][~broken], threat, 20, "dlr-targeted", generator=generator)
    assert torch.equal(found[5:][~broken], then)
    assert 10 < broken.sum() < 120
    assert threat.length(found - x).max() <= 0.4 * (1 + 1e-5)
    assert torch.equal(attack(model, x[:5], y[:5], recipe, seeded()), x[:5])


def test_attack_by_pgd_and_by_no_single_attack():
    model, x, y = right()
    recipe = Attack(norm="linf", eps=0.02, steps=4, step_size=0.01, random_start=True, restarts=3)
    expected = pgd(model, x, y, Threat("linf", 0.02), 4, 0.01, True, 3, seeded(), survivors_only=True)
    assert torch.equal(attack(model, x, y, recipe, seeded()), expected)
    with pytest.raises(InputError, match="autoattack is no single attack"):
        attack(model, x, y, recipe.model_copy(update={"kind": "autoattack"}))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": 0}, "APGD needs"),
        ({"restarts": 0}, "APGD needs"),
        ({"targets": 0}, "APGD needs"),
        ({"loss": "hinge"}, "write one of ce, dlr, dlr-targeted"),
        ({"model": lambda x: Tanh()(x).detach()}, "no gradient"),
        ({"model": lambda x: Tanh()(x)[:, :1]}, "two classes or more"),
        ({"x": images()[0] * 255}, r"lie in \[0, 1\]"),
        ({"x": images()[0] * torch.nan}, r"lie in \[0, 1\]"),
        ({"y": torch.zeros(3)}, "class indices"),
    ],
)
def test_bad_input_is_refused(bad, message):
    x, _ = images()
    y = Tanh()(x).argmax(1)
    with pytest.raises(ValueError, match=message):
        apgd(**{"model": Tanh(), "x": x, "y": y, "threat": Threat("l2", 1), **bad})
