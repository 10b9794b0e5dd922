import dataclasses

import pytest
import torch
from torch import nn

from arae import plan as planning
from arae.config import Attack, Recipe, load_recipe
from arae.cost import Networks, Passes, attack_flops, passes
from arae.errors import InputError
from arae.footprint import footprint
from arae.plan import binary, duration, plan, plan_recipe, si

CPU = torch.device("cpu")
SHAPE = (1, 28, 28)


@pytest.fixture(autouse=True)
def _fixed_speed(request, monkeypatch):
    """In place of the clock's, but in the last test: 1,000 inputs a second through any network."""
    if request.function is not test_speed_is_measured_and_the_threads_put_back:
        monkeypatch.setattr(planning, "measured", lambda *_: 1000.0)


@pytest.fixture(autouse=True)
def _memory_where_it_is_looked_at(request, monkeypatch):
    """Elsewhere a byte: each plan's three dry runs take seconds, and tests/test_footprint.py is about them."""
    if request.function is not test_memory_and_disk_by_hand:
        for name in ("footprint", "evaluation_footprint"):
            monkeypatch.setattr(planning, name, lambda *_: {"weights": 1})


def recipe(**changes) -> Recipe:
    document = {
        "name": "planned",
        "precision": "fp32",
        "data": {"name": "fashion-mnist"},
        "encoder": {"name": "small-cnn", "epochs": 2, "batch": 100, "attack": {"norm": "l2", "eps": 1.5, "steps": 7}},
        "decoder": {"name": "mirror", "steps": 30, "batch": 50, "losses": {"feature": 1.0, "adversarial": 1.0}},
        "evaluate": {"n": 500, "attacks": [{"norm": "l2", "eps": 1.5, "steps": 10}]},
    }
    return Recipe.model_validate(document).replace(changes)


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks(recipe(), SHAPE, 10)


def test_flops_of_a_convolution_by_hand():
    """3×3, 2 -> 5 channels, 8×8 outputs: 2 · 5 · 2 · 9 · 64; a gradient of input or weights costs as much again."""
    forward = 2 * 5 * 2 * 9 * 64
    counted = passes(nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU()), (2, 8, 8))
    assert counted == Passes(forward, 2 * forward, 2 * forward)


def test_flops_of_two_layers_by_hand():
    """The first layer needs no input gradient for the weights' sake, the second does."""
    first, second = 2 * 12 * 20, 2 * 20 * 3
    counted = passes(nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.Linear(20, 3)), (3, 2, 2))
    assert counted == Passes(first + second, 2 * (first + second), 2 * first + 3 * second)


@pytest.mark.parametrize(
    ("attack", "flops"),
    [
        (Attack(), 0),
        (Attack(norm="l2", eps=0.0, steps=7), 0),
        (Attack(norm="l2", eps=1.0, steps=7), 7 * 25),
        (Attack(norm="linf", eps=0.1, steps=50, restarts=5), 5 * (50 * 25 + 10)),
        (Attack(kind="cascade", norm="l2", eps=1.0, steps=20), 10 * 21 * 25),
    ],
)
def test_flops_of_an_attack(attack, flops):
    assert attack_flops(Passes(forward=10, to_input=25, to_weights=30), attack) == flops


def test_an_attacked_step_costs_its_steps_more(networks):
    forward, to_input, to_weights = dataclasses.astuple(networks.classify)
    assert networks.encoder_step(Attack()) == to_weights
    assert networks.encoder_step(Attack(norm="l2", eps=1, steps=7)) == 7 * to_input + to_weights
    assert forward < to_input < to_weights * 1.5 < 5 * forward


def test_each_loss_adds_its_passes(networks):
    def step(feature, adversarial, micros=1):
        changed = recipe(**{"decoder.losses.feature": feature, "decoder.losses.adversarial": adversarial})
        other = Networks(changed, SHAPE, 10)
        other.__dict__ |= {k: getattr(networks, k) for k in ("classify", "tap", "generate", "judge", "judge_both")}
        return other.decoder_step(micros)

    alone = networks.tap.forward + networks.generate.to_weights
    gan = networks.judge_both.to_weights + networks.judge.to_input
    assert step(0.0, 0.0) == step(0.0, 0.0, micros=2) == alone
    assert step(1.0, 0.0) == alone + networks.tap.to_input
    assert step(0.0, 1.0) == alone + gan
    assert step(0.0, 1.0, micros=2) == alone + gan + networks.generate.forward


def test_the_discriminator_reads_the_features_once_for_both_images(networks):
    assert networks.judge.forward < networks.judge_both.forward < 2 * networks.judge.forward


def test_the_networks_are_left_as_they_were():
    networks = Networks(recipe(), SHAPE, 10)
    assert networks.decoder is not None
    footprint(networks, "decoder", CPU)
    for network in (networks.encoder, networks.decoder):
        assert all(p.requires_grad and p.device.type == "cpu" for p in network.parameters())


def test_the_planned_authors_networks_have_their_known_sizes():
    changes = {"encoder.name": "alexnet", "encoder.layer": "conv5", "decoder.name": "alexnet-conv5"}
    networks = Networks(recipe(**changes), (3, 224, 224), 1000)
    sizes = {n.role: n.parameters for n in networks.listed()}
    assert sizes == {"encoder": 61_100_840, "decoder": 4_753_370, "discriminator": 11_372_353}
    gflop = {n.role: n.flops / 1e9 for n in networks.listed()}
    assert gflop == {k: pytest.approx(v, rel=0.01) for k, v in
                     {"encoder": 1.43, "decoder": 1.87, "discriminator": 0.86}.items()}  # fmt: skip


def test_images_and_hours_of_each_stage(networks):
    made = plan(recipe(), 12_345, SHAPE, 10, 1, CPU, n_test=500)
    encoder, decoder, evaluation = made.stages
    assert [s.name for s in made.stages] == ["encoder, ε = 1.5", "decoder, ε = 1.5", "evaluation, ε = 1.5"]
    assert [s.images for s in made.stages] == [247 * 100, 30 * 50, 500]  # 2 epochs of 12,345 in batches of 100
    speed = 1000.0 * networks.classify.to_weights
    assert encoder.per_second == pytest.approx(speed / networks.encoder_step(recipe().encoder.attack))
    assert evaluation.per_second == pytest.approx(speed / networks.evaluation())
    assert decoder.per_second == pytest.approx(1000 * networks.generate.to_weights / networks.decoder_step(1))
    assert made.hours == pytest.approx(sum(s.images / s.per_second for s in made.stages) / 3600)


def test_workers_share_training_and_not_evaluation():
    changes = {"encoder.micro_batch": 25, "decoder.micro_batch": 25}
    one, two = (plan(recipe(**changes), 1000, SHAPE, 10, n, CPU, n_test=100).stages for n in (1, 2))
    assert two[0].per_second == pytest.approx(2 * one[0].per_second)
    assert two[1].per_second > 2 * one[1].per_second  # one micro-batch a worker: the reconstruction is made once
    assert two[2].per_second == pytest.approx(one[2].per_second)


def test_a_map_plans_each_radius():
    made = plan(recipe(map={"radii": [0, 0.5, 1.5]}), 1000, SHAPE, 10, 1, CPU)
    assert [s.name for s in made.stages] == [
        f"{s}, ε = {e}" for e in ("0", "0.5", "1.5") for s in ("encoder", "decoder")
    ]
    standard, half, full = (s.flops for s in made.stages if s.name.startswith("encoder"))
    assert standard < half == full


def test_memory_and_disk_by_hand():
    changed = recipe(**{"encoder.ema": 0.9, "state.keep": 3})
    made = plan(changed, 1000, SHAPE, 10, 1, CPU)
    networks = {n.role: n.parameters for n in made.networks}
    encoder, decoder = made.stages
    weights = 4 * networks["encoder"]
    stays = dict.fromkeys(("weights", "gradients", "optimiser", "average"), weights)
    assert encoder.memory.items() >= (stays | {"images": 1000 * 28 * 28}).items()
    assert encoder.memory["activations"] > 100 * 28 * 28 * 4
    trained = 4 * (networks["decoder"] + networks["discriminator"])
    assert decoder.memory["optimiser"] == pytest.approx(2 * trained, rel=0.001)  # and the count of steps
    assert decoder.memory["weights"] == trained + weights
    states = {"states (3 kept, the best, a new one)": 5 * 3 * trained}
    assert made.disk == states | {"model": weights + 4 * networks["decoder"]}


@pytest.mark.parametrize(
    ("changes", "n", "held"),
    [
        ({}, 1000, True),
        ({}, 4_000_000, False),  # more than `auto` holds
        ({"data.loader": "resident"}, 4_000_000, True),
        ({"data.loader": "ffcv"}, 1000, False),
        ({"data.augment": ["crop"]}, 1000, False),
    ],
)
def test_images_count_where_they_are_resident(changes, n, held):
    made = plan(recipe(**changes), n, SHAPE, 10, 1, CPU)
    assert ("images" in made.stages[0].memory) == held


def test_workers_that_cannot_share_a_batch_are_refused():
    with pytest.raises(InputError, match=r"encoder: 1 micro-batches .* encoder\.micro_batch"):
        plan(recipe(), 1000, SHAPE, 10, 2, CPU)


def test_a_plan_before_encoding_takes_the_catalogues_counts():
    made = plan_recipe(recipe(**{"evaluate.n": None, "data.limit": 5000}), 1, CPU)
    assert [s.images for s in made.stages] == [2 * 5000, 30 * 50, 10_000]
    assert "fashion-mnist as the catalogue has it" in made.assumptions[0]


def test_a_folder_of_ones_own_must_be_encoded_first():
    with pytest.raises(InputError, match=r"data\.train: .*arae encode"):
        plan_recipe(recipe(**{"data.name": "images", "data.source": "/nowhere"}), 1, CPU)


def test_an_encoder_alone_is_planned():
    made = plan(recipe(decoder=None), 1000, SHAPE, 10, 1, CPU)
    assert [s.name for s in made.stages] == ["encoder, ε = 1.5"]
    assert [n.role for n in made.networks] == ["encoder"]


def test_lines_show_every_network_stage_and_assumption():
    made = plan(recipe(), 1000, SHAPE, 10, 1, CPU, n_test=100)
    lines = made.lines()
    text = "\n".join(lines)
    for stage in made.stages:
        assert any(line.startswith(stage.name) and f"{stage.images:,}" in line for line in lines)
    for network in made.networks:
        assert f"{network.parameters:,}" in text
    assert all(f"- {a}" in lines for a in made.assumptions)
    assert "measured now on this CPU" in text


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (si(0), "0"), (si(999), "999"), (si(1_234_567), "1.23 M"), (si(16.4e9), "16.4 G"), (si(2.8e18), "2.8e+03 P"),
        (binary(512), "512 B"), (binary(1.5 * 2**20), "1.5 MiB"), (binary(80 * 2**30), "80 GiB"),
        (duration(20 / 3600), "20 s"), (duration(0.5), "30 min"), (duration(5), "5.0 h"), (duration(96), "4.0 days"),
    ],
)  # fmt: skip
def test_units(shown, text):
    assert shown == text


def test_speed_is_measured_and_the_threads_put_back():
    before = torch.get_num_threads()
    made = plan(load_recipe("demo").replace({"map": None}), 1000, SHAPE, 10, 1, CPU)
    assert torch.get_num_threads() == before
    assert all(1 < s.per_second < 1e7 for s in made.stages)
