"""How much memory this process may still use, as the kernel and its control groups say."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
OWN_GROUP = Path("/proc/self/cgroup")


def available_memory(meminfo: Path = MEMINFO, own_group: Path = OWN_GROUP, cgroups: Path = CGROUPS) -> int:
    """Bytes: the machine's available memory, or what a control group (a container) leaves of its limit if less.

    What the page cache holds counts as available in both.
    """
    least = _field(meminfo, "MemAvailable:") * 1024
    for line in _lines(own_group):
        number, controllers, name = line.split(":", 2)
        if number == "0":  # version 2: each group on the way up may have a limit
            least = min([least, *_of_version_2(cgroups, name)])
        elif "memory" in controllers.split(","):
            least = min([least, *_of_version_1(cgroups / "memory", name)])
    return max(0, least)


def _of_version_2(root: Path, name: str) -> list[int]:
    left = []
    for group in _upwards(root, name):
        limit = _number(group / "memory.max")
        if limit is not None:
            cached = _field(group / "memory.stat", "inactive_file") + _field(group / "memory.stat", "active_file")
            left.append(limit - (_number(group / "memory.current") or 0) + cached)
    return left


def _of_version_1(root: Path, name: str) -> list[int]:
    left = []
    for group in _upwards(root, name):
        limit = _number(group / "memory.limit_in_bytes")
        if limit is not None:
            stat = group / "memory.stat"
            cached = _field(stat, "total_inactive_file") + _field(stat, "total_active_file")
            left.append(limit - (_number(group / "memory.usage_in_bytes") or 0) + cached)
    return left


def _upwards(root: Path, name: str) -> list[Path]:
    """The group and those above it; in a container, whose own name is not seen inside, the root stands for it."""
    group = root / name.strip("/")
    return [path for path in (group, *group.parents) if path.is_relative_to(root)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _field(path: Path, name: str) -> int:
    for line in _lines(path):
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0
