"""A sweep that is killed again and again ends as if nothing had happened, and nothing is trained twice."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sweeping import GRID, Sweeping
from tracking import MARKS
from waiting import PATIENCE_S, until

EVERY = 10  # steps between states
pytestmark = [pytest.mark.cluster, *MARKS]


def test_killed_three_times_it_ends_with_the_same_table(tmp_path: Path) -> None:
    """A trial's process, then the driver, then Ray's own; nothing is trained twice."""
    sizes = {"encoder__steps": 120, "decoder__steps": 120, "state__every": EVERY}
    whole, killed = (Sweeping(tmp_path / name, GRID, **sizes) for name in ("whole", "killed"))
    code, said = whole.run()
    assert code == 0, said

    def stages_begun() -> int:
        return sum(1 for path in killed.runs.glob("stages/*/state/manifest.json"))

    with killed.start() as process:
        until(lambda: stages_begun() >= 1, "stage", process)
        assert end(killed.home, "ray::ImplicitFunc") == 1
        until(lambda: len(killed.events("end")) >= 1, "end of a stage", process)
        process.kill()
    time.sleep(2)
    with killed.start() as process:
        begun = len(killed.events("end"))
        until(lambda: len(killed.events("end")) > begun or stages_begun() > 4, "end of a stage", process)
        assert end(killed.home, "raylet", "gcs_server", most=9) > 0
        process.wait(PATIENCE_S)
        assert process.returncode != 0
    code, said = killed.run()
    assert code == 0, said
    assert killed.table() == whole.table()
    assert killed.trained() == whole.trained()
    assert set(killed.trained().values()) == {1}
    assert whole.repeated() == 0
    # Three kills of two trials at most, each at most what was done since the newest state and while that was written.
    assert killed.repeated() <= 3 * 2 * 2 * EVERY, "a stage has begun anew"


def end(home: Path, *names: str, most: int = 1) -> int:
    """Kill so many processes by these names that belong to the sweep in `home`."""
    found = 0
    for path in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            words = (path / "cmdline").read_bytes().decode(errors="replace")
            mine = str(home).encode() in (path / "environ").read_bytes()
            if mine and any(name in words for name in names) and found < most:
                os.kill(int(path.name), signal.SIGKILL)
                found += 1
    return found
