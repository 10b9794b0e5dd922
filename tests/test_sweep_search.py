"""What a sweep tries next: rungs, budgets, Optuna, and going on after a kill; trials are played, not trained."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import tiny_recipe

from arae.config import Recipe
from arae.errors import InputError, Stopped
from arae.launch import Where
from arae.monitor.events import read_events
from tune.journal import Entry, Journal
from tune.results import Spent
from tune.rungs import Rungs
from tune.search import Points, points_of
from tune.settings import EarlyStop
from tune.space import Space
from tune.store import LACKING, Outcome, Stage, Work, stages_of
from tune.trial import Voice

EPS, LR, FEATURE = "encoder.attack.eps", "decoder.lr", "decoder.losses.feature"
STEPS = 90
Score = Callable[[Entry, Stage, float], float]


@pytest.fixture
def recipe(tiny_npz: Path) -> Recipe:
    return tiny_recipe(tiny_npz, name="sweep")


def space(axes: dict[str, Any], **search: Any) -> Space:
    return Space.model_validate({"axes": axes, "search": search})


GRID = {
    EPS: {"grid": [0, 0.5]},
    LR: {"grid": [1e-4, 1e-3, 1e-2]},
    FEATURE: {"grid": [0, 0.1]},
    "seed": {"grid": [1, 2]},
}
HALVING = {"early_stop": {"reduction": 3, "first": 1 / 9}}


class Player:
    """In the place of Ray Tune and the trials: stages come as far as they may, one look after another."""

    def __init__(self, made: Space, recipe: Recipe, folder: Path, score: Score, jobs: int = 2) -> None:
        folder.mkdir(exist_ok=True)
        self.points = points_of(made, made.search, recipe, Journal(folder), folder)
        self.score, self.jobs = score, jobs
        self.steps: Counter[str] = Counter()
        self.begun: list[str] = []

    def play(self, most: int = 10_000) -> "Player":
        """Trials until there are none, or for so many turns; `jobs` are out at a time, and the oldest ends first."""
        out: list[Entry] = []
        for _ in range(most):
            while len(out) < self.jobs and (entry := self.points.next()) is not None:
                self.begun.append(entry.id)
                out.append(entry)
            if not out:
                break
            self._end(out.pop(0))
        return self

    def _end(self, entry: Entry) -> None:
        limits = self.points.limits(entry)
        for stage in self.points.stages(entry):
            if self.points.rungs.is_done(stage.key):
                self.points.passed(entry, {**outcome(stage), "trained": False, "measured": False})
                continue
            reached = round(limits[stage.name] * STEPS)
            self.steps[stage.key] = max(self.steps[stage.key], reached)
            if reached < STEPS:
                value = self.score(entry, stage, limits[stage.name])
                at = {"group": stage.group, "key": stage.key, "step": reached, "score": value}
                self.points.paused(entry, {**at, "share": limits[stage.name], "seconds": 0.5 * reached})
                return
            self.points.passed(entry, outcome(stage))
        last = self.points.stages(entry)[-1]
        entry.state, entry.objectives = "finished", {"robust_accuracy": 0.5, "psnr": self.score(entry, last, 1.0)}
        self.points.ended(entry)


def at_rung(key: str, score: float, share: float = 0.1) -> dict[str, Any]:
    return {"group": "group", "key": key, "share": share, "step": 9, "score": score, "seconds": 4.5}


def outcome(stage: Stage) -> dict[str, Any]:
    return {"stage": stage.name, "key": stage.key, "trained": True, "measured": True, "steps": STEPS, "seconds": 60.0,
            "workers": 1, "evaluation_s": 0.0}  # fmt: skip


def named(key: str) -> Stage:
    """A stage of which only the name counts."""
    nothing: Any = None
    return Stage("decoder", key, nothing, "group", "encoder", None)


def by_name(entry: Entry, stage: Stage, share: float) -> float:
    """A score that is always the same, and has nothing to do with the order."""
    return int(stage.key[:6], 16) % 1000 / 10


def finished(points: Points) -> set[str]:
    return {entry.id for entry in points.entries.values() if entry.state == "finished"}


@pytest.mark.parametrize(
    ("share", "rungs"), [(1 / 9, [1 / 9, 1 / 3]), (1 / 16, [1 / 16, 3 / 16, 9 / 16]), (0.5, [0.5])]
)
def test_rungs_are_shares_of_a_stage_below_its_end(share: float, rungs: list[float]) -> None:
    assert EarlyStop(first=share).rungs == pytest.approx(rungs)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 27, 40])
@pytest.mark.parametrize("reduction", [2.0, 3.0, 4.0])
def test_of_n_that_came_the_best_nth_part_goes_on(n: int, reduction: float, tmp_path: Path) -> None:
    scores = np.random.default_rng(n).permutation(n).astype(float)
    rungs = Rungs(EarlyStop(reduction=reduction, first=0.1), Journal(tmp_path))
    for i, score in enumerate(scores):
        rungs.arrived(at_rung(str(i), score))
        best = np.argsort(-scores[: i + 1])[: int((i + 1) / reduction)]
        rungs.promote()
        assert {str(j) for j in best} <= {k for k in map(str, range(i + 1)) if rungs._allowed.get(k, 0) == 1}
    again = Rungs(EarlyStop(reduction=reduction, first=0.1), Journal(tmp_path))
    assert (again._allowed, again._reached) == (rungs._allowed, rungs._reached)
    assert {key: at["score"] for key, at in again.waiting().items()} == {str(i): one for i, one in enumerate(scores)}


def test_a_score_counts_on_the_rung_it_was_had_on(tmp_path: Path) -> None:
    """Two trials share a stage: the second is told of the first rung when the stage has been let on already."""
    rungs = Rungs(EarlyStop(reduction=3, first=1 / 9), Journal(tmp_path))
    for i in range(3):
        rungs.arrived(at_rung(str(i), i, 1 / 9))
    assert rungs.promote()
    rungs.arrived(at_rung("2", 2, 1 / 9))  # the second trial's word
    assert not rungs.waits(named("2")), "it may still go to the second rung"
    rungs.arrived(at_rung("2", 7, 1 / 3))
    for again in (rungs, Rungs(EarlyStop(reduction=3, first=1 / 9), Journal(tmp_path))):
        assert again.waits(named("2"))
        assert again.waiting()["2"]["score"] == 7


def test_rungs_of_an_earlier_command_are_not_mixed_with_others(tmp_path: Path) -> None:
    first = Rungs(EarlyStop(reduction=3, first=1 / 9), Journal(tmp_path))
    for i in range(3):
        first.arrived(at_rung(str(i), i, 1 / 9))
    assert first.promote()
    then = Rungs(EarlyStop(reduction=2, first=1 / 4), Journal(tmp_path))
    assert not any(then.waits(named(str(i))) for i in range(3))
    assert then.limit(named("2")) == 1 / 2, "it was let on up to a third"
    assert then.limit(named("0")) == 1 / 4


def test_a_stage_that_fails_leaves_its_place_to_the_next(recipe: Recipe, tmp_path: Path) -> None:
    class Failing(Player):
        def _end(self, entry: Entry) -> None:
            stage = self.points.stages(entry)[1]
            if by_name(entry, stage, 1) > 30 and self.points.limits(entry)["decoder"] > 1 / 9:
                entry.state, entry.reason = "failed", "diverged"
                self.points.ended(entry)
            else:
                super()._end(entry)

    player = Failing(space(GRID, **HALVING), recipe, tmp_path / "s", by_name).play()
    entries = player.points.entries.values()
    assert any(entry.state == "failed" for entry in entries)
    decoders = {entry.id: player.points.stages(entry)[1] for entry in entries}
    ended = {decoders[entry.id].group for entry in entries if entry.state == "finished"}
    assert ended == {decoders[entry.id].group for entry in entries if by_name(entry, decoders[entry.id], 1) <= 30}


@pytest.mark.parametrize(
    "axes",
    [
        {EPS: {"uniform": [0, 1]}, LR: {"choice": [1e-4, 1e-3]}},  # each encoder is alone at its radius
        {"encoder.lr": {"log-uniform": [1e-4, 1e-1]}},  # all encoders are compared
        {EPS: {"choice": [0, 0.5]}, LR: {"log-uniform": [1e-4, 1e-1]}},
    ],
)
def test_hours_are_kept_where_stages_wait(recipe: Recipe, tmp_path: Path, axes: dict[str, Any]) -> None:
    hours = 20 / 60
    made = space(axes, kind="random", gpu_hours=hours, **HALVING)
    points = Player(made, recipe, tmp_path / "s", by_name).play(3000).points
    assert finished(points)
    assert hours <= points.gpu_hours() <= hours + 4 / 60
    again = Player(made, recipe, tmp_path / "s", by_name).play(3000)
    assert again.begun == []
    assert again.points.gpu_hours() == pytest.approx(points.gpu_hours())


def test_what_another_sweep_trained_is_not_on_this_ones_bill(recipe: Recipe, tmp_path: Path) -> None:
    points = Player(space(GRID), recipe, tmp_path / "s", by_name).play().points
    assert points.gpu_hours() == pytest.approx((4 + 24) / 60)
    spent = Spent.of([[Outcome(**one) for one in entry.stages] for entry in points.entries.values()])
    assert (spent.stages, spent.device_hours) == ({"encoder": 4, "decoder": 24}, pytest.approx((4 + 24) / 60))
    for entry in points.entries.values():
        entry.stages[0] |= {"trained": False, "measured": False}
    assert points.gpu_hours() == pytest.approx(24 / 60)
    spent = Spent.of([[Outcome(**one) for one in entry.stages] for entry in points.entries.values()])
    assert (spent.needed, spent.stages) == ({"encoder": 24, "decoder": 24}, {"encoder": 0, "decoder": 24})
    assert (spent.device_hours, spent.saved_hours) == (pytest.approx(24 / 60), pytest.approx(24 / 60))


def test_groups_do_not_compete_and_each_has_one_at_its_end(recipe: Recipe, tmp_path: Path) -> None:
    made = space(GRID, **HALVING)
    player = Player(made, recipe, tmp_path / "s", by_name).play()
    groups = Counter(player.points.stages(entry)[1].group for entry in player.points.entries.values())
    done = Counter(
        player.points.stages(entry)[1].group for entry in player.points.entries.values() if entry.state == "finished"
    )
    assert groups.keys() == done.keys()
    for group, count in groups.items():
        of_group = [entry for entry in player.points.entries.values() if player.points.stages(entry)[1].group == group]
        best = max(by_name(entry, player.points.stages(entry)[1], 1) for entry in of_group)
        ended = [entry.objectives["psnr"] for entry in of_group if entry.state == "finished"]
        assert best in ended, "the best of a group comes to its end where its score does not change"
        assert count == 6
    whole = sum(player.steps.values())
    assert whole < 0.6 * STEPS * (4 + 24), "half the work is saved even with four groups of six"


def test_given_again_it_begins_nothing_that_was_cut_short(recipe: Recipe, tmp_path: Path) -> None:
    made = space(GRID, **HALVING)
    first = Player(made, recipe, tmp_path / "s", by_name).play()
    waiting = first.points.waiting()
    assert waiting
    for entry, stage in waiting:  # as the driver does at the end
        step = first.points.rungs.waiting()[stage.key]["step"]
        first.points.journal.cut(entry, {**outcome(stage), "steps": step})
        entry.state = "stopped"
        first.points.ended(entry)
    again = Player(made, recipe, tmp_path / "s", by_name).play()
    assert not again.begun
    assert [entry.id for entry, _ in again.points.waiting()] == [entry.id for entry, _ in waiting]


def test_without_early_stopping_every_stage_goes_to_its_end(recipe: Recipe, tmp_path: Path) -> None:
    player = Player(space(GRID), recipe, tmp_path / "s", by_name).play()
    assert len(finished(player.points)) == 24
    assert Counter(player.steps.values()) == {STEPS: 4 + 24}


def test_two_at_a_time_do_not_begin_with_one_encoder(recipe: Recipe, tmp_path: Path) -> None:
    points = Player(space(GRID), recipe, tmp_path / "s", by_name).points
    first = [points.next() for _ in range(4)]
    assert len({points.stages(entry)[0].key for entry in first if entry is not None}) == 4


@pytest.mark.parametrize("search", [{}, HALVING, {"kind": "random", "trials": 9}])
@pytest.mark.parametrize("turns", [1, 2, 5, 9, 14, 20])
def test_killed_at_any_moment_it_goes_on(recipe: Recipe, tmp_path: Path, search: dict[str, Any], turns: int) -> None:
    """What had ended is not begun again; what had not is; and the end is the same where nothing is cut short."""
    made = space(GRID, **search)
    whole = Player(made, recipe, tmp_path / "whole", by_name).play()
    killed = Player(made, recipe, tmp_path / "killed", by_name).play(turns)
    had = finished(killed.points)
    book = tmp_path / "killed" / "trials.jsonl"
    book.write_bytes(book.read_bytes() + b'{"event": "beg')  # the line that the kill tore
    again = Player(made, recipe, tmp_path / "killed", by_name).play()
    assert not had & set(again.begun)
    if "early_stop" not in search:
        assert finished(again.points) == finished(whole.points)
        assert list(again.points.entries) == list(whole.points.entries)
    else:
        open_ones = {entry.id for entry in again.points.entries.values() if entry.state != "finished"}
        assert open_ones == {entry.id for entry, _ in again.points.waiting()}


def test_what_failed_is_tried_by_the_next_command(recipe: Recipe, tmp_path: Path) -> None:
    player = Player(space(GRID), recipe, tmp_path / "s", by_name)
    entry = player.points.next()
    assert entry is not None
    entry.state, entry.reason = "failed", "no luck"
    player.points.ended(entry)
    assert len(finished(player.play().points)) == 23
    again = Player(space(GRID), recipe, tmp_path / "s", by_name).play()
    assert again.begun == [entry.id]
    assert len(finished(again.points)) == 24


@pytest.mark.parametrize(
    ("search", "count"),
    [
        ({"trials": 5}, 5),
        ({"kind": "random", "trials": 7}, 7),
        ({"kind": "random", "gpu_hours": 5 * 2 / 60}, None),
        ({"kind": "random", "trials": 10_000}, 24),  # there are no more in the space
    ],
)
def test_budgets(recipe: Recipe, tmp_path: Path, search: dict[str, Any], count: int | None) -> None:
    player = Player(space(GRID, **search), recipe, tmp_path / "s", by_name, jobs=1).play()
    if count is None:
        hours = player.points.gpu_hours()
        assert search["gpu_hours"] <= hours <= search["gpu_hours"] + 2 / 60
    else:
        assert len(player.points.entries) == count


def test_hours_of_earlier_commands_count(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "trials.jsonl").write_text(
        '{"event": "command", "time": 0, "state": "begun"}\n{"event": "command", "time": 5400, "state": "ended"}\n'
        '{"event": "command", "time": 9000, "state": "begun"}\n{"event": "note", "time": 10800}\n'
    )
    assert Journal(folder).hours() == pytest.approx(2.0)
    made = space(GRID, kind="random", hours=2.5)
    points = points_of(made, made.search, recipe, Journal(folder), folder)
    assert points.next(spent_hours=0.4) is not None
    assert points.next(spent_hours=0.6) is None


DRAWN = {LR: {"log-uniform": [1e-4, 1e-1]}, FEATURE: {"uniform": [0, 1]}}


def bowl(entry: Entry, stage: Stage, share: float) -> float:
    """Best at lr = 1e-3 and feature = 0.7."""
    lr, feature = entry.values[LR], entry.values[FEATURE]
    return -((math.log10(lr) + 3) ** 2) - (feature - 0.7) ** 2


@pytest.mark.parametrize("kind", ["tpe", "nsga2"])
def test_optuna_learns_over_restarts(kind: str, recipe: Recipe, tmp_path: Path) -> None:
    made = space(DRAWN, kind=kind, trials=30, objectives=["psnr"] if kind == "tpe" else ["robust_accuracy", "psnr"])
    Player(made, recipe, tmp_path / "s", bowl).play(12)
    more = Player(made, recipe, tmp_path / "s", bowl).play()
    values = [entry.values for entry in more.points.entries.values()]
    assert len({tuple(one.values()) for one in values}) == len(values) == 30
    assert finished(more.points) == set(more.points.entries)
    known = [trial for trial in more.points._study.get_trials() if trial.state.name == "COMPLETE"]  # type: ignore[attr-defined]
    points = {tuple(trial.params.items()) for trial in known}  # NSGA-II proposes some again
    assert len(points) == 30, "what was learned before the restart is known after it"
    scores = [entry.objectives["psnr"] for entry in more.points.entries.values()]
    assert np.mean(scores[20:]) > np.mean(scores[:10])


def test_optuna_hears_of_a_trial_that_was_cut_short_and_went_on(recipe: Recipe, tmp_path: Path) -> None:
    made = space(DRAWN, kind="tpe", trials=4, objectives=["psnr"])
    points: Any = Player(made, recipe, tmp_path / "s", bowl).points
    entry = points.next()
    entry.state = "stopped"
    points.ended(entry)
    again: Any = Player(made, recipe, tmp_path / "s", bowl).play().points
    told = [trial for trial in again._study.get_trials() if trial.state.name == "COMPLETE"]
    assert len(told) == len(again.entries) == 4
    assert {trial.value for trial in told} == {entry.objectives["psnr"] for entry in again.entries.values()}


def test_other_objectives_are_another_sweep(recipe: Recipe, tmp_path: Path) -> None:
    Player(space(DRAWN, kind="tpe", trials=4, objectives=["psnr"]), recipe, tmp_path / "s", bowl)
    with pytest.raises(InputError, match=r"search.objectives.*psnr"):
        Player(space(DRAWN, kind="tpe", trials=4, objectives=["lpips"]), recipe, tmp_path / "s", bowl)


def test_optuna_and_conditions(recipe: Recipe, tmp_path: Path) -> None:
    axes = {
        "loss": {"grid": {"pixel": {FEATURE: 0}, "both": {}}},
        FEATURE: {"log-uniform": [1e-4, 1e-1], "when": {"loss": "both"}},
    }
    made = space(axes, kind="tpe", trials=12, objectives=["psnr"])
    player = Player(made, recipe, tmp_path / "s", lambda entry, stage, share: entry.values.get(FEATURE, 0.0)).play()
    values = [entry.values for entry in player.points.entries.values()]
    assert all((FEATURE in one) == (one["loss"] == "both") for one in values)
    assert sum(one["loss"] == "pixel" for one in values) == 1, "the same point is one trial"


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"kind": "random"}, "trials, hours or gpu_hours"),
        ({"kind": "tpe"}, "trials, hours or gpu_hours"),
        ({"objectives": []}, "one or more"),
        ({"objectives": ["psnr", "psnr"]}, "distinct"),
        ({"objectives": ["loss"]}, "objectives"),
        ({"kind": "random", "trials": 3, "samples": 2}, "samples = 2"),
        ({"kind": "pbt"}, "kind"),
        ({"early_stop": {"reduction": 1}}, "reduction"),
        ({"early_stop": {"first": 1}}, "first"),
        ({"retries": -1}, "retries"),
        ({"trails": 3}, "trails"),
    ],
)
def test_a_search_that_can_not_be(search: dict[str, Any], said: str, tmp_path: Path, recipe: Recipe) -> None:
    import yaml

    from tune.space import load_space

    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"axes": GRID, "search": search}))
    with pytest.raises(InputError, match=said):
        load_space(path, recipe)


SAME, OTHER = True, False


@pytest.mark.parametrize(
    ("key", "value", "encoder", "decoder"),
    [
        ("encoder.attack.eps", 1.0, OTHER, OTHER),
        ("seed", 9, OTHER, OTHER),
        ("encoder.layer", "conv1", SAME, OTHER),
        ("decoder.lr", 0.5, SAME, OTHER),
        ("decoder.losses.feature", 0.5, SAME, OTHER),
        ("precision", "bf16", OTHER, OTHER),
        ("engine.kind", "deepspeed", OTHER, OTHER),
        ("evaluate.n", 10, SAME, SAME),
        ("evaluate.looks", 3, SAME, SAME),
        ("state.every", 7, SAME, SAME),
        ("name", "another", SAME, SAME),
        ("scale", "small", SAME, SAME),
        ("encoder.attack.steps", 3, OTHER, OTHER),
        ("encoder.guard", {"steps": 50}, OTHER, OTHER),
        ("encoder.phases", [{"until": 0.5, "steps": 1}], OTHER, OTHER),
    ],
)
def test_a_stage_is_named_by_what_it_depends_on(
    recipe: Recipe, key: str, value: Any, encoder: bool, decoder: bool
) -> None:
    before, after = stages_of(recipe), stages_of(recipe.replace({key: value}))
    assert [a.key == b.key for a, b in zip(before, after, strict=True)] == [encoder, decoder]


def test_without_a_radius_nothing_else_of_the_attack_matters(recipe: Recipe) -> None:
    clean = recipe.replace({"encoder.attack.eps": 0})
    other = clean.replace({"encoder.attack.steps": 1, "encoder.attack.norm": "linf", "encoder.noise": 2.0})
    other = other.replace({"encoder.guard": {"steps": 9}, "encoder.phases": [{"until": 0.5}]})
    for key, one in (("encoder.replays", 4), ("encoder.early_stop", 1)):
        assert [stage.key for stage in stages_of(clean)] == [
            stage.key for stage in stages_of(clean.replace({key: one}))
        ]
    assert [stage.key for stage in stages_of(clean)] == [stage.key for stage in stages_of(other)]
    smaller = clean.replace({"encoder.phases": [{"until": 0.5, "scale": 0.5}]})
    assert stages_of(smaller)[0].key != stages_of(clean)[0].key


def test_a_guard_makes_the_held_out_looks_part_of_the_encoder(recipe: Recipe) -> None:
    guarded = recipe.replace({"encoder.guard": {"steps": 50}})
    assert stages_of(guarded)[0].key != stages_of(guarded.replace({"evaluate.looks": 3}))[0].key


@pytest.mark.parametrize("key", ["encoder.weights", "decoder.comparator"])
def test_weights_count_by_what_they_are(recipe: Recipe, tmp_path: Path, key: str) -> None:
    def key_of(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        value: Any = str(tmp_path / name)
        if key == "decoder.comparator":
            value = {"name": "small-cnn", "weights": value}
        return stages_of(recipe.replace({key: value}))[1].key

    first = key_of("a.safetensors", b"one")
    assert key_of("a.safetensors", b"two") != first
    assert key_of("a.safetensors", b"one") == first


def test_what_lacked_the_weights_of_lpips_is_measured_once_they_are_there(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    stage = stages_of(recipe.replace({"evaluate.lpips": "squeeze"}))[1]
    assert stage.measured is not None
    assert not stage.is_measured
    stage.measured.parent.mkdir(parents=True)
    stage.measured.touch()
    assert stage.is_measured
    stage.measured.with_suffix(LACKING).touch()
    assert stage.is_measured, "they are still not there"
    weights = tmp_path / "torch" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert not stage.is_measured


def test_what_is_measured_is_named_by_what_it_depends_on(recipe: Recipe) -> None:
    before = [stage.measured for stage in stages_of(recipe)]
    other = recipe.replace({"evaluate.attacks": [{"norm": "l2", "eps": 1.0}]})
    after = [stage.measured for stage in stages_of(other)]
    assert before[0] != after[0]
    assert before[1] == after[1], "reconstructions do not depend on the attacks"
    for key, value in (("evaluate.lpips", "vgg"), ("evaluate.looks", 5), ("evaluate.factors", [2])):
        changed = [stage.measured for stage in stages_of(recipe.replace({key: value}))]
        assert changed[0] == before[0], f"accuracies do not depend on {key}"
        assert (changed[1] == before[1]) == (key == "evaluate.looks")
    assert stages_of(recipe.replace({"evaluate.protocol": "robustness"}))[1].measured is None
    assert stages_of(recipe.replace({"evaluate.protocol": "reconstruction"}))[0].measured is None


def test_a_stage_that_came_to_its_rung_says_so_again(recipe: Recipe) -> None:
    """Whoever trained it may have been killed before the driver heard; no step is taken again for that."""
    stage = stages_of(recipe.replace({"encoder.steps": 9, "evaluate.looks": 3}))[0]
    told = []
    for _ in range(2):
        voice = Voice(lambda values: None, {"encoder": 0.3})
        voice.stage = stage
        work = Work(
            where=Where(device="cpu"),
            parent="s/one",
            experiment="s",
            measure=lambda recipe, folder: [],
            listener=voice,
            note=lambda text: None,
            stop=lambda voice=voice: voice.pause is not None,
            limits={"encoder": 0.3},
        )
        with pytest.raises(Stopped):
            work.ensure(stage)
        told.append(voice.pause)
    assert told[0] is not None
    assert told[0]["step"] == 3
    assert told[1] == told[0]
    intervals = [event["step"] for event in read_events(stage.folder.log) if event["event"] == "interval"]
    assert intervals == sorted(set(intervals))


def test_other_images_are_another_stage(recipe: Recipe, tmp_path: Path) -> None:
    from conftest import make_tiny_npz

    other = tmp_path / "more"
    other.mkdir()
    moved = recipe.replace({"data.train": str(make_tiny_npz(other))})
    assert stages_of(moved)[0].key == stages_of(recipe)[0].key, "the same images at another place"
    with np.load(moved.data.train or "") as arrays:
        changed = {name: arrays[name] for name in arrays}
    changed["images"] = changed["images"] ^ 1
    np.savez(tmp_path / "changed.npz", **changed)
    assert stages_of(recipe.replace({"data.train": str(tmp_path / "changed.npz")}))[0].key != stages_of(recipe)[0].key
