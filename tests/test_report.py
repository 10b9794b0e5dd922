"""The report says what the records say. Every value in this file is made up for the test."""

import base64
import re
from html.parser import HTMLParser

import pytest
import torch

from arae.config import Recipe
from arae.errors import InputError
from arae.records import Model, Record, Threat, write_records
from arae.report import Grid, collect, summary, write_report
from arae.report.table import number_text, radius_text, tabulate, threat_text
from arae.report.words import convergence, sentences

WEAK = Threat(norm="l2", eps=1.5, steps=10, step_size=0.375)
STRONG = Threat(norm="l2", eps=1.5, steps=50, step_size=0.075, restarts=5)
SMALL = Threat(norm="l2", eps=0.75, steps=50, step_size=0.0375, restarts=5)
NO_WEIGHTS = "no ImageNet weights of AlexNet <here> & now"
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}


def record(eps, metric, value, protocol="classification", threat=None, **changes) -> Record:
    unit = {"psnr": "dB", "ssim": "1", "lpips": "1"}.get(metric, "fraction")
    half = {"dB": 0.21, "1": 0.011, "fraction": 0.023}[unit]
    fields = {
        "metric": metric, "value": value, "unit": unit, "direction": "lower" if metric == "lpips" else "higher",
        "interval": None if value is None else (max(value - half, 0.0), value + half * 1.1), "n": 1000,
        "reason": NO_WEIGHTS if value is None else None, "dataset": "fashion-mnist", "split": "test",
        "protocol": protocol, "threat": threat, "digest": f"{eps:g}".replace(".", "").ljust(64, "a"),
        "model": Model(encoder="small-cnn", layer="conv3", decoder="mirror", train_norm="l2", train_eps=eps),
        "stage": "decoder", "seed": 3, "scale": "small", "git": "0123abc", "time": "2000-01-01T00:00:00+00:00",
        "versions": {"torch": "9.9"}, "hardware": {"device": "test <device>", "world_size": 2},
    }  # fmt: skip
    return Record(**(fields | changes))


def trip(eps, clean, robust, psnr, ssim, attacked) -> list[Record]:
    """All the records of one radius."""
    out = [record(eps, "clean_accuracy", clean)]
    pairs = zip((SMALL, WEAK, STRONG), robust, strict=True)
    out += [record(eps, "robust_accuracy", value, threat=threat) for threat, value in pairs]
    out += [record(eps, "psnr", psnr, "reconstruction"), record(eps, "ssim", ssim, "reconstruction")]
    out += [record(eps, "lpips", None, "reconstruction")]
    out += [record(eps, "psnr", attacked, "reconstruction", STRONG)]
    out += [record(eps, "ssim", ssim - 0.05, "reconstruction", STRONG)]
    return [*out, record(eps, "psnr", 12.25, "mean-image"), record(eps, "psnr", 13.5, "other-features")]


RECORDS = [
    *trip(0.0, 0.886, (0.1137, 0.004, 0.001), 23.11, 0.8122, 17.04),
    *trip(0.75, 0.842, (0.7213, 0.512, 0.509), 23.52, 0.8268, 21.33),
    *trip(1.5, 0.798, (0.7031, 0.626, 0.6213), 23.84, 0.8391, 22.06),
]
RECIPE = Recipe.model_validate(
    {
        "name": "demo",
        "data": {"name": "fashion-mnist", "source": "/a<b>&c"},
        "encoder": {"name": "small-cnn", "epochs": 4},
    }
)


class Page(HTMLParser):
    """Tables, notes, pictures and addresses of a page; checks that every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.data: dict[str, list[dict]] = {}
        self.addresses: list[str] = []
        self.images: dict[str, bytes] = {}
        self.notes: dict[str, str] = {}
        self.text = ""
        self.where = self.note = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.addresses += [a[k] for k in ("src", "href", "action", "srcset", "data", "poster") if a.get(k)]
        if tag == "img":
            self.images[a["id"]] = base64.b64decode(a["src"].removeprefix("data:image/png;base64,"), validate=True)
        if tag == "table":
            self.where = a["id"]
            self.tables[self.where], self.data[self.where] = [], []
        elif tag == "tr":
            self.tables[self.where].append([])
        elif tag in ("td", "th"):
            self.tables[self.where][-1].append("")
            if tag == "td":
                self.data[self.where].append(a)
        elif tag == "li":
            self.note = a.get("id", "")
            self.notes |= {self.note: ""} if self.note else {}
        elif tag == "small" and self.open[-1] in ("td", "th"):
            self.tables[self.where][-1][-1] += "|"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "li":
            self.note = ""

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[self.where][-1][-1] += data.replace("\u00a0", " ")
        if self.note:
            self.notes[self.note] += data
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.manual_seed(0)
    images = torch.rand(5, 1, 28, 28)
    rows = [("standard (ε = 0)", images * 0.9), ("ε = 1.5", images * 0.95), ("ε = 1.5, attacked", images * 0.8)]
    commands = [("On a cluster", "arae train cifar10-resnet18 --workers 8 --address auto 'a<b'")]
    path = write_report(tmp_path_factory.mktemp("run"), RECORDS, RECIPE, Grid(images, rows), commands)
    return path, Page(path.read_text())


def test_every_number_in_the_tables_is_its_records(report):
    _, page = report
    table = tabulate(RECORDS)
    expected = {"accuracy": 1 + 3, "quality": 3 + 2 + 2}
    for name, width in expected.items():
        head, *body = page.tables[name]
        assert len(head) == width + 1
        assert [row[0] for row in body] == ["standard (ε = 0)", "ε = 0.75", "ε = 1.5"]
    cells = iter([cell for name in expected for row in page.tables[name][1:] for cell in row[1:]])
    data = iter(page.data["accuracy"] + page.data["quality"])
    for name in expected:
        classification = name == "accuracy"
        columns = [c for c in table.columns if (c.protocol == "classification") == classification]
        for row in table.rows:
            for column in columns:
                key = (row.eps, column.metric, column.protocol, column.threat)
                (source,) = [r for r in RECORDS if (r.model.train_eps, r.metric, r.protocol, r.threat) == key]
                shown, attributes = next(cells), next(data)
                if source.value is None:
                    assert shown == "—1"
                    continue
                assert float(attributes["data-value"]) == source.value
                scale, step = {"fraction": (100, 0.05), "dB": (1, 0.005), "1": (1, 0.0005)}[source.unit]
                value, low, high = map(float, re.findall(r"[\d.]+", shown.replace(" … ", " ")))
                assert value == pytest.approx(scale * source.value, abs=step + 1e-9)
                assert (low, high) == pytest.approx([scale * end for end in source.interval], abs=step + 1e-9)


def test_a_missing_value_shows_its_reason(report):
    _, page = report
    assert page.notes == {"quality-note-1": NO_WEIGHTS}
    assert "#quality-note-1" in page.addresses


def test_heads_give_direction_unit_threat_and_n(report):
    _, page = report
    heads = [*page.tables["accuracy"][0][1:], *page.tables["quality"][0][1:]]
    assert heads[0] == "Clean accuracy ↑ (%)|n = 1,000"
    assert f"Robust accuracy ↑ (%)|{threat_text(STRONG)}|n = 1,000" in heads
    assert "PSNR ↑ (dB)|n = 1,000" in heads
    assert "LPIPS ↓" in heads
    assert f"SSIM ↑|from attacked images, {threat_text(STRONG)}|n = 1,000" in heads
    assert "PSNR ↑ (dB)|mean image (baseline)|n = 1,000" in heads


def test_the_best_of_a_column_is_marked_and_baselines_are_not(report):
    path, _ = report
    marked = re.findall(r'<td [^>]*data-value="([^"]+)"><b class="best">', path.read_text())
    assert [float(v) for v in marked] == [0.886, 0.7213, 0.626, 0.6213, 23.84, 0.8391, 22.06, 0.8391 - 0.05]


def test_the_page_needs_nothing_but_itself(report):
    path, page = report
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not re.search(r"<script|<link|<iframe|url\(|@import|https?://", path.read_text())
    for name, picture in page.images.items():
        assert picture == path.with_name(f"{name}.png").read_bytes()
    assert set(page.images) == {"map", "reconstructions"}
    assert sorted(p.name for p in path.parent.iterdir()) == ["map.png", "reconstructions.png", "report.html"]


def test_text_from_outside_is_escaped(report):
    path, page = report
    for hostile in ("/a<b>&c", "'a<b'", "test <device>"):
        assert hostile in page.text
        assert hostile not in path.read_text()


def test_pictures_have_the_size_of_a_figure_and_content(report):
    from PIL import Image

    path, _ = report
    for name, least in (("map.png", (1600, 600)), ("reconstructions.png", (800, 600))):
        with Image.open(path.with_name(name)) as picture:
            assert picture.width >= least[0]
            assert picture.height >= least[1]
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 50


def test_words_follow_the_numbers():
    said = " ".join(sentences(tabulate(RECORDS)))
    assert "3 encoders (small-cnn) trained on fashion-mnist at radii ε = 0 (standard training), 0.75 and 1.5" in said
    assert (
        "the standard encoder classifies 88.6 % correctly and the encoder trained at ε = 1.5 classifies 79.8 %: "
        "8.8 points less" in said
    )
    assert "still right on 0.1 %, the encoder trained at ε = 1.5 on 62.1 %: 62.0 points more" in said
    assert "PSNR is best for the encoder trained at ε = 1.5 (23.84 dB; the standard encoder: 23.11 dB)" in said
    assert "falls from 23.11 dB to 17.04 dB for the standard encoder" in said
    assert "Every decoder beats the mean image by 10.86 dB or more" in said


def test_words_turn_when_the_numbers_do():
    records = [
        *trip(0.0, 0.70, (0.6, 0.6, 0.6), 25.0, 0.9, 26.0),
        *trip(1.5, 0.71, (0.3, 0.3, 0.3), 12.0, 0.9, 11.0),
    ]
    said = " ".join(sentences(tabulate(records)))
    assert "1.0 points more, within overlapping 95 % intervals" in said
    assert "30.0 points less" in said
    assert "PSNR is best for the standard encoder (25.00 dB; the encoder trained at ε = 1.5: 12.00 dB)" in said
    assert "goes from 25.00 dB to 26.00 dB for the standard encoder" in said
    assert "Only 1 of 2 decoders beat the mean image (worst: the encoder trained at ε = 1.5, −0.25 dB)" in said


def test_summary_has_every_value_and_reason():
    lines = summary(RECORDS)
    assert len(lines) == len(RECORDS) + 3
    assert "  clean accuracy: 88.6 %; 86.3 … 91.1; n = 1,000" in lines
    assert f"  robust accuracy under {threat_text(STRONG)}: 0.1 %; 0.0 … 2.6; n = 1,000" in lines
    assert f"  LPIPS: not measured: {NO_WEIGHTS}" in lines
    assert "  PSNR (mean-image): 12.25 dB; 12.04 … 12.48; n = 1,000" in lines


def test_convergence_is_the_largest_gap_between_attacks():
    assert convergence(tabulate(RECORDS)) == [
        "PGD-10, ℓ₂ ε = 1.5 and PGD-50 × 5 restarts, ℓ₂ ε = 1.5 differ by at most 0.5 points of robust accuracy "
        "over 3 encoders."
    ]


@pytest.mark.parametrize(
    ("threats", "expected"),
    [
        ((SMALL, WEAK, STRONG), STRONG),
        ((STRONG, SMALL, WEAK), STRONG),
        ((SMALL, WEAK), WEAK),
        ((SMALL, STRONG.model_copy(update={"norm": "linf", "eps": 9.0})), SMALL),  # no encoder was trained in linf
        ((), None),
    ],
)
def test_the_map_is_drawn_at_the_strongest_attack_of_the_largest_radius(threats, expected):
    records = [record(1.5, "clean_accuracy", 0.5)] + [record(1.5, "robust_accuracy", 0.3, threat=t) for t in threats]
    assert tabulate(records).headline == expected


@pytest.mark.parametrize(
    ("eps", "text"),
    [(0, "0"), (1.5, "1.5"), (8 / 255, "8/255"), (1 / 255, "1/255"), (0.2, "0.2"), (1.0, "1"), (3, "3")],
)
def test_radii_are_written_as_people_write_them(eps, text):
    assert radius_text(eps) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.8855, "fraction", "88.5"), (1, "fraction", "100.0"), (-0.2549, "dB", "−0.25"), (-0.001, "dB", "0.00"),
     (0.12345, "1", "0.123"), (1234.567, "s", "1235")],
)  # fmt: skip
def test_numbers_are_rounded_by_their_unit(value, unit, text):
    assert number_text(value, unit) == text


def test_rows_are_told_apart_by_what_differs_and_the_newest_record_counts():
    base = [record(1.5, "clean_accuracy", 0.5)]
    other = base[0].model.model_copy(update={"encoder": "alexnet"})
    table = tabulate([*base, record(1.5, "clean_accuracy", 0.6, model=other), record(0, "clean_accuracy", 0.7)])
    assert [r.label for r in table.rows] == ["ε = 1.5, alexnet", "standard (ε = 0), small-cnn", "ε = 1.5, small-cnn"]
    assert [name for name, _ in table.series()] == ["alexnet", "small-cnn"]
    twins = tabulate([*base, record(1.5, "clean_accuracy", 0.6, digest="f" * 64)])
    assert [r.label for r in twins.rows] == ["ε = 1.5, 15aaaaa", "ε = 1.5, fffffff"]
    newer = record(1.5, "clean_accuracy", 0.9, time="2001-01-01T00:00:00+00:00")
    (row,) = tabulate([newer, *base]).rows
    assert row.get("clean_accuracy", "classification").value == 0.9


def test_records_of_the_classifier_alone_join_those_of_its_decoder():
    alone = record(1.5, "clean_accuracy", 0.5)
    alone = alone.model_copy(update={"model": alone.model.model_copy(update={"decoder": None})})
    (row,) = tabulate([alone, record(1.5, "psnr", 20.0, "reconstruction")]).rows
    assert row.model.decoder == "mirror"
    assert len(row.cells) == 2


@pytest.mark.parametrize(
    "records",
    [
        [record(0, "clean_accuracy", 0.5)],
        [record(0, "psnr", 20.0, "reconstruction")],
        [record(0, "auroc", 0.9, "one-class", interval=None, n=None)],
        [record(0, "clean_accuracy", None)],
        [record(e, "robust_accuracy", 0.5, threat=WEAK, seed=s) for e in (0, 1.5) for s in (0, 1)],
    ],
)
def test_any_set_of_records_makes_a_page(records, tmp_path):
    page = Page(write_report(tmp_path, records, None, None).read_text())
    values = [float(a["data-value"]) for cells in page.data.values() for a in cells if "data-value" in a]
    assert sorted(values) == sorted(r.value for r in records if r.value is not None)


def test_a_picture_made_before_is_shown_again(tmp_path):
    images = torch.rand(2, 3, 16, 24)
    write_report(tmp_path, RECORDS[:1], RECIPE, Grid(images, [("ε = 1", images.flip(3))]))
    before = (tmp_path / "reconstructions.png").read_bytes()
    page = Page(write_report(tmp_path, RECORDS[:1], RECIPE, None).read_text())
    assert page.images["reconstructions"] == before


def test_nothing_is_replaced_when_the_page_fails(tmp_path, monkeypatch):
    path = write_report(tmp_path, RECORDS[:1], RECIPE, None)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("arae.report.render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, RECORDS, RECIPE, None)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (4, 3, 28, 28), (4, 28, 28)])
def test_a_grid_refuses_rows_that_do_not_belong(shape):
    with pytest.raises(ValueError, match="'clean' is"):
        Grid(torch.zeros(4, 1, 28, 28), [("clean", torch.zeros(shape))])


def test_collect_reads_a_run_or_the_runs_in_it(tmp_path):
    for name, eps in (("b", 1.5), ("a", 0.0)):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "records.jsonl", [record(eps, "clean_accuracy", 0.5)])
    assert [r.model.train_eps for r in collect(tmp_path)] == [0.0, 1.5]
    write_records(tmp_path / "records.jsonl", RECORDS)
    assert collect(tmp_path) == RECORDS


@pytest.mark.parametrize(("name", "said"), [("nowhere", "no such run folder"), (".", "arae evaluate")])
def test_collect_says_what_is_missing(tmp_path, name, said):
    with pytest.raises(InputError, match=said) as error:
        collect(tmp_path / name)
    assert "\n" not in str(error.value)


def test_no_records_no_page(tmp_path):
    with pytest.raises(InputError, match="no records"):
        write_report(tmp_path / "new", [], RECIPE, None)
    assert not (tmp_path / "new").exists()
