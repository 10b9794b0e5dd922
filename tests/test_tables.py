"""The paper's tables: definitions, rules, planned cost, page."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from tabling import plain, record

from arae.config import Recipe
from arae.cost import Networks, parameters
from arae.errors import InputError
from arae.metrics import METRICS, wilson
from arae.records import Record, Threat
from benchmarks.tables import planned, show
from benchmarks.tables.definition import FOLDER, PARAMETERS, SCALES, Definition, definitions, load, trips
from benchmarks.tables.verdict import UNITS, Cell, difference, judge

DEFINITIONS = {d.id: d for d in definitions()}
SCALED = [(d.id, scale) for d in DEFINITIONS.values() for scale in SCALES if getattr(d, scale)]
IN_SMALL = {"arae-main-T1", "arae-main-T5", "arae-main-T7", "arae-new-A3"}
LATER = {"arae-main-T8", "arae-main-T9", "arae-main-T10", "arae-new-A1"}


def mean(figure: float | tuple[float, float]) -> float:
    return figure[0] if isinstance(figure, tuple) else figure


# ---- definitions


def test_every_table_has_a_definition() -> None:
    numbered = {f"arae-main-T{i}" for i in range(1, 11)} | {f"arae-new-A{i}" for i in (1, 2, 3)}
    assert set(DEFINITIONS) == numbered == {path.stem for path in FOLDER.iterdir()}
    assert {d.id for d in DEFINITIONS.values() if d.full is None} == LATER
    assert {d.id for d in DEFINITIONS.values() if d.small is not None} >= IN_SMALL
    assert all(d.needs for d in DEFINITIONS.values() if d.id in LATER)


@pytest.mark.parametrize(("table", "scale"), SCALED)
def test_every_run_is_a_recipe(table: str, scale: str) -> None:
    there = trips(DEFINITIONS[table], scale)
    assert [trip.key for trip in there] == list(DEFINITIONS[table].used)
    for trip in there:
        assert trip.recipe.name == f"tables/{scale}/{trip.name}"
        assert trip.recipe.scale == scale
        assert trip.evaluations
        assert len({r.digest for r in trip.evaluations}) == len(trip.evaluations)
        for recipe in trip.evaluations:  # what is evaluated must be what was trained
            assert recipe.stage_digest("decoder") == trip.recipe.stage_digest("decoder")


@pytest.mark.parametrize("scale", SCALES)
def test_runs_of_one_name_are_one_run(scale: str) -> None:
    """Tables share run folders: what one trains must be what the other would."""
    made: dict[str, Recipe] = {}
    for table, where in SCALED:
        for trip in trips(DEFINITIONS[table], where) if where == scale else ():
            other = made.setdefault(trip.name, trip.recipe)
            assert other.stage_digest("decoder") == trip.recipe.stage_digest("decoder"), trip.name
    assert len({r.stage_digest("decoder") for r in made.values()}) == len(made), "two runs would train the same"


@pytest.mark.parametrize(("table", "scale"), SCALED)
def test_every_cell_is_measured_by_some_evaluation(table: str, scale: str) -> None:
    d = DEFINITIONS[table]
    by_key = {trip.key: trip for trip in trips(d, scale)}
    for key, row in d.rows.items():
        for name in row.paper:
            column, found = d.columns[name], by_key[row.run or ""].evaluations
            if column.metric == PARAMETERS:
                continue
            protocols = {"classification": ("map", "robustness"), "reconstruction": ("map", "reconstruction")}
            asked = row.protocol if row.protocol and column.protocol == "reconstruction" else column.protocol
            kinds = protocols.get(asked, (asked.rpartition("-")[0] if asked.startswith("upscale") else asked,))
            fits = [r for r in found if r.evaluate.protocol in kinds]
            assert fits, (key, name)
            if asked.startswith("upscale"):
                assert any(int(asked.rpartition("-")[2]) in r.evaluate.factors for r in fits)
            if column.attack:
                eps = row.eps if row.eps is not None else d.scale(scale).eps
                attacks = [(a.kind, a.norm, a.eps) for r in fits for a in r.evaluate.attacks]
                assert (column.attack, column.norm, eps) in attacks, (key, name)


@pytest.mark.parametrize("table", [d.id for d in DEFINITIONS.values() if d.claims])
def test_the_papers_own_figures_are_ordered_as_claimed(table: str) -> None:
    d = DEFINITIONS[table]
    for claim in d.claims:
        sign = 1 if UNITS[d.columns[claim.column].metric].direction == "higher" else -1
        figures = [sign * mean(d.rows[key].paper[claim.column]) for key in claim.order]
        assert all(worse < better for worse, better in pairwise(figures)), claim


def test_what_the_paper_prints_twice_is_the_same_here() -> None:
    t1, t5, t7, a2 = (DEFINITIONS[f"arae-{name}"].rows for name in ("main-T1", "main-T5", "main-T7", "new-A2"))
    for key, row in t5.items():
        assert {k: round(mean(v), 3) for k, v in a2[key].paper.items()} == pytest.approx(row.paper, abs=6e-4)
    for run_key, other in (("std", "std-all"), ("ar", "ar-all")):
        assert {k: v for k, v in t7[run_key].paper.items() if k != "parameters"} == t1[other].paper
        assert t5[f"{run_key}-1"].paper == {k: mean(v) for k, v in t1[other].paper.items()}


def test_units_are_those_of_the_metrics() -> None:
    for name in set(UNITS) - {PARAMETERS}:
        assert UNITS[name].direction == METRICS[name].direction
        assert UNITS[name].factor == (100 if METRICS[name].unit == "fraction" else 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": {}}, "unknown key colums"),
        ({"claims": [{"column": "psnr", "order": ["bad", "nosuch"]}]}, "'nosuch' is none of bad, good"),
        ({"claims": [{"column": "ssim", "order": ["bad", "good"]}]}, "'ssim' is none of psnr"),
        ({"full": {"says": "x", "evaluations": [{}]}}, "give recipe and prefix, or runs_of"),
    ],
)
def test_a_definition_that_can_not_be_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(plain() | change))
    with pytest.raises(InputError, match=message):
        load(path)


# ---- rules


@pytest.mark.parametrize(
    ("bad", "good", "scale", "outcome", "verdict"),
    [
        ((15.2, 0.1), (17.5, 0.1), "full", "holds", "reproduced"),
        ((15.2, 0.1), (17.5, 0.1), "small", "holds", "same direction"),
        ((15.2, 0.1), (16.8, 0.1), "full", "holds", "same direction"),  # 18 is more than 1 dB above 16.9
        ((15.2, 0.1), (16.8, 0.21), "full", "holds", "reproduced"),  # but not above 17.01
        ((18.0, 0.1), (15.0, 0.1), "full", "contradicted", "not reproduced"),
        ((16.0, 0.3), (16.4, 0.3), "small", "undecided", "not reproduced"),  # 0.4 is within hypot(0.3, 0.3)
        ((16.0, 0.3), (16.43, 0.3), "small", "holds", "same direction"),
        ((None, 0), (17.5, 0.1), "small", "not measured", "not run"),
        (None, (17.5, 0.1), "small", "not measured", "not run"),
        (None, None, "full", "not measured", "not run"),
    ],
)
def test_a_verdict_follows_its_rules(
    bad: tuple[float | None, float] | None, good: tuple[float, float] | None, scale: str, outcome: str, verdict: str
) -> None:
    made = {key: [record(*given)] if given else [] for key, given in (("bad", bad), ("good", good))}
    judged = judge(Definition.model_validate(plain()), scale, [], made)
    assert [each.outcome for each in judged.orderings] == [outcome]
    assert judged.verdict == verdict
    assert judged.said.startswith(verdict)


def test_one_contradiction_outweighs_what_holds() -> None:
    document = plain() | {
        "claims": [{"column": "psnr", "order": order} for order in (["bad", "good"], ["good", "bad"])]
    }
    judged = judge(Definition.model_validate(document), "full", [], {"bad": [record(15)], "good": [record(18)]})
    assert judged.verdict == "not reproduced"
    assert judged.said == "not reproduced (1 of 2 orderings hold, 1 contradicted)"


def test_a_count_alone_is_no_run() -> None:
    d = DEFINITIONS["arae-main-T7"]
    judged = judge(d, "small", trips(d, "small"), {})
    assert "holds" in [each.outcome for each in judged.orderings], "the parameters are ordered as the paper has them"
    assert judged.said == "not run"


def test_a_count_beside_undecided_measurements_reproduces_nothing() -> None:
    d = DEFINITIONS["arae-main-T7"]
    made: dict[str, list[Record]] = {}
    for row in d.rows.values():
        for column in d.columns.values():
            if column.metric != PARAMETERS:
                protocol = row.protocol if row.protocol and column.protocol == "reconstruction" else column.protocol
                made.setdefault(row.run or "", []).append(record(0.5, metric=column.metric, protocol=protocol))
    judged = judge(d, "small", trips(d, "small"), made)
    outcomes = {(d.columns[each.column].metric == PARAMETERS, each.outcome) for each in judged.orderings}
    assert outcomes == {(True, "holds"), (False, "undecided")}
    assert judged.verdict == "not reproduced"


def test_an_order_undecided_in_part_is_not_reproduced_in_full() -> None:
    document = plain()
    document["rows"]["best"] = {"label": "best", "run": "best", "paper": {"psnr": 18.1}}
    document["claims"] = [{"column": "psnr", "order": ["bad", "good", "best"]}]
    made = {"bad": [record(15)], "good": [record(18)], "best": [record(18.05)]}
    judged = judge(Definition.model_validate(document), "full", [], made)
    assert all(cell.agrees for cell in judged.cells.values())
    assert judged.said == "same direction (1 of 2 orderings hold, 1 undecided)"


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """56 of 70 against 48 of 80, in Newcombe (1998), table II, method 10: 0.0524 to 0.3339."""
    a, b = (Cell(None, None, right / n, wilson(right, n)) for right, n in ((56, 70), (48, 80)))
    assert difference(a, b) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_cell_takes_the_strongest_attack_at_its_own_radius() -> None:
    def under(eps: float, steps: int, value: float, **more: object) -> Record:
        threat = Threat(norm="l2", eps=eps, steps=steps, step_size=0.1)
        more = {"metric": "robust_accuracy", "protocol": "classification", "unit": "fraction", "threat": threat} | more
        return record(value, 0.01, **more)

    document = plain() | {"claims": []}
    document["columns"] = {
        "robust": {
            "label": "r",
            "metric": "robust_accuracy",
            "protocol": "classification",
            "attack": "pgd",
            "norm": "l2",
        }
    }
    document["rows"] = {"one": {"label": "one", "run": "one", "eps": 0.5, "paper": {"robust": 40}}}
    there = [under(0.5, 50, 0.4), under(0.5, 10, 0.5), under(1.0, 99, 0.1), record(0.9, metric="robust_accuracy")]
    judged = judge(Definition.model_validate(document), "full", [], {"one": there})
    assert judged.cells["one", "robust"].value == pytest.approx(40)
    assert judged.records == (there[0],)


# ---- the page and the list


def test_the_page_is_that_of_the_records() -> None:
    assert show.PAGE.read_text() == show.page(), "python -m benchmarks.tables makes docs/tables.md anew"


def test_the_list_has_every_table_with_state_and_cost() -> None:
    text = "\n".join(show.listing())
    for table in DEFINITIONS:
        assert f"{table}: " in text
    assert text.count("which is not built yet") == len(LATER)
    assert text.count("GPU-hours") == len(DEFINITIONS) - len(LATER) + 1


@pytest.mark.parametrize(("table", "scale"), SCALED)
def test_every_table_is_planned(table: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "count", lambda definition, scale: pytest.fail("counted.json is of other recipes"))
    made = planned.planned(DEFINITIONS[table], scale)
    assert min(made.encoders, made.decoders, made.evaluation) > 0
    assert set(made.parameters) == set(DEFINITIONS[table].used)
    low, high = (10, 5000) if scale == "full" else (0.05, 20)
    assert low < made.hours(scale) < high


def test_what_was_counted_is_what_plan_counts() -> None:
    d = DEFINITIONS["arae-new-A3"]
    there = {trip.key: trip.recipe for trip in trips(d, "small")}
    networks = Networks(there["eps-1"], (3, 32, 32), 10)
    kept = planned.planned(d, "small")
    at_zero, under_attack = (networks.encoder_step(there[key].encoder.attack) for key in ("eps-0", "eps-1"))
    passes = 40_000 * (3 * at_zero + (3 + 6) * under_attack)  # 3 epochs at 0 and 0.5, 1 at each of six further radii
    assert kept.encoders == pytest.approx(passes, rel=1e-3)
    assert kept.decoders == pytest.approx(8 * 40_000 * networks.decoder_step(1), rel=1e-3)
    assert networks.decoder is not None
    assert set(kept.parameters.values()) == {parameters(networks.decoder)}
