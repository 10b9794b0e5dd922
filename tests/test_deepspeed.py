"""DeepSpeed's engine in a group of one, where every stage of ZeRO computes what plain PyTorch does, bit for bit."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import CPU, copied, differences, engine, gan_trainer, micros, trained, zero

from arae.config import EngineChoice
from arae.errors import InputError
from arae.train import zero_setup
from arae.train.engine import Engine, check_share

CHOICES = [zero(0), zero(1), zero(2), zero(3), zero(2, offload=True)]
HALF, STEPS = 1, 3
# Losses that overflow float16 at the first scales, so that steps are left out.
STEEP = {"decoder__losses": {"pixel": 3000.0, "feature": 1.0, "adversarial": 100.0, "discriminator": 100.0}}


def named(choice: object) -> str:
    if isinstance(choice, EngineChoice):
        return f"stage {choice.stage}" + " offloaded" * choice.offload
    return str(choice)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where anything compiled would be left; a group of one, and the environment, are put back at the end."""
    before, folder = dict(os.environ), tmp_path_factory.mktemp("compiled")
    os.environ["TORCH_EXTENSIONS_DIR"] = os.fspath(folder)
    yield folder
    zero_setup.leave_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of both in one memory order, for another rounds otherwise; stage 3 in pieces down to the last bias."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setattr(Engine, "place", lambda self, module: module)
    monkeypatch.setattr(zero_setup, "PERSISTENT", 0)
    torch.set_num_threads(1)


PLAIN: dict[Any, Any] = {}


def plain(steps: int, dtype: torch.dtype = torch.float32, **overrides: object) -> Any:
    """The state that plain PyTorch is in after some steps; made once."""
    key = steps, dtype
    if key not in PLAIN:
        trainer = gan_trainer(engine(dtype=dtype), **overrides)
        losses = trained(trainer, 0, steps)
        assert len(set(losses)) == steps  # something is learnt
        PLAIN[key] = copied(trainer.state())
    return copied(PLAIN[key])


@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_trains_as_plain_pytorch_and_their_states_are_each_others(choice: EngineChoice) -> None:
    trainer = gan_trainer(engine(choice))
    trained(trainer, 0, HALF)
    assert differences(trainer.state(), plain(HALF)) == []
    other = gan_trainer(engine())
    other.restore(trainer.state())
    trained(other, HALF, STEPS)
    assert differences(other.state(), plain(STEPS)) == [], "plain PyTorch does not go on from it"
    trained(trainer, HALF, STEPS)
    assert differences(trainer.state(), plain(STEPS)) == []

    fresh = gan_trainer(engine(choice))
    for before in ("a step", "going back"):
        fresh.restore(plain(HALF))
        assert differences(fresh.state(), plain(HALF)) == [], before
        trained(fresh, HALF, STEPS)
        assert differences(fresh.state(), plain(STEPS)) == [], before


@pytest.mark.parametrize("choice", [zero(0), zero(2)], ids=named)
def test_float16_scales_losses_and_leaves_out_the_same_steps(choice: EngineChoice) -> None:
    half, expected = torch.float16, plain(STEPS, torch.float16, **STEEP)
    assert expected["scaler"]["scale"] < 2**16, "no step was left out"
    trainer = gan_trainer(engine(choice, half), **STEEP)
    trained(trainer, 0, STEPS)
    assert differences(trainer.state(), expected) == []


@pytest.mark.parametrize("choice", [zero(1), zero(3)], ids=named)
def test_gradients_that_are_not_finite_show_in_the_next_loss(choice: EngineChoice) -> None:
    """ZeRO would leave the step out and say nothing."""
    trainer = gan_trainer(engine(choice))
    trainer.learner.start(1e-3)
    [micro, *_] = micros(trainer, 0)
    codes = trainer._encode(micro.images)
    trainer.learner.backward(trainer._reconstruct(codes.decoded).sum() * torch.inf, last=True)
    trainer.learner.update()
    assert not trainer._reconstruct(codes.decoded).isfinite().any()
    assert not any(value.isfinite().any() for value in trainer.state()["generator"].values() if value.dim())
    trainer.restore(plain(HALF))
    assert trainer._reconstruct(codes.decoded).isfinite().all()


def test_default_clipping_would_train_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above can fail: by what DeepSpeed does where it is not told otherwise."""
    ours = zero_setup.configuration

    def theirs(choice: EngineChoice) -> dict[str, Any]:
        return {key: value for key, value in ours(choice).items() if key != "gradient_clipping"}

    monkeypatch.setattr("arae.train.zero.configuration", theirs)
    trainer = gan_trainer(engine(zero(1)), **STEEP)
    trained(trainer, 0, STEPS)
    assert differences(trainer.state()["generator"], plain(STEPS)["generator"], bound=1e-2)


def test_a_naive_generator_step_would_train_another_discriminator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the loop one would write first, which leaves the discriminator's weights their gradients."""
    trainer = gan_trainer(engine(zero(1)))
    assert trainer.discriminator is not None
    monkeypatch.setattr(type(trainer.discriminator), "requires_grad_", lambda self, *_: self)
    trained(trainer, 0, STEPS)
    assert differences(trainer.state()["discriminator"], plain(STEPS)["discriminator"], bound=1e-2)


def test_all_weights_are_there_within_whole(compiled: Path) -> None:
    trainer = gan_trainer(engine(zero(3)))
    weights = dict(trainer.generator.named_parameters())
    assert not any(weight.numel() for weight in weights.values())
    code = trainer._encode(micros(trainer, 0)[0].images).decoded
    with trainer.learner.whole(), trainer.learner.whole():
        assert all(weight.shape == trainer.average.shadow[name].shape for name, weight in weights.items())
        first, again = trainer.generator(code), trainer.generator(code)
        assert torch.equal(first, again)
        assert all(weight.numel() for weight in weights.values())
    assert not any(weight.numel() for weight in weights.values())
    assert not any(compiled.iterdir()), "something was compiled"


@pytest.mark.parametrize(
    ("micro_batches", "workers", "choice", "right"),
    [(3, 2, zero(2), False), (3, 2, zero(3), False), (3, 2, zero(1), True), (3, 2, None, True), (4, 2, zero(3), True)],
    ids=named,
)
def test_shares_are_even_where_workers_meet_in_every_micro_batch(
    micro_batches: int, workers: int, choice: EngineChoice | None, right: bool
) -> None:
    if right:
        check_share(micro_batches, workers, "decoder", choice)
    else:
        with pytest.raises(InputError, match=r"evenly; set decoder\.micro_batch .* multiple of 2"):
            check_share(micro_batches, workers, "decoder", choice)


def test_what_deepspeed_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="precision = fp64"):
        gan_trainer(Engine(CPU, "fp64", zero(1)))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"pip install 'arae\[deepspeed\]'"):
        gan_trainer(engine(zero(1)))
