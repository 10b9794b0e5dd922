"""`import arae` and the library's modules need only the packages that the README names; imports go one way."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAMED = ("torch", "torchvision", "numpy", "pydantic", "pyyaml", "safetensors", "pillow")
LIGHT = ("arae.attacks", "arae.models", "arae.train", "arae.data", "arae.metrics", "arae.evaluate", "arae.apps")
HEAVY = ("ffcv", "ray", "deepspeed", "mlflow", "lpips", "matplotlib", "typer", "rich", "optuna", "scipy")

# Runs in a fresh interpreter: imports `arae` and every module under the packages named by argv, prints what got loaded.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
done = []
def load(name):
    module = importlib.import_module(name)
    done.append(name)
    for each in pkgutil.iter_modules(getattr(module, "__path__", ()), name + "."):
        if not each.name.endswith(".__main__"):
            load(each.name)
import arae
for name in sys.argv[1:]:
    load(name)
print(json.dumps({"imported": done, "loaded": sorted({m.partition(".")[0] for m in sys.modules})}))
"""

# A path finder that does not find these top-level modules, as if they were not installed.
REFUSE = """
import sys
from importlib.machinery import PathFinder
class Refuse:
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {refused!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Refuse() if finder is PathFinder else finder for finder in sys.meta_path]
"""


def closure(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions of these names and all that they require here, extras left out."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                # torch asks for cuda-toolkit[cublas,...]: what those extras bring counts as torch's own
                waiting.append(requirement.name)
                waiting.extend(_of_extras(requirement))
    return found


def _of_extras(requirement: Requirement) -> Iterator[str]:
    for line in importlib.metadata.distribution(requirement.name).requires or ():
        inner = Requirement(line)
        if inner.marker and any(inner.marker.evaluate({"extra": extra}) for extra in requirement.extras):
            yield inner.name


def top_level_entries(distribution: importlib.metadata.Distribution) -> set[str]:
    return {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__", "bin")}


def import_all(*options: str, before: str = "") -> dict[str, list[str]]:
    command = [sys.executable, *options, "-c", before + IMPORT_ALL, *LIGHT]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_nothing_heavy_is_loaded() -> None:
    report = import_all()
    assert not set(report["loaded"]) & set(HEAVY)
    assert set(LIGHT) <= set(report["imported"])


def test_only_the_named_packages_are_asked_for() -> None:
    wanted = closure(NAMED)
    installed = importlib.metadata.packages_distributions()
    refused = {
        module
        for module, distributions in installed.items()
        if module != "arae" and not any(canonicalize_name(each) in wanted for each in distributions)
    }
    assert {each for each in HEAVY if each in installed} <= refused
    report = import_all(before=REFUSE.format(refused=refused))
    assert "torch" in report["loaded"]


def test_the_refusing_finder_refuses() -> None:
    code = REFUSE.format(refused={"rich"}) + "import rich"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "No module named 'rich'" in result.stderr


@pytest.mark.integration
def test_in_an_environment_of_only_the_named_packages(tmp_path: Path, repository: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for distribution in closure(NAMED).values():
        for entry in top_level_entries(distribution):
            source = Path(str(distribution.locate_file(entry)))
            if source.exists() and not (site / entry).exists():
                (site / entry).symlink_to(source)
    (site / "arae").symlink_to(repository / "arae")
    # -I and -S: no PYTHONPATH, no working directory, no site-packages, so the folder above is all there is
    path = f"import sys; sys.path.append({str(site)!r})\n"
    report = import_all("-I", "-S", before=path)
    assert set(LIGHT) <= set(report["imported"])
    absent = subprocess.run([sys.executable, "-I", "-S", "-c", path + "import rich"], capture_output=True, timeout=60)
    assert absent.returncode == 1


class Import(NamedTuple):
    module: str
    line: int
    lazy: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module in `package`; lazy if it stands inside a function or under TYPE_CHECKING."""
    yield from _imports(ast.parse(source), package, lazy=False)


def _imports(node: ast.AST, package: str, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            base = ".".join([*parents, *([child.module] if child.module else [])])
            yield from (Import(f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            later |= isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(child, package, lazy=lazy or later)


# Where; what must not be imported there; whether a lazy import is let through.
DIRECTIONS = [
    ("arae", ("cluster", "tune", "benchmarks"), True),
    ("arae.attacks", ("arae.train", "arae.data", "arae.evaluate", "arae.apps", "arae.cli", "arae.report"), False),
    ("arae.models", ("arae.train", "arae.evaluate", "arae.apps", "arae.cli", "arae.report"), False),
    ("arae.data", ("arae.train", "arae.attacks", "arae.models", "arae.evaluate", "arae.apps", "arae.cli"), False),
    ("arae.metrics", ("arae.train", "arae.evaluate", "arae.apps", "arae.cli"), False),
    ("arae.train", ("ray", "arae.apps", "arae.cli", "arae.report"), False),
    ("arae.evaluate", ("ray", "arae.cli", "arae.report"), False),
    ("arae.apps", ("ray", "arae.train", "arae.cli", "arae.report"), False),
]


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def wrong_ways(source: str, module: str, package: str) -> list[str]:
    """The imports of a module that go against DIRECTIONS."""
    wrong = []
    for where, forbidden, lazy_allowed in DIRECTIONS:
        if not is_in(module, where):
            continue
        for each in imports(source, package):
            # Only the command line may start the drivers, and only inside a command.
            excused = each.lazy and lazy_allowed and is_in(module, "arae.cli")
            if any(is_in(each.module, name) for name in forbidden) and not excused:
                wrong.append(f"{module}:{each.line} imports {each.module}")
    return wrong


def modules(repository: Path) -> Iterator[tuple[Path, str, str]]:
    """File, module and package of every module of arae."""
    for path in sorted((repository / "arae").rglob("*.py")):
        parts = path.relative_to(repository).with_suffix("").parts
        package = ".".join(parts[:-1])
        yield path, package if parts[-1] == "__init__" else ".".join(parts), package


def test_imports_go_one_way(repository: Path) -> None:
    found = [w for path, module, package in modules(repository) for w in wrong_ways(path.read_text(), module, package)]
    assert found == []


def test_light_modules_import_the_named_packages_only(repository: Path) -> None:
    named = {"torch", "torchvision", "numpy", "pydantic", "yaml", "safetensors", "PIL", "arae"}
    found = [
        f"{path}:{each.line} imports {each.module}"
        for path, module, package in modules(repository)
        if any(is_in(module, light) for light in LIGHT)
        for each in imports(path.read_text(), package)
        if not each.lazy and each.module.partition(".")[0] not in named | sys.stdlib_module_names
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        ("import cluster.launch", "arae.cli", True),
        ("def f():\n    import cluster.launch", "arae.cli", False),
        ("def f():\n    import cluster.launch", "arae.plan", True),
        ("def f():\n    from tune import space", "arae.train.loop", True),
        ("from arae.train import loop", "arae.attacks.gradient", True),
        ("from ..train import loop", "arae.attacks.gradient", True),
        ("from arae import train", "arae.attacks.gradient", True),
        ("from .. import train", "arae.attacks.gradient", True),
        ("def f():\n    from ray import train", "arae.train.loop", True),
        ("import rayleigh", "arae.train.loop", False),
        ("from arae.attacks import pgd", "arae.train.loop", False),
        ("try:\n    import ray\nexcept ImportError:\n    pass", "arae.train.loop", True),
    ],
)
def test_the_check_of_directions_sees(source: str, module: str, wrong: bool) -> None:
    assert bool(wrong_ways(source, module, module.rpartition(".")[0])) is wrong
