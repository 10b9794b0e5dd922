"""The set-up script, run in a folder of its own against stand-ins for apt, pip and Python; the Makefile's targets."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = ("bash", "cat", "cp", "dirname", "env", "flock", "mkdir", "rm", "sha256sum", "touch")
ALL_PACKAGES = (
    "build-essential pkg-config python3-venv python3-dev libopencv-dev libturbojpeg0-dev dataset-fashion-mnist "
    "chromium chromium-driver iproute2"
)

# Each stand-in writes its call to $CALLS. The Python makes a .venv that holds itself, and its pip fails on demand.
STUBS = {
    "id": 'echo "${FAKE_UID:-0}"',
    "dpkg-query": 'case " $INSTALLED " in *" ${!#} "*) printf installed;; *) exit 1;; esac',
    "dpkg": 'echo "dpkg $*" >>"$CALLS"',
    "apt-get": 'echo "apt-get $*" >>"$CALLS"; exit "${APT_RC:-0}"',
    "sudo": 'echo "sudo $*" >>"$CALLS"; exec "$@"',
    "python3": f"""case "$*" in
  -) exec {sys.executable} - ;;
  "-m venv .venv") echo venv >>"$CALLS"; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pip"*) echo "pip ${{!#}}" >>"$CALLS"; exit "${{PIP_RC:-0}}" ;;
  *) exit 9 ;;
esac""",
}


class Bench:
    """A checkout with nothing but the set-up, and a PATH of stand-ins."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        (self.root / ".ci").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(repository / ".ci" / "setup", self.root / ".ci" / "setup")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(repository / name, self.root / name)
        for name in TOOLS:
            found = shutil.which(name)
            assert found, f"{name} is not on PATH"
            (self.bin / name).symlink_to(found)
        for name, body in STUBS.items():
            self.stub(name, body)

    def stub(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        whole = {"PATH": str(self.bin), "CALLS": str(self.calls_file), "INSTALLED": ALL_PACKAGES, **env}
        command = [str(self.root / ".ci" / "setup"), *args]
        return subprocess.run(command, env=whole, capture_output=True, text=True, timeout=60, cwd=self.root.parent)

    def calls(self) -> list[str]:
        """What was called since this was last asked."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        self.calls_file.unlink(missing_ok=True)
        return text.splitlines()


@pytest.fixture
def bench(tmp_path: Path, repository: Path) -> Bench:
    return Bench(tmp_path, repository)


INSTALL = ["pip pip", "pip .[ffcv,track,cluster,deepspeed,eval,dev]"]


def test_the_second_call_does_nothing(bench: Bench) -> None:
    assert bench.run().returncode == 0
    assert bench.calls() == ["venv", *INSTALL]
    second = bench.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert bench.calls() == []


def test_changed_pins_are_installed_into_what_is_there(bench: Bench) -> None:
    bench.run()
    bench.calls()
    with (bench.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert bench.run().returncode == 0
    assert bench.calls() == INSTALL


def test_an_installation_cut_short_starts_afresh(bench: Bench) -> None:
    assert bench.run(PIP_RC="1").returncode == 1
    (bench.root / ".venv" / "half-a-package").touch()
    bench.calls()
    assert bench.run().returncode == 0
    assert bench.calls() == ["venv", *INSTALL]
    assert not (bench.root / ".venv" / "half-a-package").exists()
    assert bench.run().returncode == 0
    assert bench.calls() == []


def test_a_moved_checkout_is_installed_again(bench: Bench) -> None:
    bench.run()
    bench.calls()
    bench.root = bench.root.rename(bench.root.with_name("elsewhere"))
    assert bench.run().returncode == 0
    assert bench.calls() == INSTALL


def test_missing_system_packages_are_installed(bench: Bench) -> None:
    assert bench.run(INSTALLED=ALL_PACKAGES.replace("libopencv-dev ", "")).returncode == 0
    assert [call for call in bench.calls() if call.startswith("apt-get install")] == [
        "apt-get install -q -y --no-install-recommends libopencv-dev"
    ]


def test_root_is_asked_for_through_sudo(bench: Bench) -> None:
    assert bench.run(INSTALLED="", FAKE_UID="1000").returncode == 0
    calls = bench.calls()
    assert "sudo apt-get update -q" in calls
    assert any(call.startswith("sudo env DEBIAN_FRONTEND=noninteractive apt-get install") for call in calls)


def test_where_apt_fails_the_packages_are_named(bench: Bench) -> None:
    result = bench.run(INSTALLED="", APT_RC="100")
    assert result.returncode == 1
    assert "as root, run: apt-get install build-essential pkg-config" in result.stderr
    assert "venv" not in bench.calls()


@pytest.mark.parametrize("tools_are_there", [True, False])
def test_without_apt(bench: Bench, tools_are_there: bool) -> None:
    (bench.bin / "apt-get").unlink()
    if tools_are_there:
        bench.stub("g++", "exit 0")
        bench.stub("pkg-config", "exit 0")
    result = bench.run(INSTALLED="")
    assert result.returncode == (0 if tools_are_there else 1)
    assert ("no apt-get" in result.stderr) is not tools_are_there
    if not tools_are_there:
        for what in ("g++", "pkg-config", "Python 3.11 or 3.12", "OpenCV", "TurboJPEG"):
            assert what in result.stderr


def test_without_a_fitting_python(bench: Bench) -> None:
    bench.stub("python3", "exit 1")  # as one of another version, or without venv, does
    result = bench.run()
    assert result.returncode == 1
    assert "no Python 3.11 or 3.12" in result.stderr
    assert "make setup PYTHON=" in result.stderr
    assert not (bench.root / ".venv").exists()


def test_the_interpreter_can_be_chosen(bench: Bench) -> None:
    bench.run()
    bench.calls()
    assert bench.run(PYTHON=str(bench.bin / "python3")).returncode == 0
    assert bench.calls() == []  # it is the one in .venv already
    result = bench.run(PYTHON="/nowhere/python3.12")
    assert result.returncode == 1
    assert "/nowhere/python3.12" in result.stderr


def test_chromium_is_for_the_tests_and_for_debian_only(bench: Bench) -> None:
    without = ALL_PACKAGES.replace("chromium chromium-driver", "")
    bench.run(INSTALLED=without)
    assert not any("apt-get" in call for call in bench.calls())
    bench.run("--tests", INSTALLED=without)
    release = Path("/etc/os-release")
    is_debian = release.exists() and "ID=debian" in release.read_text().splitlines()
    assert any("chromium-driver" in call for call in bench.calls()) is is_debian


def make(repository: Path, *args: str) -> str:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of the make that runs us
    command = ["make", "-C", str(repository), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, env=env).stdout


def test_every_target_is_listed_by_help(repository: Path) -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (repository / "Makefile").read_text(), re.M)
    assert phony
    targets = phony[1].split()
    assert {"setup", "demo", "test", "lint", "bench", "clean", "help"} <= set(targets)
    shown = make(repository)
    for target in targets:
        assert re.search(rf"^  make {target}\s", shown, re.M), target
        make(repository, "-n", target)


def test_arguments_reach_the_job(repository: Path) -> None:
    assert "arae demo data.source=/my/images" in make(repository, "-n", "demo", "ARGS=data.source=/my/images")
    assert "-k pgd" in make(repository, "-n", "test", "ARGS=-k pgd")
