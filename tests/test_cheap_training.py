"""Cheaper adversarial training: a single step after noise, cheaper first phases, and the guard against overfitting."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_npz
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize
from training import tiny_recipe, weights

from arae.attacks import Threat
from arae.attacks.gradient import perturb_unprojected, perturb_until_misclassified
from arae.check import check
from arae.config import Attack, EngineChoice, Recipe
from arae.errors import InputError
from arae.models import create_encoder
from arae.monitor.events import read_events
from arae.runs import RunFolder
from arae.train.course import Course
from arae.train.encoder import EncoderTrainer, resized
from arae.train.engine import Engine
from arae.train.loop import overfitted
from arae.train.micro import Micro
from arae.train.probe import Probe
from arae.train.run import train
from arae.train.state import list_states

CPU = torch.device("cpu")
L2, LINF = Attack(norm="l2", eps=0.5, steps=1), Attack(norm="linf", eps=0.1, steps=1)
STEPS = 12


def encoder_recipe(images: Path, **over: object) -> Recipe:
    return tiny_recipe(images, decoder=None, encoder__steps=STEPS, **over)


def begun(recipe: Recipe, path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create(recipe)
    return folder


def killed(recipe: Recipe, folder: RunFolder, at: int, time: int = 1) -> None:
    """Train until this step is begun for the first or a later time."""
    real, made = EncoderTrainer.step, []

    def step(self: EncoderTrainer, number: int, micros: Any) -> dict[str, Tensor]:
        made.append(number)
        if made.count(at) == time:
            raise KeyboardInterrupt
        return real(self, number, micros)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncoderTrainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder, CPU)


def trainer_of(recipe: Recipe) -> EncoderTrainer:
    torch.manual_seed(0)
    return EncoderTrainer(recipe, create_encoder("small-cnn", 3, 3, width=0.5), Engine(CPU, "fp32"), STEPS)


def batch() -> Micro:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(8, 3, 16, 16, generator=generator)
    return Micro(images.contiguous(memory_format=torch.channels_last), torch.arange(8) % 3, 0)


def after(recipe: Recipe, step: int, micro: Micro | None = None) -> dict[str, Tensor]:
    """The weights after this one step."""
    trainer = trainer_of(recipe)
    trainer.step(step, [micro or batch()])
    return trainer.exported()


# --- one step after noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [L2, LINF])
@pytest.mark.parametrize("size", [None, 0.07])
def test_a_step_after_noise_is_the_formula(attack: Attack, size: float | None) -> None:
    """In NumPy, for a linear model, whose gradient is known."""
    attack = attack.model_copy(update={"step_size": size})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
    x, y = torch.rand(5, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = perturb_unprojected(model, x, y, attack, 2.0, torch.Generator().manual_seed(7))
    assert attack.norm is not None
    noise = Threat(attack.norm, 2 * attack.eps).sample(x, torch.Generator().manual_seed(7)).numpy().reshape(5, -1)
    start = (x.numpy().reshape(5, -1) + noise).clip(0, 1)
    weight, bias = (p.detach().numpy() for p in model.parameters())
    z = start @ weight.T + bias
    p = np.exp(z - z.max(1, keepdims=True))
    gradient = (p / p.sum(1, keepdims=True) - np.eye(3)[y.numpy()]) @ weight
    unit = np.sign(gradient) if attack.norm == "linf" else gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    wanted = (start + (attack.eps if size is None else size) * unit).clip(0, 1)
    np.testing.assert_allclose(found.numpy().reshape(5, -1), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("attack", [L2, LINF])
def test_noise_leaves_the_ball_and_not_the_range_of_images(attack: Attack) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    x, y = torch.rand(64, 3, 4, 4), torch.zeros(64, dtype=torch.int64)
    found = perturb_unprojected(model, x, y, attack, 2.0)
    assert attack.norm is not None
    lengths = Threat(attack.norm, attack.eps).length(found - x)
    assert lengths.max() > 1.2 * attack.eps
    assert lengths.max() <= 3 * attack.eps * (1 + 1e-6)
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(perturb_unprojected(model, x, y, Attack(), 2.0), x)


def test_training_with_noise_sees_such_images(tiny_npz: Path) -> None:
    recipe = encoder_recipe(tiny_npz, encoder__attack={"norm": "l2", "eps": 0.5, "steps": 1})
    plain, noisy, again = (after(r, 3) for r in (recipe, *[recipe.replace({"encoder.noise": 2.0})] * 2))
    assert all(torch.equal(noisy[key], again[key]) for key in noisy)
    assert not all(torch.equal(noisy[key], plain[key]) for key in noisy)


# --- free adversarial training --------------------------------------------------------------------------------


def cross_entropy_gradients(
    images: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a linear classifier's losses: in each image, and of their mean in weight and bias."""
    z = images @ weight.T + bias
    p = np.exp(z - z.max(1, keepdims=True))
    error = p / p.sum(1, keepdims=True) - np.eye(len(bias))[y]
    return error @ weight, error.T @ images / len(y), error.mean(0)


def unit(gradient: np.ndarray, norm: str) -> np.ndarray:
    length = np.linalg.norm(gradient, axis=1, keepdims=True)
    return np.sign(gradient) if norm == "linf" else gradient / length


def inside(delta: np.ndarray, norm: str, eps: float) -> np.ndarray:
    length = np.linalg.norm(delta, axis=1, keepdims=True)
    return delta.clip(-eps, eps) if norm == "linf" else delta * np.minimum(1, eps / length)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("size", [None, 0.07])
@pytest.mark.parametrize("workers_micro", [8, 4])
def test_replays_are_algorithm_1(
    tiny_npz: Path, monkeypatch: pytest.MonkeyPatch, norm: str, size: float | None, workers_micro: int
) -> None:
    """In NumPy, for a linear classifier trained by plain gradient descent, in one micro-batch or two."""
    monkeypatch.setattr("arae.train.encoder.AttackNetwork", lambda model: None)
    eps, replays, rate = 0.1, 3, 0.5
    attack = {"norm": norm, "eps": eps, "steps": 1, "step_size": size}
    settings = {"attack": attack, "replays": replays, "lr": rate, "momentum": 0.0, "weight_decay": 0.0, "batch": 8}
    settings |= {"micro_batch": workers_micro, "label_smoothing": 0.0, "schedule": {"kind": "constant"}}
    recipe = encoder_recipe(tiny_npz, precision="fp64", **{f"encoder__{k}": v for k, v in settings.items()})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).double()
    weight, bias = (p.detach().numpy().copy() for p in model.parameters())
    trainer = EncoderTrainer(recipe, model, Engine(CPU, "fp64"), STEPS)  # type: ignore[arg-type] -- any network
    whole = batch()
    pieces = zip(whole.images.double().split(workers_micro), whole.labels.split(workers_micro), strict=True)
    seen = trainer.step(0, [Micro(x, y, i, 8 // workers_micro) for i, (x, y) in enumerate(pieces)])

    x, y = whole.images.double().numpy().reshape(8, -1), whole.labels.numpy()
    images, losses = x, []
    for _ in range(replays):
        z = images @ weight.T + bias
        losses.append(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(8), y]))
        in_images, in_weight, in_bias = cross_entropy_gradients(images, y, weight, bias)
        images = (x + inside(images - x + (eps if size is None else size) * unit(in_images, norm), norm, eps)).clip(
            0, 1
        )
        weight, bias = weight - rate * in_weight, bias - rate * in_bias
    for found, wanted in zip(model.parameters(), (weight, bias), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-9, atol=1e-12)
    assert seen["loss"].item() == pytest.approx(np.mean(losses))


def test_a_replayed_run_ends_the_same_after_a_kill(tiny_npz: Path, tmp_path: Path) -> None:
    attack = {"norm": "l2", "eps": 0.5, "steps": 1, "random_start": True}
    settings = {"steps": 4, "attack": attack, "replays": 2}
    few = {f"encoder__{key}": value for key, value in settings.items()} | {"evaluate__looks": 1, "state__every": 2}
    recipe = tiny_recipe(tiny_npz, decoder=None, **few)
    whole, folder = begun(recipe, tmp_path / "whole"), begun(recipe, tmp_path / "run")
    train(recipe, whole, CPU)
    killed(recipe, folder, at=3)
    assert [saved.step for saved in list_states(folder.state)][-1] == 2
    train(recipe, folder, CPU)
    assert weights(folder) == weights(whole)


# --- samples that leave the attack early ----------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [L2, LINF])
@pytest.mark.parametrize("more", [0, 1, 2, 9])
def test_a_misclassified_sample_leaves_after_so_many_steps_more(attack: Attack, more: int) -> None:
    """In NumPy, each sample alone, for a linear model; some are misclassified at once, some never."""
    attack = attack.model_copy(update={"steps": 6, "step_size": attack.eps / 5})
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
    x = torch.rand(40, 3, 4, 4, dtype=torch.float64)
    y = torch.where(torch.rand(40) < 0.8, model(x).argmax(1), torch.arange(40) % 3)
    asked: list[int] = []

    def counting(images: Tensor) -> Tensor:
        asked.append(len(images))
        return model(images)

    found = perturb_until_misclassified(counting, x, y, attack, more).numpy().reshape(40, -1)
    weight, bias = (p.detach().numpy() for p in model.parameters())
    assert attack.norm is not None
    steps = []
    for i in range(40):
        begin = image = x[i].numpy().reshape(1, -1)
        left, done = more, 0
        for _ in range(6):
            if (image @ weight.T + bias).argmax() != y[i]:
                if left == 0:
                    break
                left -= 1
            gradient = cross_entropy_gradients(image, y[i : i + 1].numpy(), weight, bias)[0]
            moved = image - begin + attack.eps / 5 * unit(gradient, attack.norm)
            image = (begin + inside(moved, attack.norm, attack.eps)).clip(0, 1)
            done += 1
        np.testing.assert_allclose(found[i : i + 1], image, rtol=1e-6, atol=1e-9)
        steps.append(done)
    assert asked[0] == 40
    assert sum(asked) == sum(min(6, done + 1) for done in steps)  # and one look more, at which it is seen to be done
    assert len(set(steps)) > 1 or more == 9


def test_workers_in_step_can_not_leave_the_attack_each_in_its_own_time(tiny_npz: Path) -> None:
    attack = {"norm": "l2", "eps": 0.5, "steps": 3}
    recipe = encoder_recipe(tiny_npz, encoder__attack=attack, encoder__early_stop=0, encoder__quick_attack=False)
    model = create_encoder("small-cnn", 3, 3, width=0.5)
    with pytest.raises(InputError, match=r"early_stop = 0: in ZeRO's stage 3 .* set encoder.quick_attack=true"):
        EncoderTrainer(recipe, model, Engine(CPU, "fp32", EngineChoice(kind="deepspeed", stage=3)), STEPS)


def test_with_steps_enough_for_all_it_is_plain_pgd(tiny_npz: Path) -> None:
    recipe = encoder_recipe(tiny_npz, encoder__attack={"norm": "l2", "eps": 0.5, "steps": 3})
    plain, never, early = (after(recipe.replace({"encoder.early_stop": k}), 3) for k in (None, 3, 0))
    for key, value in plain.items():
        torch.testing.assert_close(value, never[key])
    assert not all(torch.equal(early[key], plain[key]) for key in early)


# --- phases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("step_size", [None, 0.02])
def test_a_step_of_a_phase_is_one_of_a_smaller_attack_on_smaller_images(
    tiny_npz: Path, norm: str, step_size: float | None
) -> None:
    """Of twelve steps the first three, the next three and the rest."""
    eps = 0.4 if norm == "l2" else 0.03
    attack = {"norm": norm, "eps": eps, "steps": 4, "step_size": step_size}
    phases = [{"until": 0.25, "steps": 1, "scale": 0.5}, {"until": 0.5, "steps": 2}]
    whole = encoder_recipe(tiny_npz, encoder__attack=attack, encoder__phases=phases)
    small = 0.5 if norm == "l2" else 1.0
    for step, steps, scale, shrunk in ((0, 1, 0.5, small), (2, 1, 0.5, small), (3, 2, 1, 1), (6, 4, 1, 1)):
        size = None if step_size is None else step_size * shrunk * 4 / steps
        alone = {"norm": norm, "eps": eps * shrunk, "steps": steps, "step_size": size}
        micro = replace(batch(), images=resized(batch(), scale).images)
        assert micro.images.shape[2:] == (16 * scale, 16 * scale)
        theirs = after(encoder_recipe(tiny_npz, encoder__attack=alone), step, micro)
        for key, value in after(whole, step).items():
            torch.testing.assert_close(value, theirs[key], msg=f"{key} after step {step}")


def test_images_are_resized_as_torchvision_does() -> None:
    found = resized(batch(), 0.7).images
    torch.testing.assert_close(found, resize(batch().images, [11, 11], antialias=True).clamp(0, 1))
    assert resized(batch(), 1.0).images.shape == (8, 3, 16, 16)


def test_images_too_small_for_the_network_are_refused_at_once(tmp_path: Path) -> None:
    recipe = encoder_recipe(
        make_tiny_npz(tmp_path), encoder__name="alexnet", data__size=64, encoder__phases=[{"until": 0.5, "scale": 0.5}]
    )
    with pytest.raises(InputError, match=r"\(3, 32, 32\): it needs 63×63 px"):
        train(recipe, begun(recipe, tmp_path / "run"), CPU)


PHASE = {"until": 0.5, "steps": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phases": [PHASE, PHASE]}, r"phases end at \[0.5, 0.5\] of the stage"),
        ({"phases": [{"until": 0.5}, {"until": 0.2}]}, "write them in order"),
        ({"phases": [{"until": 1}]}, "until"),
        ({"phases": [{"until": 0.5, "scale": 0}]}, "scale"),
        ({"noise": 2.0}, "noise = 2 goes before a single step: set attack.steps to 1"),
        ({"noise": -1.0}, "noise"),
        ({"noise": 2.0, "attack": {"norm": "l2", "eps": 1, "steps": 1, "random_start": True}}, "leave random_start"),
        ({"noise": 2.0, "attack": {"norm": "linf", "eps": 0.6, "steps": 1}}, "noise · attack.eps = 1.2"),
        ({"noise": 2.0, "attack": {"norm": "l2", "eps": 1, "steps": 1}, "objective": {"kind": "mart"}}, "not mart"),
        ({"replays": 4}, "replays = 4 are attacks of one step each"),
        ({"replays": 0}, "replays"),
        ({"replays": 4, "noise": 2.0, "attack": {"norm": "l2", "eps": 1, "steps": 1}}, "leave restarts and noise"),
        ({"early_stop": -1}, "early_stop"),
        ({"early_stop": 1, "attack": {"norm": "l2", "eps": 1, "steps": 3, "restarts": 2}}, "PGD that runs once"),
        ({"early_stop": 1, "objective": {"kind": "trades"}}, "early_stop = 1 is for PGD"),
        ({"guard": {"below": 1.0}}, "below"),
        ({"guard": {"steps": 2}}, "guard.steps = 2 must be more than the attack has before it, 2"),
    ],
)
def test_what_can_not_be_is_said(tiny_npz: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        encoder_recipe(tiny_npz, encoder__label_smoothing=0.0).replace({f"encoder.{k}": v for k, v in changes.items()})


# --- the guard ----------------------------------------------------------------------------------------------------

LOOKS = [0.3, 0.6, 0.2, 0.5, 0.55]
"""What the held-out images give after 3, 6, 9 of twelve steps, and then of the steps from 6 on made again."""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, bool]]:
    """Robust accuracies as in LOOKS, each with whether the trainer was hardened by then."""
    seen: list[tuple[float, bool]] = []
    real = EncoderTrainer.__init__

    def init(self: EncoderTrainer, *args: Any, **named: Any) -> None:
        real(self, *args, **named)
        seen.append((-1.0, self.hardened))
        trainers.append(self)

    trainers: list[EncoderTrainer] = []

    def classify(_self: Probe, _model: nn.Module) -> dict[str, float]:
        looks = [one for one in seen if one[0] >= 0]
        seen.append((LOOKS[len(looks)] if len(looks) < len(LOOKS) else 0.6, trainers[-1].hardened))
        return {"clean_accuracy": 0.9, "robust_accuracy": seen[-1][0]}

    monkeypatch.setattr(EncoderTrainer, "__init__", init)
    monkeypatch.setattr(Probe, "classify", classify)
    return seen


def guarded(images: Path, **over: object) -> Recipe:
    attack = {"norm": "l2", "eps": 0.5, "steps": 1}
    settings: dict[str, object] = {"evaluate__looks": 4, "state__every": 1, "state__keep": 2, "encoder__attack": attack}
    return encoder_recipe(images, **(settings | {"encoder__noise": 1.0, "encoder__guard": {"steps": 3}} | over))


def notes(folder: RunFolder) -> str:
    return folder.log.read_text()


def test_after_a_collapse_it_goes_on_from_the_best_with_the_stronger_attack(
    tiny_npz: Path, tmp_path: Path, measured: list[tuple[float, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[tuple[int, int, bool]] = []
    real = EncoderTrainer._attack

    def attack(self: EncoderTrainer, step: int, span: Any, *rest: Any) -> Any:
        stepped.append((step, span.attack.steps, self.hardened))
        return real(self, step, span, *rest)

    monkeypatch.setattr(EncoderTrainer, "_attack", attack)
    recipe = guarded(tiny_npz, encoder__micro_batch=32)
    folder = begun(recipe, tmp_path / "run")
    train(recipe, folder, CPU)
    first, then = [(step, 1, False) for step in range(9)], [(step, 3, True) for step in range(6, 12)]
    assert stepped == [*first, *then]
    looked = [one for one in measured if one[0] >= 0]
    assert looked == [(0.3, False), (0.6, False), (0.2, False), (0.5, True), (0.55, True)]
    said = "fell from 0.6 to 0.2 by step 9 (catastrophic overfitting): gone back to step 6, and on with PGD of 3 steps"
    assert said in notes(folder)


def test_killed_after_going_back_it_goes_on_hardened_and_ends_the_same(
    tiny_npz: Path, tmp_path: Path, measured: list[tuple[float, bool]]
) -> None:
    recipe = guarded(tiny_npz)
    whole = begun(recipe, tmp_path / "whole")
    train(recipe, whole, CPU)
    measured.clear()
    folder = begun(recipe, tmp_path / "run")
    killed(recipe, folder, at=6, time=2)
    assert [saved.step for saved in list_states(folder.state)][-1] == 6
    train(recipe, folder, CPU)
    assert weights(folder) == weights(whole)
    assert notes(folder).count("catastrophic overfitting") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder__guard": None},
        {"encoder__guard": {"below": 0.3}},
        {"encoder__radius_warmup": 0.8},  # robustness at the whole radius is not wanted yet
        {"encoder__attack": {"eps": 0.0}},  # it is the clean accuracy that has fallen
    ],
)
def test_without_a_guard_or_above_its_bound_it_goes_on(
    tiny_npz: Path, tmp_path: Path, measured: list[tuple[float, bool]], changes: dict[str, object]
) -> None:
    recipe = guarded(tiny_npz, **changes)
    folder = begun(recipe, tmp_path / "run")
    train(recipe, folder, CPU)
    assert [value for value, _ in measured if value >= 0] == LOOKS[:4]
    assert "catastrophic" not in notes(folder)


@pytest.mark.parametrize(("best", "score", "found"), [(0.6, 0.2, True), (0.012, 0.004, False), (0.1, 0.04, True)])
def test_what_few_images_can_not_tell_is_no_collapse(tiny_npz: Path, best: float, score: float, found: bool) -> None:
    """Of 256: 3 right and then 1 is chance, as many classes have it; 26 and then 10 is not."""
    assert overfitted(trainer_of(guarded(tiny_npz)), Course(step=9, best=best), score) is found


def test_where_the_best_state_is_damaged_the_next_best_is_gone_back_to(
    tiny_npz: Path, tmp_path: Path, measured: list[tuple[float, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = guarded(tiny_npz, state__keep=9)
    folder = begun(recipe, tmp_path / "run")
    real = EncoderTrainer.step

    def step(self: EncoderTrainer, number: int, micros: Any) -> dict[str, Tensor]:
        if number == 8 and not self.hardened:
            (folder.state / "encoder-00000006.pt").write_bytes(b"damaged")
        return real(self, number, micros)

    monkeypatch.setattr(EncoderTrainer, "step", step)
    train(recipe, folder, CPU)
    assert "gone back to step 3" in notes(folder)
    assert [value for value, _ in measured if value >= 0] == [0.3, 0.6, 0.2, 0.5, 0.55, 0.6]


def test_a_collapse_is_marked_so_that_nobody_takes_it_for_how_the_trial_stands(
    tiny_npz: Path, tmp_path: Path, measured: list[tuple[float, bool]]
) -> None:
    recipe = guarded(tiny_npz)
    folder = begun(recipe, tmp_path / "run")
    train(recipe, folder, CPU)
    looks = [event for event in read_events(folder.log) if event["event"] == "epoch"]
    assert [(look["step"], bool(look.get("overfitted"))) for look in looks] == [
        (3, False), (6, False), (9, True), (9, False), (12, False),
    ]  # fmt: skip


def test_a_phase_that_does_not_fit_is_said_before_training(tmp_path: Path) -> None:
    recipe = encoder_recipe(
        make_tiny_npz(tmp_path), encoder__name="alexnet", data__size=64, encoder__phases=[{"until": 0.5, "scale": 0.5}]
    )
    with pytest.raises(InputError, match="it needs 63×63 px"):
        list(check(recipe, CPU))


def test_cost_counts_phases_by_their_size_and_steps(tiny_npz: Path) -> None:
    from arae.cost import Networks

    attack = {"norm": "l2", "eps": 0.5, "steps": 4}
    plain = encoder_recipe(tiny_npz, encoder__attack=attack)
    cheap = plain.replace({"encoder.phases": [{"until": 0.5, "steps": 1, "scale": 0.5}]})
    whole, part = (Networks(r, (3, 16, 16), 3) for r in (plain, cheap))
    passes = whole.classify
    half = 0.5 * 0.25 * (passes.to_input + passes.to_weights) + 0.5 * (4 * passes.to_input + passes.to_weights)
    assert part.encoder_step(cheap.encoder.attack) == pytest.approx(half, abs=1)
