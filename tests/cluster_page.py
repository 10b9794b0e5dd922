"""What `docs/cluster.md` tells its reader to type: the commands, where each is typed, names that stand for others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cluster.md"
SECTION = "Step by step"


@dataclass(frozen=True)
class Block:
    """A fenced block of commands."""

    where: str
    """`head`, `node` (every node but the head), or empty: not part of the steps."""
    text: str


def blocks(text: str) -> list[Block]:
    """The shell blocks of a text, in order."""
    found = re.findall(r"^```sh ?(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(where, body) for where, body in found]


def section(title: str) -> str:
    """The text under a heading, to the next heading of its level."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert found, f"{PAGE.name} has no section {title}"
    return found[1]


def steps() -> list[Block]:
    """The blocks of the step-by-step section."""
    return blocks(section(SECTION))


def names() -> dict[str, str]:
    """The page's table of names that stand for the reader's own, with what each stands for."""
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE.read_text().split("\n## ")[0], re.M)
    return dict(rows)
