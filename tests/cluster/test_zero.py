"""DeepSpeed's engine on several workers: the training of one that has plain PyTorch, and states that go on anywhere.

With one micro-batch a worker, two workers add the same two gradients that one process does: every stage of ZeRO must
then agree with plain PyTorch bit for bit, however long (here: 50 steps). With more workers, or more micro-batches on
each, sums are rounded in another order. Stages 0 and 1 add up as DistributedDataParallel does, and agree with that bit
for bit; 2 and 3 add up over the workers before they add up over micro-batches. The difference grows as it does where
one plain process takes its micro-batches in reverse: 2e-5 in a few steps of the GAN, anything in twenty of the encoder,
whose attack and batch norm amplify the last bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_npz
from groups import spawn, tensors, train_on
from sharded import MAKE, copied, differences, engine, gan_trainer, micros, trained, zero
from training import tiny_recipe

from arae.config import EngineChoice
from arae.train import zero_setup
from arae.train.engine import Engine

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

HALF, MOVED, STEPS = 10, 19, 50
FEW = 4  # where rounding differs
STAGES = (0, 1, 2, 3)
NETWORK: dict[str, dict[str, object]] = {
    "encoder": {"encoder__name": "resnet18-cifar", "encoder__lr": 0.01},
    "gan": {},
}
ONE_EACH: dict[str, dict[str, object]] = {"encoder": {"encoder__batch": 16}, "gan": {"decoder__batch": 16}}
ENGINES = {
    "stage 0": zero(0),
    "stage 1": zero(1),
    "stage 2": zero(2),
    "stage 3": zero(3),
    "stage 3, offloaded": zero(3, offload=True),
}
SMOOTH: dict[str, object] = {"decoder__betas": [0.9, 0.999]}
BATCHES = {"four": 32, "three": 24}
"""Images of a batch that is that many micro-batches."""
BOUND = 1e-3
"""Of a tensor's largest entry, for what differs by rounding."""


def keep(path: Path, found: Any) -> None:
    """What rank 0 found; states are made by all."""
    if torch.distributed.get_rank() == 0:
        torch.save(found, path)


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def generators(state: dict[str, Any]) -> dict[str, Any]:
    return {part: state[part] for part in ("generator", "discriminator")}


def alike() -> pytest.MonkeyPatch:
    """Weights in plain memory order also in plain PyTorch, for kernels of another round otherwise; even the smallest
    shared out at stage 3."""
    patch = pytest.MonkeyPatch()
    patch.setattr(Engine, "place", lambda self, module: module)
    patch.setattr(zero_setup, "PERSISTENT", 0)
    return patch


# --- what the groups do -------------------------------------------------------------------------------------------


def two_workers(rank: int, folder: Path) -> None:
    alike()
    for kind, make in MAKE.items():
        for name, choice in ENGINES.items():
            trainer = make(engine(choice), **NETWORK[kind], **ONE_EACH[kind])
            losses = trained(trainer, 0, STEPS)
            keep(folder / f"{kind} {name}", (losses, trainer.state()))
    for name, batch in BATCHES.items():
        for stage in (None, 0, 1, 2, 3) if name == "four" else (None, 0, 1):
            trainer = gan_trainer(engine(None if stage is None else zero(stage)), **SMOOTH, decoder__batch=batch)
            trained(trainer, 0, FEW)
            keep(folder / f"{name} {stage}", trainer.state())
    _moves(folder)
    _alone(folder)


def _moves(folder: Path) -> None:
    """From one plain process to stage 3, to stage 1, to two plain workers; some steps in each."""
    state = read(folder / "gan half")
    for i, choice in enumerate((zero(3), zero(1), EngineChoice())):
        trainer = gan_trainer(engine(choice), **ONE_EACH["gan"])
        trainer.restore(copied(state))
        assert differences(trainer.state(), state) == [], f"move {i} changes the state"
        trained(trainer, HALF + 3 * i, HALF + 3 * (i + 1))
        state = copied(trainer.state())
    keep(folder / "moved", state)


def _alone(folder: Path) -> None:
    """Rank 0 runs a network of stage 3 while the other waits, as when it looks at held-out images."""
    trainer = gan_trainer(engine(zero(3)))
    trained(trainer, 0, 1)
    images = []
    with trainer.learner.whole():
        if torch.distributed.get_rank() == 0:
            trainer.generator.eval()
            with torch.no_grad():
                code = trainer._encode(micros(trainer, 0)[0].images).decoded
                images = [trainer.generator(code) for _ in range(2)]
        torch.distributed.barrier()
    trained(trainer, 1, 2)
    keep(folder / "alone", images)


def every_stage(rank: int, folder: Path, name: str) -> None:
    alike()
    for stage in STAGES:
        trainer = gan_trainer(engine(zero(stage)), **SMOOTH)
        losses = trained(trainer, 0, FEW)
        keep(folder / f"{name} {stage}", (losses, trainer.state()))


# --- the comparisons ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain PyTorch computes in one process, and what two and four workers do under DeepSpeed."""
    made = tmp_path_factory.mktemp("sharded")
    torch.set_num_threads(1)
    patch = alike()
    for kind, make in MAKE.items():
        trainer = make(engine(), **NETWORK[kind], **ONE_EACH[kind])
        losses = trained(trainer, 0, HALF)
        torch.save(copied(trainer.state()), made / f"{kind} half")
        losses += trained(trainer, HALF, MOVED)
        torch.save(copied(trainer.state()), made / f"{kind} moved")
        losses += trained(trainer, MOVED, STEPS)
        torch.save((losses, trainer.state()), made / f"{kind} plain")
    losses = trained(trainer := gan_trainer(engine(), **SMOOTH), 0, FEW)
    torch.save((losses, copied(trainer.state())), made / "four plain")
    trained(trainer, FEW, 2 * FEW)
    torch.save(trainer.state(), made / "four plain later")
    patch.undo()
    spawn(2, made, two_workers, made)
    spawn(4, made, every_stage, made, "four workers")
    spawn(1, made, every_stage, made, "one worker")
    return made


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ENGINES)
def test_two_workers_train_as_plain_pytorch_bit_for_bit(folder: Path, kind: str, name: str) -> None:
    losses, state = read(folder / f"{kind} {name}")
    expected, plain = read(folder / f"{kind} plain")
    assert len(set(expected)) == STEPS, "the losses do not move"
    assert losses == expected
    assert differences(state, plain) == []


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("stage", [0, 1])
def test_stages_that_add_up_as_ddp_does_agree_with_it_bit_for_bit(folder: Path, name: str, stage: int) -> None:
    """Also where three micro-batches are shared out among two workers."""
    assert differences(read(folder / f"{name} {stage}"), read(folder / f"{name} None")) == []


@pytest.mark.parametrize("workers", ["one worker", "four workers"])
@pytest.mark.parametrize("stage", STAGES)
def test_one_and_four_workers_agree_to_rounding(folder: Path, stage: int, workers: str) -> None:
    losses, state = read(folder / f"{workers} {stage}")
    expected, plain = read(folder / "four plain")
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(losses)) == FEW
    assert differences(generators(state), generators(plain), BOUND) == []


@pytest.mark.parametrize("stage", STAGES)
def test_two_micro_batches_a_worker_agree_to_rounding(folder: Path, stage: int) -> None:
    _, plain = read(folder / "four plain")
    assert differences(generators(read(folder / f"four {stage}")), generators(plain), BOUND) == []


def test_a_state_moves_between_engines_and_numbers_of_workers(folder: Path) -> None:
    """Through stage 3 and stage 1 on two workers to plain PyTorch on two: as if it had stayed in one process."""
    assert differences(read(folder / "moved"), read(folder / "gan moved")) == []


def test_a_state_of_stage_2_on_four_workers_goes_on_in_one_plain_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "place", lambda self, module: module)
    trainer = gan_trainer(engine(), **SMOOTH)
    trainer.restore(read(folder / "four workers 2")[1])
    trained(trainer, FEW, 2 * FEW)
    assert differences(generators(trainer.state()), generators(read(folder / "four plain later")), BOUND) == []


def test_one_worker_may_run_a_whole_network_of_stage_3(folder: Path) -> None:
    first, again = read(folder / "alone")
    assert torch.equal(first, again)
    assert first.isfinite().all()


def test_a_run_goes_through_both_stages_shared_out_and_ends_in_one_plain_process(tmp_path: Path) -> None:
    """With all that a run does beside training: looks at held-out images, states, the exported encoder."""
    recipe = tiny_recipe(make_tiny_npz(tmp_path), **SMOOTH)
    shared = recipe.replace({"engine": {"kind": "deepspeed", "stage": 3}})
    plain = train_on(1, recipe, tmp_path / "plain")
    moved = train_on(2, shared, tmp_path / "moved", steps=10)  # of the 7 and 7
    assert (moved.model / "encoder.safetensors").is_file()
    assert not (moved.model / "decoder.safetensors").is_file(), "it was to be stopped in the decoder's stage"
    train_on(1, recipe, tmp_path / "moved")
    assert "resumed the decoder" in moved.log.read_text()
    assert (
        differences(tensors(moved), tensors(plain), 1e-3) == []
    )  # other kernels: DeepSpeed's weights are not channels-last
