"""The README's commands, snippets, links and layout are those of the project."""

import ast
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from written_commands import CLI, check_arae, split_commands

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.M | re.S)
LINES = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines() if split_commands(line)]
SNIPPETS = [body for kind, body in BLOCKS if kind == "python"]
RECIPES = [body for kind, body in BLOCKS if kind == "yaml"]


@pytest.fixture(autouse=True)
def _with_the_readmes_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that the README prints are files in the working directory, named by their first line."""
    for body in RECIPES:
        (tmp_path / body.splitlines()[0].removeprefix("# ")).write_text(body)
    monkeypatch.chdir(tmp_path)


def check_make(words: list[str]) -> None:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    # -n only prints what would be run; it fails for a target that is not there
    subprocess.run(["make", "-C", str(README.parent), "-n", *words], check=True, capture_output=True, timeout=30)
    text = (README.parent / "Makefile").read_text()
    for variable in (word.partition("=")[0] for word in words if "=" in word):
        assert re.search(rf"^{variable} \?=", text, re.M), f"the Makefile takes no {variable}"


def check_line(line: str) -> None:
    for program, *words in split_commands(line):
        if program == "arae":
            check_arae(words)
        elif program == "make":
            check_make(words)
        else:
            assert [program, *words] == ["source", ".venv/bin/activate"], f"nothing checks {program}"


def test_there_is_something_to_check() -> None:
    assert {"make demo", "make test", "arae ui"} <= set(LINES)
    assert SNIPPETS
    assert RECIPES


@pytest.mark.parametrize("line", LINES)
def test_a_command(line: str) -> None:
    check_line(line)


@pytest.mark.parametrize(
    "line",
    [
        "make dmeo",
        "make demo ARG=x",
        "arae trian demo",
        "arae train nosuch",
        "arae train demo encoder.attack.epss=1",
        "arae train demo --wrokers 2",
        "arae reconstruct",
        "rm -rf x",
    ],
)
def test_the_check_refuses(line: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 -- whatever refuses it, it must not pass
        check_line(line)


def test_every_verb_that_the_text_names_is_there() -> None:
    named = set(re.findall(r"`arae ([a-z]+)", README.read_text()))
    assert hasattr(CLI, "commands")
    assert named <= set(CLI.commands)
    shown = {words[1] for line in LINES for words in split_commands(line) if words[0] == "arae"}
    assert shown == set(CLI.commands), "every verb is shown once, and no other"


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_compiles_and_its_imports_resolve(snippet: str) -> None:
    tree = ast.parse(snippet)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name: importlib.import_module(alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert hasattr(names[node.value.id], node.attr), f"{node.value.id} has no {node.attr}"


def test_files_that_the_text_names_are_there() -> None:
    text = README.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in target]
    paths = re.findall(r"`((?:arae|tests|cluster|tune|benchmarks|\.ci)/[\w./-]*)`", prose)
    layout = [line.split()[0] for kind, body in BLOCKS if kind == "text" for line in body.splitlines() if line]
    assert len(layout) > 10
    assert [path for path in [*links, *paths, *layout] if not (README.parent / path).exists()] == []


def test_anchors_are_headings() -> None:
    text = README.read_text()
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_names_in_the_text_exist() -> None:
    from arae.metrics import METRICS
    from arae.models import encoder

    assert METRICS
    assert encoder.small_cnn
    assert "small-cnn" in encoder.ENCODERS


def test_the_table_of_the_demo_has_its_markers() -> None:
    text = README.read_text()
    assert text.count("<!-- demo:begin -->") == text.count("<!-- demo:end -->") == 1
    assert text.index("<!-- demo:begin -->") < text.index("<!-- demo:end -->")


def test_the_packages_named_are_those_that_are_installed() -> None:
    text, setup = README.read_text(), (README.parent / ".ci" / "setup").read_text()
    listed = re.search(r"^packages=\((.+)\)$", setup, re.M)
    assert listed
    for package in [*listed[1].split(), "chromium", "chromium-driver"]:
        assert f"`{package}`" in text
        assert package in setup


@pytest.mark.parametrize(("name", "workers"), [("demo", 2), ("cifar10-radii", 1)])
def test_a_table_is_that_of_its_records(name: str, workers: int) -> None:
    from arae.records import read_records
    from benchmarks.readme import SHOWN, records_of, table, with_table

    text, records = README.read_text(), read_records(records_of(name))
    assert with_table(text, name, table(records)) == text
    assert {r.hardware["world_size"] for r in records} == {workers}
    assert all(f"(docs/{name}-{picture}.png)" in text for picture in SHOWN[name])


def test_the_architecture_page_names_every_module() -> None:
    page = (README.parent / "docs" / "architecture.md").read_text()
    modules = {p.stem for p in (README.parent / "arae").rglob("*.py")} - {"__init__", "__main__"}
    assert not sorted(name for name in modules if name not in page)


def test_the_demos_records_show_what_the_demo_is_for() -> None:
    """The committed run, held against what it must show; `make demo` is the experiment, this its record."""
    from arae.records import read_records
    from benchmarks.readme import records_of

    records = read_records(records_of("demo"))
    radii = sorted({r.model.train_eps for r in records})
    assert len(radii) >= 3
    assert radii[0] == 0

    def value(eps: float, metric: str, protocol: str, attack: tuple[float, int, int] | None = None) -> float:
        (one,) = [
            r
            for r in records
            if (r.model.train_eps, r.metric, r.protocol) == (eps, metric, protocol)
            and (r.threat and (r.threat.eps, r.threat.steps, r.threat.restarts)) == attack
        ]
        assert one.value is not None
        assert one.n >= 900
        return one.value

    strong, weak = (radii[-1], 50, 5), (radii[-1], 10, 1)
    robust, standard = (value(eps, "robust_accuracy", "classification", strong) for eps in (radii[-1], 0))
    assert robust - standard >= 0.2
    assert abs(robust - value(radii[-1], "robust_accuracy", "classification", weak)) < 0.03
    for eps in radii:
        assert value(eps, "clean_accuracy", "classification") >= 0.7
        psnr = value(eps, "psnr", "reconstruction")
        assert psnr >= value(eps, "psnr", "mean-image") + 5
        assert psnr > value(eps, "psnr", "other-features")
