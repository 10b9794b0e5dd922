"""The map of a sweep says what its records say. Every value in this file is made up for the test."""

import csv
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from arae.config import dump_recipe, load_recipe
from arae.errors import InputError
from arae.records import Model, Record, Threat, write_records
from tune.front import contenders, front, hypervolume
from tune.journal import Entry, Journal
from tune.map import write_map
from tune.map.cost import growth
from tune.map.draw import Drawn, LeftOut, style
from tune.map.heat import draw_heat
from tune.map.paper import paper_of
from tune.map.points import Measure
from tune.map.table import map_table
from tune.map.words import sentences
from tune.results import load_sweep
from tune.space import Space

SETS = {
    "pixel": {"decoder.losses.feature": 0},
    "pixel+feature": {"decoder.losses.feature": 0.01},
    "all <three>": {"decoder.losses.feature": 0.01, "decoder.losses.adversarial": 0.001},
}
HALF = {"dB": 0.12, "1": 0.012, "fraction": 0.021}
NO_WEIGHTS = "no ImageNet weights of AlexNet <here> & now"


def space_of(radii, sets, seeds, **search) -> dict:
    axes = {
        "encoder.attack.eps": {"grid": list(radii)},
        "loss": {"grid": {name: SETS[name] for name in sets}},
        "seed": {"grid": list(seeds)},
    }
    return {"about": "Which radius & which losses?", "axes": axes, "search": search}


def measured(recipe, key: str, small: float, radii) -> list[Record]:
    """Records of a trial, as its recipe and a small number of its own have them."""
    eps, feature = recipe.encoder.attack.eps, recipe.decoder.losses.feature
    psnr = 15 + 6 * eps / (eps + 0.3) - 1.9 * eps + 0.8 * (feature > 0) + 0.2 * small
    values = {("clean_accuracy", None): 0.92 - 0.11 * eps + 0.01 * small}
    for radius in radii:
        values["robust_accuracy", radius] = min(max(0.05 + 0.55 * eps**0.5 - 0.25 * radius * eps / (0.4 + eps), 0), 1)
        values["robust_accuracy", radius] += 0.01 * small
    values |= {("psnr", None): psnr, ("ssim", None): psnr / 30, ("lpips", None): 0.9 - psnr / 40}
    records = []
    for (metric, radius), value in values.items():
        classified = metric.endswith("accuracy")
        unit = {"psnr": "dB", "ssim": "1", "lpips": "1"}.get(metric, "fraction")
        for steps in (10, 50) if radius else (0,):  # the weaker attack leaves more
            threat = Threat(norm="l2", eps=radius, steps=steps, step_size=radius / 4) if radius else None
            shown = value + (0.03 if steps == 10 else 0)
            fields = {
                "metric": metric, "value": shown, "unit": unit, "n": 1000, "threat": threat,
                "direction": "lower" if metric == "lpips" else "higher", "dataset": recipe.data.name, "split": "test",
                "interval": (shown - HALF[unit], shown + 1.1 * HALF[unit]),
                "protocol": "classification" if classified else "reconstruction",
                "digest": hashlib.sha256(f"{key}{classified}".encode()).hexdigest(),
                "model": Model(encoder=recipe.encoder.name, layer="layer4", train_norm="l2" if eps else None,
                               train_eps=eps, decoder=None if classified else "mirror"),
                "stage": "encoder" if classified else "decoder", "seed": recipe.seed, "scale": recipe.scale,
                "git": "0123abc", "versions": {"torch": "9.9"}, "time": "2000-01-01T00:00:00+00:00",
            }  # fmt: skip
            records.append(Record(**fields))
    return records


def outcome(stage: str, key: str, trained: bool, seconds: float) -> dict:
    return {
        "stage": stage, "key": key, "trained": trained, "measured": trained, "steps": 300, "seconds": seconds,
        "workers": 2, "evaluation_s": 36.0,
    }  # fmt: skip


def make_sweep(
    folder: Path, space: dict, spoiled=(), base: str = "cifar10-resnet18", without=(), radii=(0.5, 1.0)
) -> Path:
    """A sweep's folder as the driver leaves it; spoiled: (state, trial's number); without: metrics with no value."""
    folder.mkdir(parents=True)
    recipe = load_recipe(base).replace({"name": folder.name, "decoder.losses.preset": None})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    read, journal = Space.model_validate(space), Journal(folder)
    journal.add("command", state="begun")
    made = set()
    for number, point in enumerate(read.points(read.search.samples)):
        one = read.recipe(recipe, point)
        name = hashlib.sha256(repr(point.values).encode()).hexdigest()[:12]
        if name in journal.entries():
            continue  # drawn axes that are not there make no other point
        entry = Entry(name, dict(point.values), number)
        journal.begin(entry)
        entry.state = {n: state for state, n in spoiled}.get(number, "finished")
        keys = {"encoder": f"{one.encoder.attack.eps:g}-{one.seed}", "decoder": name}
        for stage, key in list(keys.items())[: None if entry.state == "finished" else 1]:
            journal.stage(entry, outcome(stage, key, key not in made, 3600 if stage == "encoder" else 900))
            made.add(key)
        if entry.state == "finished":
            records = measured(one, name, one.seed % 3 - 1, radii)
            records = [
                r.model_copy(update={"value": None, "interval": None, "reason": NO_WEIGHTS})
                if r.metric in without
                else r
                for r in records
            ]
            (folder / name).mkdir()
            write_records(folder / name / "records.jsonl", records)
            strongest = [r for r in records if r.threat is None or (r.threat.eps, r.threat.steps) == (1.0, 50)]
            entry.objectives = {r.metric: r.value for r in strongest if r.value is not None} | {"gpu_hours": 1.25}
        else:
            entry.reason = (
                "its loss is not finite <at step 3>" if entry.state == "failed" else "its encoder at step 100"
            )
        journal.end(entry)
    journal.add("command", state="ended")
    return folder


class Page(HTMLParser):
    """What a page holds; checks that every element is closed where it should be."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.titles: dict[str, list[str]] = {}
        self.cells: list[dict] = []
        self.text = self.figure = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids += [a["id"]] if "id" in a else []
        self.addresses += [a[k] for k in ("src", "href", "action", "srcset", "data", "poster") if a.get(k)]
        self.addresses += re.findall(r"url\(([^)]*)\)", a.get("style", "") + a.get("clip-path", ""))
        if tag == "svg":
            self.figure = a["id"]
            self.titles[self.figure] = []
        if tag == "title" and "svg" in self.open:
            self.titles[self.figure].append("")
        if tag == "td" and "data-metric" in a:
            self.cells.append(a)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["title"] and "svg" in self.open:
            self.titles[self.figure][-1] += data
        self.text += data.replace("\u00a0", " ")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """3 radii × 2 losses × 2 seeds, of which one trial failed and one was cut short; LPIPS has no weights."""
    folder = make_sweep(
        tmp_path_factory.mktemp("runs") / "sweep",
        space_of((0, 0.5, 1), ("pixel", "pixel+feature"), (1, 2), objectives=["robust_accuracy", "psnr", "lpips"]),
        spoiled=[("failed", 3), ("stopped", 9)],
        without=("lpips",),
        base="cifar10-resnet18-small",
    )
    hours = {"gpu_hours": 19.5, "gpu_hours_there": 2.0}
    plan = {"trials": 12, "stages": {"encoder": 6, "decoder": 12}, "storage_bytes": 3_200_000_000} | hours
    (folder / "plan.json").write_text(json.dumps(plan))
    path = write_map(folder)
    return folder, path, Page(path.read_text())


def every_record(folder: Path) -> dict[tuple[str, int], dict]:
    found = {}
    for path in folder.glob("*/records.jsonl"):
        for line, text in enumerate(path.read_text().splitlines(), 1):
            found[path.parent.name, line] = json.loads(text)
    return found


def test_every_number_of_the_table_is_the_mean_of_the_records_it_names(reported) -> None:
    folder, _, page = reported
    records = every_record(folder)
    assert len(page.cells) == 6 * 6  # clean, robust at two radii, PSNR, SSIM, hours; no LPIPS
    for cell in [cell for cell in page.cells if cell["data-metric"] != "gpu_hours"]:
        named = re.findall(r"(\w{12})/records\.jsonl, line (\d+), recipe (\w{12}), seed (\d)", cell["title"])
        sources = [records[trial, int(line)] for trial, line, *_ in named]
        assert {source["metric"] for source in sources} == {cell["data-metric"]}
        assert [(s["digest"][:12], s["seed"]) for s in sources] == [(digest, int(seed)) for *_, digest, seed in named]
        assert float(cell["data-value"]) == pytest.approx(np.mean([source["value"] for source in sources]), abs=1e-12)
        assert len({s["seed"] for s in sources}) == len(sources)


def test_seeds_are_one_point_whose_bar_reaches_over_their_intervals(reported) -> None:
    folder, *_ = reported
    table = map_table(load_sweep(folder))
    assert [len(group.trials) for group in table.groups] == [2, 2, 1, 1, 2, 2]  # by losses, then by radius
    assert [group.eps for group in table.groups] == [0, 0.5, 1, 0, 0.5, 1]
    for group in table.groups:
        for measure in (Measure("psnr"), Measure("robust_accuracy", "l2", 0.5)):
            cell, records = group.cell(measure), [measure.record(trial) for trial in group.trials]
            assert cell.value == pytest.approx(np.mean([r.value for r in records]))
            assert cell.low == min(r.interval[0] for r in records)
            assert cell.high == max(r.interval[1] for r in records)
            assert [trial.recipe.seed for trial in group.trials] == sorted(trial.recipe.seed for trial in group.trials)


def test_robust_accuracy_is_that_under_the_strongest_attack_of_each_radius(reported) -> None:
    table = map_table(load_sweep(reported[0]))
    assert [(m.norm, m.eps) for m in table.threats] == [("l2", 0.5), ("l2", 1.0)]
    for group, measure in itertools.product(table.groups, table.threats):
        assert {s.record.threat.steps for s in group.cell(measure).sources} == {50}
    assert "PGD-50" in reported[2].text
    assert "PGD-10" not in reported[2].text


def test_the_front_is_that_of_the_points_and_of_their_intervals(reported) -> None:
    folder, _, page = reported
    table = map_table(load_sweep(folder))
    assert [m.metric for m in table.objectives] == ["robust_accuracy", "psnr"]  # LPIPS has no value anywhere
    cells = [[group.cell(m) for m in table.objectives] for group in table.groups]
    best = {i + 1 for i in front([[c.value for c in row] for row in cells], (1, 1))}
    reach = contenders([[c.low for c in row] for row in cells], [[c.high for c in row] for row in cells], (1, 1))
    assert table.standing.front == best
    assert table.standing.near == {i + 1 for i in reach} - best
    assert table.standing.near  # or the test says little
    assert page.text.count("on the front") >= len(best)
    assert page.text.count("not told from the front") == len(table.standing.near)


def test_the_hypervolume_grows_to_that_of_all_finished_trials(reported) -> None:
    table = map_table(load_sweep(reported[0]))
    found = growth(table)
    assert {trial for *_, trial in found} == {trial.id for trial in table.sweep.finished}
    shares = [share for _, share, _ in found]
    assert shares == sorted(shares)
    values = [[t.entry.objectives[name] for name in ("robust_accuracy", "psnr")] for t in table.sweep.finished]
    assert shares[-1] == pytest.approx(hypervolume(values, (1, 1), np.max(values, axis=0), np.min(values, axis=0)))


def test_the_page_needs_nothing_but_itself(reported) -> None:
    folder, path, page = reported
    text = path.read_text()
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert "://" not in text
    assert len(page.ids) == len(set(page.ids))
    for address in page.addresses:
        if address.startswith("#"):
            assert address[1:] in page.ids
        elif not address.startswith("data:"):
            assert (folder / address).is_file()


def test_hovering_a_point_shows_its_values_trials_and_records(reported) -> None:
    folder, _, page = reported
    assert set(page.titles) == {"map", "curves", "heat", "cost", "hypervolume"}
    trials = {path.parent.name for path in folder.glob("*/records.jsonl")}
    for name in ("map", "curves", "heat"):
        points = [title for title in page.titles[name] if title.startswith("point ")]
        assert {int(title.split()[1].rstrip(":")) for title in points} == set(range(1, 7))
        assert set(re.findall(r"(\w{12})/records", " ".join(points))) == trials
    assert all(any(trial in title for title in page.titles["cost"]) for trial in trials)


def test_what_is_not_there_is_said(reported) -> None:
    folder, _, page = reported
    assert NO_WEIGHTS in page.text  # beside the table, and why it is no part of the front
    assert "Of 12 trials 10 finished, 1 cut short and 1 failed." in page.text
    assert "its loss is not finite <at step 3>" in page.text
    assert "its encoder at step 100" in page.text
    assert "no-reconstructions" in page.ids
    assert not (folder / "reconstructions.png").exists()
    assert "A small sweep" in page.text


def test_plan_and_spending_and_what_sharing_saved(reported) -> None:
    _, path, page = reported
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td></tr>', path.read_text())
    told = {what: (planned, spent) for what, planned, spent in rows}
    assert told["trials"] == ("12", "12 at their end, 10 of them finished")
    assert told["encoders trained"] == ("6", "6")
    assert told["decoders trained"] == ("12", "10")
    # 6 encoders of 2 h and 10 decoders of half an hour, each measured for 36 s
    assert told["device-hours"] == ("19.5, and 2 in stages that were there", f"{6 * 2.01 + 10 * 0.51:.3g}")
    assert told["storage"][0] == "3.2 GB"
    assert "12 trials needed an encoder, for which 6 were trained" in page.text
    assert f"sharing saved {6 * 2.01:.3g} hours" in page.text


def test_the_files_for_a_paper(reported) -> None:
    folder, *_ = reported
    for name in ("map", "curves", "heat", "cost", "hypervolume"):
        pdf = (folder / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/Type3" not in pdf  # journals refuse such fonts
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    records = every_record(folder)
    assert len(rows) == len(records)
    for row in rows:
        source = records[row["trial"], int(row["line"])]
        assert (row["metric"], row["digest"]) == (source["metric"], source["digest"])
        assert (float(row["value"]) if row["value"] else None) == source["value"]
        assert row["loss"] in SETS


def test_the_papers_points_are_its_tables(reported) -> None:
    paper = paper_of(map_table(load_sweep(reported[0])))
    assert paper.table == "arae-new-A3"
    assert dict(paper.points(Measure("psnr")))[1.5] == 19.6278
    assert dict(paper.points(Measure("clean_accuracy")))[0] == pytest.approx(0.9493)
    assert paper.points(Measure("robust_accuracy", "l2", 1.0)) == [(1.0, pytest.approx(0.5224))]  # at that radius alone
    assert paper.points(Measure("robust_accuracy", "linf", 1.0)) == []
    assert any("of the width" in said for said in paper.differs)
    assert "Inverting Adversarially Robust Networks" in reported[2].text
    assert "not to be compared" in reported[2].text


WEIGHTS = {"decoder.losses.feature": {"log-uniform": [1e-4, 1e-1]}}
ODD = {
    "drawn weights": (WEIGHTS, {"samples": 4}, {"curves", "heat", "reconstructions"}),
    "radius alone": ({"encoder.attack.eps": {"grid": [0, 1]}}, {}, {"heat", "reconstructions"}),
    "radius drawn": ({"encoder.attack.eps": {"uniform": [0, 1]}}, {"samples": 3}, {"heat", "reconstructions"}),
    "two weights": (
        {"decoder.losses.feature": {"grid": [0, 0.1]}, "decoder.losses.adversarial": {"grid": [0, 0.1]}},
        {},
        {"curves", "reconstructions"},
    ),
    "conditional": (
        {
            "encoder.attack.eps": {"grid": [0, 1]},
            "loss": {"grid": {"pixel": {"decoder.losses.feature": 0}, "both": {}}},
            "decoder.losses.feature": {"log-uniform": [1e-4, 1e-1], "when": {"loss": "both"}},
        },
        {"samples": 2},
        {"heat", "reconstructions"},
    ),
    "one point": ({"seed": {"grid": [5]}}, {}, {"curves", "heat", "reconstructions", "hypervolume"}),
    "many lines": (
        {"encoder.attack.eps": {"grid": [0, 1]}, "decoder.lr": {"grid": [i / 1000 for i in range(1, 14)]}},
        {},
        {"heat", "reconstructions"},
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_spaces_of_any_shape(case: str, tmp_path: Path) -> None:
    axes, search, missing = ODD[case]
    path = write_map(make_sweep(tmp_path / "sweep", {"axes": axes, "search": search}, radii=(1.0,)))
    page = Page(path.read_text())
    assert {name.removeprefix("no-") for name in page.ids if name.startswith("no-")} == missing
    every = {"map", "curves", "heat", "reconstructions", "cost", "hypervolume"}
    assert {file.stem for file in path.parent.glob("*.png")} == every - missing


def test_a_sweep_without_a_finished_trial_and_one_that_went_on(tmp_path: Path) -> None:
    space = space_of((0, 1), ("pixel",), (1,))
    folder = make_sweep(tmp_path / "sweep", space, spoiled=[("failed", 0), ("stopped", 1)])
    (folder / "heat.png").write_bytes(b"of an earlier report")
    page = Page(write_map(folder).read_text())
    assert "No trial is finished." in page.text
    assert "There is no front" not in page.text
    assert not (folder / "heat.png").exists()


def test_norms_have_lines_of_their_own_that_begin_at_standard_training(tmp_path: Path) -> None:
    ball = {
        "none": {"encoder.attack.eps": 0},
        "linf": {"encoder.attack.norm": "linf", "encoder.attack.eps": "8/255"},
        "l2": {"encoder.attack.norm": "l2", "encoder.attack.eps": 1},
    }
    table = map_table(load_sweep(make_sweep(tmp_path / "sweep", {"axes": {"ball": {"grid": ball}}})))
    assert {line.label: [group.norm for group in line.groups] for line in table.lines} == {
        "ℓ₂": [None, "l2"],
        "ℓ∞": [None, "linf"],
    }
    assert paper_of(table) is None  # the paper's table is of one norm


def test_a_record_without_interval_and_overlapping_ends_claim_nothing(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep", space_of((0, 0.5), ("pixel",), (1,)))
    for path in folder.glob("*/records.jsonl"):
        wide = [
            json.loads(line) | ({"interval": [0, 99]} if '"psnr"' in line else {"interval": None})
            for line in path.read_text().splitlines()
        ]
        path.write_text("".join(json.dumps(each) + "\n" for each in wide))
    table = map_table(load_sweep(folder))
    said = " ".join(sentences(table))
    assert "PSNR goes from" in said
    assert "(their intervals overlap)" in said
    assert table.groups[0].cell(Measure("ssim")).low == table.groups[0].cell(Measure("ssim")).value


def test_missing_cells_of_the_heat_map_are_not_numbers(reported, tmp_path: Path) -> None:
    spoiled = [("failed", 2)]
    table = map_table(load_sweep(make_sweep(tmp_path / "sweep", space_of((0, 1), list(SETS)[:2], (1,)), spoiled)))
    with style():
        drawn = draw_heat(table)
    assert isinstance(drawn, Drawn)
    titles = [each.text for each in ElementTree.fromstring(drawn.svg).iter("title")]
    assert len(titles) == 3 * 3  # three measures of three points
    assert isinstance(draw_heat(map_table(load_sweep(make_sweep(tmp_path / "one", space_of((0,), ("pixel",), (1,)))))),
                      LeftOut)  # fmt: skip


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sweep"):
        write_map(tmp_path)
