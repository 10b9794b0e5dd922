"""What a sweep will take: counted as brute force counts it, priced as `arae plan` prices a trip."""

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from training import tiny_recipe

from arae import plan as planning
from arae.config import Recipe, dump_recipe, load_recipe
from arae.cost import Networks, parameters
from arae.errors import InputError
from arae.launch import Where
from arae.plan import plan
from tune import costs, counting
from tune.counting import kept
from tune.journal import Journal
from tune.plan import SweepPlan, plan_sweep, write_plan
from tune.results import PLAN
from tune.search import Points
from tune.settings import EarlyStop
from tune.space import Space, load_space, shipped_spaces
from tune.store import Stage, stages_of

CPU, N, SHAPE = Where(device="cpu"), 96, (3, 16, 16)
FIRST: dict[tuple[object, ...], str] = {}
EPS, STEPS, FEATURE = "encoder.attack.eps", "encoder.attack.steps", "decoder.losses.feature"
LOSS = {
    "grid": {
        "pixel": {FEATURE: 0, "decoder.losses.adversarial": 0},
        "all": {FEATURE: 0.1, "decoder.losses.adversarial": 0.05},
    }
}
GRIDS: dict[str, dict[str, Any]] = {
    "one point": {EPS: {"grid": [0.5]}},
    "radius and losses": {EPS: {"grid": [0, 0.5]}, "loss": LOSS},
    "layers": {"encoder.layer": {"grid": ["conv2", "conv3", "conv4"]}, EPS: {"grid": [0, 0.5]}},
    "seeds share nothing": {"seed": {"grid": [1, 2, 3]}},
    "steps of an attack of radius 0": {EPS: {"grid": [0]}, STEPS: {"grid": [1, 7]}},
    "a condition": {"loss": LOSS, "decoder.lr": {"grid": [1e-3, 1e-4], "when": {"loss": "all"}}},
    "evaluation alone": {"evaluate.batch": {"grid": [16, 32]}},
    "widths": {"encoder.width": {"grid": [0.5, 1]}},
}
DRAWN = {EPS: {"grid": [0, 0.5]}, FEATURE: {"log-uniform": [1e-4, 1e-1]}, "seed": {"choice": [1, 2]}}


@cache
def counted_once(part: tuple[object, ...], losses: tuple[bool, bool] | None, document: str) -> Networks:
    return Networks(Recipe.model_validate_json(document), SHAPE, 3)


def networks_of(recipe: Recipe, *_: object) -> Networks:
    """The networks, whose passes take a while to count, once for all tests."""
    part, decoder, losses = recipe.encoder, recipe.decoder, None
    if decoder is not None:
        losses = decoder.losses.feature > 0, decoder.losses.adversarial > 0
    key = part.name, part.width, part.layer
    if (key, losses) not in FIRST:
        FIRST[key, losses] = recipe.model_dump_json()
    found = counted_once(key, losses, FIRST[key, losses])
    found.recipe = recipe
    return found


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of the clock's: 1,000 inputs a second through any network; which were asked for, by size."""
    monkeypatch.setattr(costs, "Networks", networks_of)
    asked: list[int] = []
    monkeypatch.setattr(planning, "measured", lambda network, *_: asked.append(parameters(network)) or 1000.0)
    return asked


@pytest.fixture
def recipe(tiny_npz: Path) -> Recipe:
    return tiny_recipe(tiny_npz, name="sweep")


def space(axes: dict[str, Any], **search: Any) -> Space:
    return Space.model_validate({"axes": axes, "search": search})


def each(made: Space, recipe: Recipe) -> list[Recipe]:
    return [made.recipe(recipe, point) for point in made.points(made.search.samples, made.search.seed)]


def distinct(recipes: list[Recipe]) -> dict[str, dict[str, Stage]]:
    """By brute force: the stages of all, by kind and key."""
    found: dict[str, dict[str, Stage]] = {"encoder": {}, "decoder": {}}
    for one in recipes:
        for stage in stages_of(one):
            found[stage.name][stage.key] = stage
    return found


def hours(recipe: Recipe, name: str) -> float:
    """Of a device, for one stage: its images, at what an image costs, at 1,000 a second forward and backward."""
    networks = networks_of(recipe)
    if name == "encoder":
        part, flops, speed = recipe.encoder, networks.encoder_step(recipe.encoder.attack), networks.classify.to_weights
    else:
        assert recipe.decoder is not None
        part, flops, speed = recipe.decoder, networks.decoder_step(2), networks.generate.to_weights
    return part.total_steps(N) * part.batch * flops / (1000 * speed) / 3600


def rows(made: SweepPlan) -> dict[str, counting.Row]:
    return {row.name: row for row in made.rows}


@pytest.mark.parametrize("name", GRIDS)
def test_stages_are_those_that_brute_force_finds_and_cost_what_their_trips_cost(name: str, recipe: Recipe) -> None:
    made = space(GRIDS[name])
    trips = each(made, recipe)
    planned = plan_sweep(recipe, made, CPU)
    document, stages = planned.document(), distinct(trips)
    assert document["trials"] == len({trip.digest for trip in trips})
    assert document["stages"] == {kind: len(found) for kind, found in stages.items()}
    for kind, found in stages.items():
        row = rows(planned)[kind]
        assert row.needed == document["trials"]
        assert row.hours == pytest.approx(sum(hours(stage.recipe, kind) for stage in found.values()))
    evaluation = rows(planned)["evaluation"]
    alone = sum(hours(trip, kind) for trip in trips for kind in stages)
    assert document["gpu_hours_alone"] > alone
    assert document["gpu_hours"] == pytest.approx(sum(row.hours for row in planned.rows))
    if evaluation.distinct == evaluation.needed:
        assert document["gpu_hours_alone"] == pytest.approx(alone + evaluation.hours)
    assert document["gpu_hours"] <= document["gpu_hours_alone"] * (1 + 1e-9)


def test_one_trial_is_the_trip_that_arae_plans(recipe: Recipe) -> None:
    made = plan_sweep(recipe, space({EPS: {"grid": [0.5]}}), CPU)
    trip = plan(recipe, N, SHAPE, 3, 1, torch.device("cpu"))
    assert [row.hours for row in made.rows][:2] == pytest.approx([stage.hours for stage in trip.stages])


def test_what_shares_nothing_costs_the_same_alone(recipe: Recipe) -> None:
    made = plan_sweep(recipe, space({"seed": {"grid": [1, 2, 3]}}), CPU)
    assert made.hours == pytest.approx(made.hours_alone)
    assert "sharing saves 0%" in "\n".join(made.lines())


def test_what_is_measured_of_each_stage_by_hand(recipe: Recipe) -> None:
    """Of the encoder accuracies under each attack, of the decoder reconstructions of clean images alone."""
    evaluation = rows(plan_sweep(recipe, space({EPS: {"grid": [0.5]}}), CPU))["evaluation"]
    networks = networks_of(recipe)
    one = networks.classify
    accuracy = one.forward + (2 * one.to_input + one.forward)  # clean; PGD-2, then a look at what it made
    rebuilt = networks.tap.forward + networks.generate.forward
    assert evaluation.distinct == 2
    assert evaluation.hours == pytest.approx(N * (accuracy + rebuilt) / (1000 * one.to_weights) / 3600)


def test_trials_without_a_decoder_and_without_an_evaluation(recipe: Recipe) -> None:
    encoders = plan_sweep(recipe.replace({"decoder": None}), space({EPS: {"grid": [0, 0.5]}}), CPU)
    assert encoders.document()["stages"] == {"encoder": 2, "decoder": 0}
    rebuilt = recipe.replace({"evaluate.protocol": "reconstruction"})
    assert rows(plan_sweep(rebuilt, space({"loss": LOSS}), CPU))["evaluation"].distinct == 2


def test_draws_are_those_of_the_search(recipe: Recipe, tmp_path: Path) -> None:
    made = space(DRAWN, samples=3, seed=5)
    assert plan_sweep(recipe, made, CPU).document()["stages"] == {
        kind: len(found) for kind, found in distinct(each(made, recipe)).items()
    }
    drawn = space(DRAWN, kind="random", trials=7, seed=5)
    points, trips = Points(drawn, drawn.search, recipe, Journal(tmp_path)), list[Recipe]()
    while (entry := points.next()) is not None:
        trips.append(points.recipe_of(entry)[1])
    assert len(trips) == 7
    planned = plan_sweep(recipe, drawn, CPU).document()
    assert planned["trials"] == 7
    assert planned["stages"] == {kind: len(found) for kind, found in distinct(trips).items()}


@pytest.mark.parametrize("kind", ["tpe", "nsga2"])
def test_what_optuna_will_propose_is_stood_for_by_draws(kind: str, recipe: Recipe) -> None:
    made = plan_sweep(recipe, space(DRAWN, kind=kind, trials=5), CPU)
    as_random = plan_sweep(recipe, space(DRAWN, kind="random", trials=5), CPU)
    assert made.document()["stages"] == as_random.document()["stages"]
    assert f"{kind} proposes others" in made.notes[0]


def test_a_limit_of_trials_takes_the_first_of_the_searchs_order(recipe: Recipe) -> None:
    """Which are apart in their encoders, so that fewer of them are shared."""
    made = plan_sweep(recipe, space({EPS: {"grid": [0, 0.5]}, "loss": LOSS}, trials=2), CPU).document()
    assert (made["trials"], made["stages"]) == (2, {"encoder": 2, "decoder": 2})


@pytest.mark.parametrize("budget", ["gpu_hours", "hours"])
@pytest.mark.parametrize("kind", ["grid", "random"])
def test_a_budget_ends_the_trials_once_it_is_used_up(budget: str, kind: str, recipe: Recipe) -> None:
    axes = {"seed": {"grid": [1, 2, 3, 4]}} if kind == "grid" else {FEATURE: {"uniform": [0.1, 1]}}
    whole = plan_sweep(recipe, space(axes, kind=kind, trials=3), CPU)
    made = plan_sweep(recipe, space(axes, kind=kind, **{budget: whole.hours * 0.999}), CPU)
    assert made.document()["trials"] is None
    assert made.counted == 3
    assert made.hours == pytest.approx(whole.hours)
    assert any(f"search.{budget}" in note for note in made.notes)
    more = plan_sweep(recipe, space(axes, kind=kind, trials=2, **{budget: whole.hours * 2}), CPU)
    assert more.document()["trials"] == 2


def test_a_search_without_an_end_that_is_near_is_looked_at_so_far(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "MOST", 4)
    made = plan_sweep(recipe, space(DRAWN, kind="random", hours=1e6), CPU)
    assert (made.trials, made.counted) == (None, 4)


def test_what_the_store_has_costs_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    made = space({EPS: {"grid": [0, 0.5]}, "loss": LOSS})
    before = plan_sweep(recipe, made, CPU)
    stage = stages_of(each(made, recipe)[0])[0]
    assert stage.measured is not None
    stage.measured.parent.mkdir(parents=True)
    stage.measured.touch()
    untrained = plan_sweep(recipe, made, CPU)
    assert untrained.document() == before.document(), "what was measured of weights that are gone is not there"
    monkeypatch.setattr(counting, "is_trained", lambda one: one.key == stage.key)
    after = plan_sweep(recipe, made, CPU)
    assert after.document()["stages"] == before.document()["stages"]
    assert after.document()["stages_there"] == {"encoder": 1, "decoder": 0}
    assert rows(after)["evaluation"].there == 1
    assert after.hours + after.document()["gpu_hours_there"] == pytest.approx(before.hours)
    assert after.hours_alone == before.hours_alone
    assert after.storage_bytes < before.storage_bytes


def test_workers_share_a_stage_and_none_of_its_cost(recipe: Recipe) -> None:
    made = space({EPS: {"grid": [0.5]}})
    one, two = (rows(plan_sweep(recipe, made, Where(workers=n, device="cpu"))) for n in (1, 2))
    assert two["encoder"].hours == pytest.approx(one["encoder"].hours)
    assert two["evaluation"].hours == pytest.approx(one["evaluation"].hours)
    with pytest.raises(InputError, match=r"encoder: 2 micro-batches .* 3 workers"):
        plan_sweep(recipe, made, Where(workers=3, device="cpu"))


@pytest.mark.parametrize(
    ("axes", "networks"),
    [
        (GRIDS["radius and losses"], 2),
        (GRIDS["seeds share nothing"], 2),
        ({STEPS: {"grid": [1, 2, 4]}, "encoder.attack.step_size": {"grid": [0.1, 0.2]}}, 2),
        (GRIDS["layers"], 1 + 2),  # conv2 and conv3 have one shape, so one decoder's layout
        (GRIDS["widths"], 2 + 2),
    ],
)
def test_each_network_is_timed_once(axes: dict[str, Any], networks: int, recipe: Recipe, timed: list[int]) -> None:
    plan_sweep(recipe, space(axes), CPU)
    assert len(timed) == networks


def test_timings_are_few_where_they_take_long(
    recipe: Recipe, timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "LIMIT_S", -1.0)
    made = plan_sweep(recipe, space(GRIDS["layers"]), CPU)
    assert len(timed) == 2
    assert any("2 networks timed now, 1 more taken to be as fast" in note for note in made.notes)


def halved(members: int, rungs: tuple[float, ...], reduction: float) -> tuple[float, float]:
    """By playing it: every stage has a list of what it was trained."""
    alive, came = list(range(members)), dict.fromkeys(range(members), 0.0)
    for share in rungs:
        came |= dict.fromkeys(alive, share)
        alive = alive[: max(1, int(len(alive) / reduction))]
    came |= dict.fromkeys(alive, 1.0)
    return sum(came.values()) / members, len(alive) / members


@pytest.mark.parametrize("members", [1, 2, 3, 8, 9, 27, 100])
@pytest.mark.parametrize(("reduction", "first"), [(3, 1 / 9), (2, 0.25), (4, 0.5), (1.5, 0.1)])
def test_the_share_that_halving_trains(members: int, reduction: float, first: float) -> None:
    early = EarlyStop(reduction=reduction, first=first)
    assert kept(members, early) == pytest.approx(halved(members, early.rungs, reduction))


def test_early_stopping_by_hand(recipe: Recipe) -> None:
    """Nine encoders of one radius in three rungs, each with one decoder: one of nine comes to its end."""
    axes = {"encoder.lr": {"grid": [0.01 * n for n in range(1, 10)]}}
    plain = plan_sweep(recipe, space(axes), CPU)
    made = plan_sweep(recipe, space(axes, early_stop={"reduction": 3, "first": 1 / 9}), CPU)
    assert plain.hours_expected is None
    assert made.hours == pytest.approx(plain.hours)
    found = rows(made)
    trained = (9 * (1 / 9) + 3 * (1 / 3 - 1 / 9) + 1 * (1 - 1 / 3)) / 9
    expected = found["encoder"].hours * trained + (found["decoder"].hours + found["evaluation"].hours) / 9
    assert made.hours_expected == pytest.approx(expected)
    assert made.document()["gpu_hours_expected"] == made.hours_expected
    assert "all, at most" in "\n".join(made.lines())
    assert made.storage["states that wait on rungs"] > 0


def test_encoders_that_nobody_is_compared_with_are_trained_to_their_end(recipe: Recipe) -> None:
    made = plan_sweep(recipe, space({EPS: {"grid": [0, 0.5]}}, early_stop={}), CPU)
    assert made.hours_expected == pytest.approx(made.hours)


def test_storage_by_hand(recipe: Recipe) -> None:
    made = plan_sweep(recipe, space({EPS: {"grid": [0, 0.5]}}), CPU)
    sizes = {network.role: network.parameters for network in networks_of(recipe).listed()}
    encoder, decoder, critic = (4 * sizes[role] for role in ("encoder", "decoder", "discriminator"))
    pictures = 2 * 2 * (2 * 8 * 3 * 16 * 16)  # two decoders, two looks, two rows of eight images
    states = (2 + 2) * max(3 * encoder, 3 * (decoder + critic))  # two kept, the best, one being written
    assert made.storage == {"weights": 2 * encoder + 2 * (encoder + decoder), "pictures": pictures}
    assert made.states == states == made.document()["states_bytes"]
    assert made.document()["storage_bytes"] == sum(made.storage.values())


@pytest.mark.parametrize("name", shipped_spaces())
def test_shipped_spaces_are_planned(name: str, recipe: Recipe) -> None:
    made = load_space(name, recipe)
    planned = plan_sweep(recipe, made, CPU)
    assert json.loads(json.dumps(planned.document()))["trials"] == planned.counted > 1
    text = "\n".join(planned.lines())
    for row in planned.rows:
        assert f"{row.distinct:,}" in text
    assert all(f"- {note}" in text for note in planned.notes)


def test_the_plan_is_written_once_and_never_in_the_way(recipe: Recipe, tmp_path: Path) -> None:
    said: list[str] = []
    made = space({EPS: {"grid": [0, 0.5]}})
    write_plan(tmp_path, recipe, made, CPU, said.append)
    document = json.loads((tmp_path / PLAN).read_text())
    assert document == plan_sweep(recipe, made, CPU).document()
    assert "2 trials, 2 encoders, 2 decoders" in said[0]
    write_plan(tmp_path, recipe, space({"seed": {"grid": [1]}}), CPU, said.append)
    assert json.loads((tmp_path / PLAN).read_text()) == document
    assert len(said) == 1
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    unknown = recipe.replace({"data.train": "/nowhere/x.beton"})
    write_plan(elsewhere, unknown, made, CPU, said.append)
    assert not list(elsewhere.iterdir())
    assert "no plan: " in said[1]


def arae(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process; its exit code."""
    import sys

    from arae.cli import main

    monkeypatch.setattr(sys, "argv", ["arae", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "radii.yaml").write_text(f"axes: {{{EPS}: {{grid: [0, 0.5, 1]}}}}")
    monkeypatch.chdir(tmp_path)
    words = ["plan", "tiny.yaml", "encoder.steps=3", "radii.yaml", "search.trials=2", "--device", "cpu"]
    assert arae(*words, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    changed = load_recipe("tiny.yaml", ["encoder.steps=3", "name=sweep-radii"])
    expected = plan_sweep(changed, space({EPS: {"grid": [0, 0.5, 1]}}, trials=2), CPU)
    assert out.splitlines() == expected.lines()
    assert arae("plan", "tiny.yaml", "--device", "cpu", monkeypatch=monkeypatch) == 0
    assert "FLOPs an image" in capsys.readouterr().out
    assert arae("ls", "spaces", monkeypatch=monkeypatch) == 0
    listed = capsys.readouterr().out.splitlines()
    assert Counter(line.split()[0] for line in listed) == Counter(shipped_spaces().keys())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuch"], ["space nosuch", *shipped_spaces()]),
        (["epsilon", "epsilon-x-loss"], ["override 'epsilon-x-loss'", "dotted.key=value"]),
        (["epsilon", "search.trails=3"], ["unknown key search.trails", "trials"]),
        (["epsilon", "encoder.steeps=3"], ["encoder.steeps"]),
    ],
)
def test_a_plan_that_can_not_be_made_says_why(
    words: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arae("plan", "demo", *words, "--device", "cpu", monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said), error


def test_without_the_drivers_there_are_no_spaces(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from arae import listing

    def missing(name: str) -> None:
        raise InputError(f"this needs {name}, which is run from a checkout of arae")

    monkeypatch.setattr(listing, "checkout_module", missing)
    assert arae("ls", "spaces", monkeypatch=monkeypatch) == 2
    assert "tune.space" in capsys.readouterr().err
