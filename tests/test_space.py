"""Search spaces: what is tried, and what is refused before anything is."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from arae.config import load_recipe
from arae.errors import InputError
from tune.space import Space, load_space, shipped_spaces

DEMO = load_recipe("demo", ["map=null", "name=one"])
EPS = "encoder.attack.eps"
FEATURE = "decoder.losses.feature"


def space(axes: dict[str, Any], **others: Any) -> Space:
    return Space.model_validate({"axes": axes, **others})


NESTED = {
    EPS: {"grid": [0, 0.75]},
    "loss": {"grid": {"pixel": {FEATURE: 0}, "both": {FEATURE: 0.01}}},
    "decoder.losses.adversarial": {"choice": [0, 0.001], "when": {"loss": "both"}},
    FEATURE: {"log-uniform": [1e-4, 1e-1], "when": {"loss": ["both"]}},
    "seed": {"grid": [1, 2]},
}


def test_grids_are_crossed_in_the_order_written() -> None:
    made = space({EPS: {"grid": [0, 0.5, 1]}, "seed": {"grid": [7, 8]}})
    points = made.points()
    assert [tuple(p.values.values()) for p in points] == list(itertools.product([0, 0.5, 1], [7, 8]))
    assert points[0].overrides == {EPS: 0, "seed": 7}
    assert points[3].label == "eps=0.5, seed=8"
    assert made.points(samples=5) == points, "nothing is drawn, so there is nothing to draw again"


def test_a_name_stands_for_a_group_of_overrides_and_what_is_fixed_comes_first() -> None:
    made = space(
        {"loss": {"grid": {"pixel": {FEATURE: 0}, "both": {FEATURE: 0.01, "seed": 5}}}}, fixed={"seed": 3, FEATURE: 9}
    )
    assert [dict(p.overrides) for p in made.points()] == [{"seed": 3, FEATURE: 0}, {"seed": 5, FEATURE: 0.01}]
    assert [p.label for p in made.points()] == ["loss=pixel", "loss=both"]


def test_axes_with_a_condition_are_there_only_where_it_holds() -> None:
    points = space(NESTED).points(samples=3)
    assert len(points) == 3 * 2 * 2 * 2
    for point in points:
        assert (FEATURE in point.values) == (point.values["loss"] == "both")
        assert (point.overrides[FEATURE] == 0) == (point.values["loss"] == "pixel")
    grid = space({"loss": {"grid": ["a", "b"]}, "x": {"grid": [1, 2], "when": {"loss": "a"}}})
    assert [tuple(p.values.values()) for p in grid.crossings()] == [("a", 1), ("a", 2), ("b",)]


def test_a_condition_on_what_is_not_there_does_not_hold() -> None:
    made = space(
        {
            "a": {"grid": [1, 2]},
            "b": {"grid": [1, 2], "when": {"a": 1}},
            "c": {"grid": [1, 2], "when": {"b": 1}},
        }
    )
    assert [tuple(p.values.values()) for p in made.points()] == [(1, 1, 1), (1, 1, 2), (1, 2), (2,)]


def test_draws_follow_their_distributions_and_their_seed() -> None:
    made = space({"u": {"uniform": [2, 5]}, "l": {"log-uniform": [1e-4, 1]}, "c": {"choice": ["x", "y", "z"]}})
    points = made.points(samples=600, seed=1)
    u, low, c = ([p.values[name] for p in points] for name in "ulc")
    assert stats.kstest(u, "uniform", args=(2, 3)).pvalue > 0.01
    assert stats.kstest(np.log(low), "uniform", args=(math.log(1e-4), -math.log(1e-4))).pvalue > 0.01
    assert stats.chisquare([c.count(v) for v in "xyz"]).pvalue > 0.01
    assert made.points(samples=600, seed=1) == points
    assert made.points(samples=600, seed=2) != points


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"axes": {}}, "axes is empty"),
        ({}, "axes is missing"),
        ({"axis": {}, "axes": {EPS: {"grid": [1]}}}, "unknown key axis; did you mean axes"),
        ({"axes": {EPS: {"grid": []}}}, "grid is empty"),
        ({"axes": {EPS: {"grid": [1, 1]}}}, "has 1 twice"),
        ({"axes": {EPS: {}}}, "write one of grid, choice, uniform, log-uniform; there are none"),
        ({"axes": {EPS: {"grid": [1], "uniform": [0, 1]}}}, "there are grid, uniform"),
        ({"axes": {EPS: {"uniform": [1, 0]}}}, "goes from 1 to 0"),
        ({"axes": {EPS: {"log-uniform": [0, 1]}}}, "begins at 0"),
        ({"axes": {EPS: {"gird": [1]}}}, f"axes.{EPS}: unknown key gird; did you mean grid?"),
        ({"axes": {EPS: 3}}, f"axes.{EPS}: "),
        (
            {"axes": {EPS: {"grid": [1], "when": {"seed": 1}}}},
            "names seed: the axes above it that have values are none",
        ),
        ({"axes": {"seed": {"grid": [1]}, EPS: {"grid": [1], "when": {"seed": 2}}}}, "which it never is"),
        ({"axes": {"seed": {"uniform": [1, 2]}, EPS: {"grid": [1], "when": {"seed": 2}}}}, "are none"),
        ({"axes": {"encoder.atack.eps": {"grid": [1]}}}, "unknown key encoder.atack; did you mean encoder.attack"),
        ({"axes": {EPS: {"grid": [0, -1]}}}, "eps=-1"),
        ({"axes": {"decoder.lr": {"uniform": [-1, 1]}}}, "lr=-1"),
        ({"axes": {"loss": {"choice": {"odd": {"decoder.loses": 1}}}}}, "at loss=odd"),
        (
            {
                "axes": {"decoder.losses.pixel": {"choice": [1, 0]}, FEATURE: {"choice": [0.1, 0]}},
                "fixed": {"decoder.losses.adversarial": 0},
            },
            "at pixel=0, feature=0",  # each alone is possible
        ),
        ({"axes": {"loss": {"grid": ["pixel"]}}}, "unknown key loss"),
        ({"axes": {EPS: {"grid": [1]}}, "fixed": {"encoder.nmae": "x"}}, "did you mean encoder.name"),
        ({"axes": {f"{k}": {"grid": list(range(30))} for k in ("seed", "decoder.steps", "decoder.batch")}}, "27000"),
        ([1], "write `axes:`"),
        ("a: [", "not YAML"),
    ],
)
def test_what_can_not_be_searched_is_refused(tmp_path: Path, document: object, said: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(InputError) as error:
        load_space(file, DEMO)
    assert said in str(error.value)
    assert "odd" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_under_a_condition_is_checked_where_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    axes = {
        "loss": {"grid": {"a": {}, "b": {}}},
        "more": {"choice": {"one": {}, "two": {"decoder.lr": -1}}, "when": {"loss": "b"}},
    }
    file.write_text(yaml.safe_dump({"axes": axes}, sort_keys=False))
    with pytest.raises(InputError, match="at loss=b, more=two"):
        load_space(file, DEMO)


def test_a_space_that_is_not_there() -> None:
    with pytest.raises(InputError, match="No such file"):
        load_space("epsilonn", DEMO)


@pytest.mark.parametrize("name", shipped_spaces())
def test_shipped_spaces_fit_the_demo(name: str) -> None:
    made = load_space(name, DEMO)
    assert made.about
    recipes = [made.recipe(DEMO, point) for point in made.points(samples=4)]
    assert len({recipe.digest for recipe in recipes}) == len(recipes) > 1
