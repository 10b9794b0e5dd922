"""Memory as predicted, beside what PyTorch's allocator says of the same step when it really runs."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from training import tiny_recipe

from arae import footprint as footprints
from arae.config import Recipe
from arae.cost import Networks
from arae.footprint import evaluation_footprint, footprint, largest_fitting

CPU = torch.device("cpu")
SHAPE = (3, 32, 32)


def recipe(**changes: object) -> Recipe:
    return tiny_recipe(Path("nowhere.npz"), **({"data__size": 32} | changes))


def networks(made: Recipe) -> Networks:
    return Networks(made, SHAPE, 10)


def allocated(made: Recipe, stage: str) -> int:
    """The most bytes that PyTorch's allocator had given out at once, from before the networks to after two steps."""
    there = footprints.without_unused(networks(made), stage)  # what is there before is not seen: it is counted by hand
    used = [there.encoder, there.decoder, there.discriminator]
    before = sum(t.untyped_storage().nbytes() for one in used if one for t in (*one.parameters(), *one.buffers()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        footprints.one_step(there, stage)
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return before + max(accumulate(e.nbytes() for e in events))


RESNET: dict[str, object] = {"encoder__name": "resnet18-cifar", "encoder__layer": "layer4", "encoder__width": 0.125}
CASES: list[tuple[str, dict[str, object]]] = [
    ("encoder", {}),
    ("encoder", {"precision": "bf16", "encoder__micro_batch": 32}),
    ("encoder", RESNET),
    ("encoder", {"encoder__objective": {"kind": "trades"}, "encoder__label_smoothing": 0.0}),
    ("encoder", {"encoder__attack": {"norm": None, "eps": 0.0}}),
    ("encoder", {"encoder__replays": 3, "encoder__attack.steps": 1}),
    ("encoder", {"encoder__noise": 1.0, "encoder__attack": {"norm": "linf", "eps": 0.1, "steps": 1}}),
    ("encoder", {"encoder__batch": 64, "encoder__micro_batch": 8}),
    ("decoder", {"decoder__batch": 64, "decoder__micro_batch": 8}),
    ("decoder", {}),
    ("decoder", {"decoder__micro_batch": 32, "precision": "bf16"}),
    ("decoder", {"decoder__losses": {"pixel": 1.0}}),
]


@pytest.mark.parametrize(("stage", "changes"), CASES)
def test_the_peak_is_the_allocators_but_for_what_kernels_take(stage: str, changes: dict[str, object]) -> None:
    """oneDNN's scratch pads are not predicted; of what is, all is really there."""
    changes = {f"{stage}__batch": 64, f"{stage}__micro_batch": 32} | changes
    made = recipe(**changes)
    said = sum(footprint(networks(made), stage, CPU).values())
    really = allocated(made, stage)
    assert 0.8 * really < said < 1.02 * really


def test_what_stays_and_what_grows() -> None:
    def of(micro: int, workers: int = 1, stage: str = "encoder") -> dict[str, int]:
        changed: dict[str, object] = {f"{stage}__batch": 64, f"{stage}__micro_batch": micro}
        return footprint(networks(recipe(**changed)), stage, CPU, workers)

    eight, half, whole = of(8), of(32), of(64)
    stays = ("weights", "gradients", "optimiser", "average", "copy to attack")
    for name in stays:
        assert eight[name] == half[name] == whole[name]
    assert eight["weights"] == eight["gradients"] == eight["optimiser"] == eight["average"]
    assert eight["activations"] < half["activations"] < whole["activations"]
    # A decoder's worker holds the codes of all its micro-batches.
    assert of(8, 4, "decoder")["activations"] < of(8, 1, "decoder")["activations"]


def test_what_depends_on_the_images_is_left_out() -> None:
    phases = [{"until": 0.5, "scale": 0.5}]
    wild = recipe(encoder__early_stop=1, encoder__radius_warmup=0.5, encoder__phases=phases)
    again = {"norm": "l2", "eps": 0.5, "steps": 2, "random_start": True, "restarts": 3}
    assert footprint(networks(recipe(encoder__attack=again)), "encoder", CPU)
    assert footprint(networks(wild), "encoder", CPU) == footprint(networks(recipe()), "encoder", CPU)


def test_evaluation_holds_the_weights_and_a_batch() -> None:
    made = recipe(evaluate__batch=50)
    held = evaluation_footprint(networks(made), CPU)
    more = evaluation_footprint(networks(made.replace({"evaluate.batch": 100})), CPU)
    assert held["weights"] == more["weights"]
    assert more["activations"] == pytest.approx(2 * held["activations"], rel=0.05)
    without = made.replace({"evaluate.attacks": []})
    assert evaluation_footprint(networks(without), CPU)["activations"] < held["activations"]


def test_the_largest_micro_batch_is_the_largest_that_fits() -> None:
    eight, whole = recipe(encoder__micro_batch=8), networks(recipe())
    there = sum(footprint(networks(eight), "encoder", CPU).values())
    assert largest_fitting(whole, "encoder", CPU, there) == 8
    assert largest_fitting(whole, "encoder", CPU, there, below=2) == 1
    assert largest_fitting(whole, "encoder", CPU, 1000) is None


def test_the_networks_and_the_random_state_stay_as_they_are() -> None:
    there, state = networks(recipe()), torch.get_rng_state()
    assert there.decoder is not None
    before = {k: v.clone() for k, v in there.decoder.state_dict().items()}
    footprint(there, "decoder", CPU)
    assert torch.equal(torch.get_rng_state(), state)
    after = there.decoder.state_dict()
    assert all(torch.equal(after[k], v) and after[k].device.type == "cpu" for k, v in before.items())
