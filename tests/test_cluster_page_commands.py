"""The commands of `docs/cluster.md` are commands: verbs, flags, recipes and overrides exist, links lead somewhere."""

import re
import shlex
import subprocess

import pytest
from cluster_page import PAGE, blocks, names, steps
from written_commands import check_arae, split_commands

TEXT = PAGE.read_text()
RUNS = f"{next(name for name in names() if name.startswith('/mnt/'))}/runs/"
# Lines of a here-document are data, and what is no command of ours is tried on the three hosts or is not ours at all.
COMMANDS = [line for block in blocks(TEXT) for line in block.text.splitlines() if line.startswith("arae ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command(line: str) -> None:
    (words,) = split_commands(line.replace(RUNS, "runs/"))  # a run folder is there after a run only
    assert words[0] == "arae"
    check_arae(words[1:])
    if words[1] == "submit":
        inner = words[words.index("--") + 1 :]
        assert inner[0] == "arae"
        check_arae(inner[1:])


@pytest.mark.parametrize("line", ["arae trian demo", "arae train nosuch", "arae train demo --placement-x spread"])
def test_the_check_refuses(line: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 -- whatever refuses it, it must not pass
        check_arae(shlex.split(line)[1:])


def test_the_steps_are_shell_and_say_where() -> None:
    assert {block.where for block in steps()} == {"head", "node"}
    for block in blocks(TEXT):
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True, timeout=20)
    assert any(line.startswith("arae train") and "--workers 2" in line for line in COMMANDS)
    assert any(line.startswith("arae submit") for line in COMMANDS)


def test_the_names_of_the_table_are_those_of_the_commands() -> None:
    typed = "".join(block.text for block in steps())
    assert len(names()) == 4
    assert [name for name in names() if name not in typed] == []
    for address in re.findall(r"\b(?:\d+\.){3}\d+\b", typed):
        assert address in names()


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    assert [t for t in targets if t.startswith("#") and t[1:] not in headings] == []
    files = [t for t in targets if not t.startswith("#") and "://" not in t]
    assert [t for t in files if not (PAGE.parent / t).exists()] == []
    assert len(files) > 4
