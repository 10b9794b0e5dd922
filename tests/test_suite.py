"""AutoAttack's suite: settings, verdicts, its state through kills; and the remarks on models that deceive it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attacks import SHAPE, Fragile, Tanh, Void, images
from torch import Tensor, nn

from arae.attacks import Threat, autoattack, checks, suite
from arae.attacks.sanity import NO_GRADIENT, square_remark
from arae.errors import InputError

THREAT = Threat("l2", 0.5)


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    torch.set_num_threads(1)  # the arrays are small: threads would only wait for one another
    monkeypatch.setattr(suite, "STEPS", 4)
    monkeypatch.setattr(suite, "QUERIES", 12)


def job(n: int = 14, shape: tuple[int, ...] = SHAPE, classes: int = 4) -> tuple[Tanh, Tensor, Tensor]:
    """A model, images, and labels of which three are not what it says."""
    model = Tanh(shape=shape, classes=classes)
    x, _ = images(n, shape)
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % classes
    return model, x, y


def run(state: Path | None = None, seed: int = 5, batch: int = 4, threat: Threat = THREAT, **more: object):
    model, x, y = job()
    return autoattack(model, x, y, threat, batch=batch, seed=seed, state=state, **more)


def same(one: suite.Outcome, other: suite.Outcome) -> bool:
    tensors = torch.equal(one.robust, other.robust) and torch.equal(one.adversarial, other.adversarial)
    return tensors and (one.broken_by, one.flags) == (other.broken_by, other.flags)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 0.05)])
def test_keeps_the_worst_case_of_each_sample(norm, eps):
    model, x, y = job(24)
    threat, before = Threat(norm, eps), x.clone()
    found = autoattack(model, x, y, threat, batch=10, seed=0)
    assert torch.equal(x, before)
    wrong = model(found.adversarial).argmax(1) != y
    assert torch.equal(found.robust, ~wrong)
    assert 3 < wrong.sum() < len(x)
    assert sum(found.broken_by.values()) == wrong.sum() - 3
    assert list(found.broken_by) == list(suite.STANDARD)
    assert torch.equal(found.adversarial[found.robust], x[found.robust])
    assert torch.equal(found.adversarial[:3], x[:3])
    assert 0 < threat.length(found.adversarial - x).max() <= threat.eps * (1 + suite.ROUNDING)
    assert found.adversarial.min() >= 0
    assert found.adversarial.max() <= 1


def test_more_attacks_only_break_more():
    alone, together = run(attacks=("square",)), run(attacks=("square", "apgd-t"))
    assert bool((together.robust <= alone.robust).all())
    assert together.robust.sum() < alone.robust.sum()
    assert together.broken_by["square"] == alone.broken_by["square"]


@pytest.mark.parametrize("name", suite.STANDARD)
def test_settings_are_those_of_the_standard_version(name, monkeypatch):
    monkeypatch.undo()
    package = pytest.importorskip("pyautoattack")
    standard = package.AutoAttack(Tanh(), eps=0.3, norm="L2", seed=1, version="standard")
    theirs = {
        "apgd-ce": standard.apgd,
        "apgd-t": standard.apgd_targeted,
        "fab-t": standard.fab,
        "square": standard.square,
    }[name]
    theirs.targeted = name == "fab-t"  # as its `run_standard_evaluation` sets it
    ours = suite._published(name, Tanh(), Threat("l2", 0.3), 1, torch.device("cpu"), 9).__self__
    ours.targeted = getattr(ours, "targeted", False)
    if name == "apgd-ce":
        theirs.loss = "ce"
    kept = {key for key in vars(theirs) if key not in ("model", "predict", "logger", "device")}
    assert {key: vars(ours)[key] for key in kept} == {key: vars(theirs)[key] for key in kept}


@pytest.mark.parametrize("units", [1, 4, 6, 9])
def test_killed_after_any_unit_it_ends_the_same(units, tmp_path, monkeypatch):
    whole, calls = run(), []
    once = suite._Suite.unit

    def counted(self: object, name: str, index: int, rows: Tensor):
        calls.append((name, index))
        return once(self, name, index, rows)

    monkeypatch.setattr(suite._Suite, "unit", counted)

    def stop(name: str, done: int, total: int) -> None:
        if len(calls) == units:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "state", progress=stop)
    said = []
    assert same(run(tmp_path / "state", log=said.append), whole)
    assert len(calls) == len(set(calls)) > units  # no unit was computed twice
    assert f"going on after {units} finished batches" in said[0]
    before = len(calls)
    assert same(run(tmp_path / "state"), whole)
    assert len(calls) == before


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
import test_suite
from arae.attacks import suite
torch.set_num_threads(1)
suite.STEPS, suite.QUERIES = 4, 12
def die(name, done, total):
    if (name, done) == ("fab-t", 1):
        os.kill(os.getpid(), signal.SIGKILL)
test_suite.run(Path(sys.argv[1]), progress=die)
"""


@pytest.mark.integration
def test_a_killed_process_is_continued(tmp_path):
    state = tmp_path / "state"
    tests = Path(__file__).parent
    died = subprocess.run([sys.executable, "-c", CHILD, state], cwd=tests, timeout=300)
    assert died.returncode == -signal.SIGKILL
    assert list(state.glob("*/fab-t-*"))
    assert not list(state.glob("*/square-*"))
    assert same(run(state), run())


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed": 6}, "seed"),
        ({"batch": 5}, "batch"),
        ({"threat": Threat("l2", 0.4)}, "threat"),
        ({"threat": Threat("linf", 0.5)}, "threat"),
        ({"attacks": ("apgd-ce", "square")}, "attacks"),
    ],
)
def test_another_jobs_state_is_left_alone(change, part, tmp_path):
    first, said = run(tmp_path), []
    assert same(run(tmp_path, log=said.append, **change), run(**change))
    assert f"the work of another job (other {part}) is left alone" in said[0]
    assert same(run(tmp_path), first)


@pytest.mark.parametrize("part", ["weights", "images", "labels"])
def test_another_model_or_other_images_are_another_job(part, tmp_path):
    model, x, y = job()
    autoattack(model, x, y, THREAT, batch=4, seed=5, state=tmp_path)
    if part == "weights":
        model.b.data[0] += 1e-3
    elif part == "images":
        x[5, 0, 0, 0] = 1 - x[5, 0, 0, 0]
    else:
        y[4] = (y[4] + 1) % 4
    said = []
    autoattack(model, x, y, THREAT, batch=4, seed=5, state=tmp_path, log=said.append)
    assert f"(other {part})" in said[0]


def test_units_computed_elsewhere_are_the_same(tmp_path):
    """Each from its own samples alone, in any order; and only those that the state lacks are asked for."""
    model, x, y = job()
    asked = []

    def units(name, wanted):
        made = {i: suite.suite_unit(model, x[rows], y[rows], THREAT, 5, name, i) for i, rows in reversed(wanted)}
        asked.extend((name, i) for i, _ in wanted)
        return ((place, made[i]) for place, (i, _) in reversed(list(enumerate(wanted))))

    whole = run(tmp_path)
    assert same(run(units=units), whole)
    assert ("apgd-t", 0) in asked
    [path] = tmp_path.glob("*/apgd-t-00000.safetensors")
    path.unlink()
    asked.clear()
    assert same(run(tmp_path, units=units), whole)
    assert asked == [("apgd-t", 0)]


def test_a_damaged_unit_is_computed_anew(tmp_path):
    whole = run(tmp_path)
    [unit] = tmp_path.glob("*/apgd-ce-00000.safetensors")
    unit.write_bytes(unit.read_bytes()[:40])
    assert same(run(tmp_path), whole)
    [manifest] = tmp_path.glob("*/job.json")
    assert json.loads(manifest.read_text())["seed"] == 5


def test_leaves_the_model_and_the_random_state_as_they_were():
    model = nn.Sequential(Fragile(), nn.Identity()).train()
    model[0].norm.eval()
    model[0].head.b.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    x, y = images()
    model(x).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    with torch.no_grad():
        autoattack(model, x, y, Threat("linf", 0.02), batch=8, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == gradients.keys()
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("classes", [2, 3, 4, 12])
@pytest.mark.parametrize(("norm", "eps"), [("l2", 1.0), ("linf", 0.1)])
def test_any_number_of_classes_works(norm, eps, classes):
    model, x, y = job(8, (1, 6, 7), classes)  # grey, and not square
    found = autoattack(model, x, y, Threat(norm, eps), batch=7, seed=0)  # the last batch has one image
    assert torch.equal(found.robust, model(found.adversarial).argmax(1) == y)
    assert sum(found.broken_by.values()) > 0
    assert any("classes" in flag for flag in found.flags) == (classes < 4)


def test_levels_are_as_good_as_floats():
    model, x, y = job()
    levels = (x * 255).round().byte()
    one = autoattack(model, levels, y, THREAT, batch=4, seed=0)
    assert same(one, autoattack(model, levels.float() / 255, y, THREAT, batch=4, seed=0))
    assert one.adversarial.dtype == torch.float32


def test_eps_zero_is_clean_accuracy():
    found = run(threat=Threat("linf", 0))
    assert found.robust.tolist() == [False] * 3 + [True] * 11
    assert torch.equal(found.adversarial, job()[1])
    assert found.broken_by == dict.fromkeys(suite.STANDARD, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"attacks": ("apgd-ce", "fab")}, "name each of apgd-ce, apgd-t, fab-t, square once"),
        ({"attacks": ("square", "square")}, "once at most"),
        ({"batch": 0}, "in batches of 0"),
        ({"x": job()[1] * 255}, r"lie in \[0, 1\]"),
        ({"y": job()[2][:5]}, "14 images need as many class indices, not 5"),
        ({"model": lambda x: Tanh()(x), "state": Path("never")}, "give an nn.Module"),
    ],
)
def test_bad_arguments_are_refused(bad, message):
    model, x, y = job()
    with pytest.raises(ValueError, match=message):
        autoattack(**{"model": model, "x": x, "y": y, "threat": THREAT, "batch": 4, "seed": 0, **bad})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package pyautoattack: pip install 'arae\[eval\]'"):
        run()


class Around(nn.Module):
    """A sound model with something done to its images or its logits."""

    def __init__(self, after=lambda z: z, before=lambda x: x, classes: int = 4) -> None:
        super().__init__()
        self.inner, self.after, self.before = Tanh(classes=classes), after, before

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


DECEIVING = [
    (Around(lambda z: z + 0.1 * torch.randn_like(z)), "randomised model"),
    (Around(lambda z: z.softmax(1)), "probabilities, not logits"),
    (Around(lambda z: nn.functional.one_hot(z.argmax(1), 4).float()), "decisions"),
    (Around(lambda z: nn.functional.one_hot(z.argmax(1), 4).float()), NO_GRADIENT),
    (Around(lambda z: z.detach()), NO_GRADIENT),
    (Around(before=lambda x: (x * 8).round() / 8), "gradient exactly 0"),
    (Around(lambda z: 1e4 * z), "cross-entropy's gradient is exactly 0"),
    (Around(lambda z: -z + 2 * z.detach()), "at will leaves 100%"),
    (Around(before=lambda x: 1e-6 * x + 0.5), "at will leaves 100%"),
    (Around(lambda z: z / 0), "not finite"),
    (Around(classes=3), "3 classes"),
    (Void(1), "gradients of 32 of 32 images are not finite"),
]


@pytest.mark.parametrize(("model", "remark"), DECEIVING)
def test_a_model_that_deceives_is_remarked_on(model, remark):
    x, _ = images(32)
    found = checks(model, x, model(x).argmax(1), THREAT)
    assert any(remark in line for line in found), found
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize("threat", [THREAT, Threat("linf", 0.05), Threat("linf", 0)])
def test_a_sound_model_is_not_remarked_on(threat):
    x, _ = images(32)
    assert checks(Around(), x, Tanh()(x).argmax(1), threat) == []


def test_one_step_beating_many_is_remarked_on():
    class Walled(Tanh):
        """Its gradient points downhill but at the very images that it was given first."""

        clean: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            at_images = self.clean is not None and x.shape == self.clean.shape and torch.equal(x, self.clean)
            return logits if at_images or not x.requires_grad else 2 * logits.detach() - logits

    model = Walled()
    model.clean, _ = images(32)
    found = checks(model, model.clean, model(model.clean).argmax(1), THREAT)
    assert any("one step of the whole radius only" in line for line in found), found


@pytest.mark.parametrize(
    ("broken_by", "remarks"),
    [
        ({"apgd-ce": 9, "square": 3}, 1),
        ({"apgd-ce": 9, "square": 2}, 0),
        ({"apgd-ce": 900}, 0),
        ({"square": 900}, 0),
    ],
)
def test_square_ahead_of_gradients_is_remarked_on(broken_by, remarks):
    assert len(square_remark(broken_by, 1000)) == remarks


def test_without_gradients_only_square_runs():
    model, x, y = DECEIVING[4][0], *images(8)
    with pytest.raises(InputError, match="no gradient in the images"):
        autoattack(model, x, y, THREAT, batch=8, seed=0)
    assert NO_GRADIENT in autoattack(model, x, y, THREAT, batch=8, seed=0, attacks=("square",)).flags
