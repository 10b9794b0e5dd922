"""How many trials go side by side, and a trial whose folder somebody else still holds."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from arae.errors import Busy, InputError, Stopped
from arae.launch import Where
from tune import trial
from tune.side import Side, room_for_trials
from tune.trial import _own


def nodes(*cpus: float, gpus: float = 0, dead: int = 0) -> list[dict[str, Any]]:
    alive = [{"Alive": True, "Resources": {"CPU": float(has), "GPU": gpus}} for has in cpus]
    return [*alive, *[{"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}] * dead]


@pytest.mark.parametrize(
    ("where", "cluster", "gpu", "room"),
    [
        (Where(workers=2), nodes(2), False, 1),
        (Where(workers=2), nodes(1, 1, 1, 1, dead=1), False, 2),
        (Where(workers=2, cpus=2), nodes(3, 3), False, 1),  # one worker a node
        (Where(workers=2, cpus=4), nodes(3, 3), False, 0),
        (Where(workers=4), nodes(16, 16, gpus=4), True, 2),
        (Where(workers=4), nodes(2, 16, gpus=4), True, 1),
        (Where(workers=2, most=8), nodes(16), False, 2),
        (Where(workers=2, most=8), nodes(4), False, 1),  # the least fit
        (Where(workers=1), [], False, 0),
    ],
)
def test_trials_have_room_with_all_their_workers(
    where: Where, cluster: list[dict[str, Any]], gpu: bool, room: int
) -> None:
    assert room_for_trials(where, cluster, gpu=gpu) == room


def test_a_sweep_takes_any_gpu_and_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from conftest import make_tiny_npz
    from training import tiny_recipe

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"--device cuda:1: .* CUDA_VISIBLE_DEVICES"):
        Side(tiny_recipe(make_tiny_npz(tmp_path)), Where(device="cuda:1"), None)


def test_a_trial_waits_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "LOOK_S", 0.01)
    tried = 0

    @contextmanager
    def opened() -> Iterator[Any]:
        nonlocal tried
        tried += 1
        if tried < 4:
            raise Busy("held by another")
        yield "mine"

    def never() -> AbstractContextManager[Any]:
        raise Busy("held by another")

    with ExitStack() as stack:
        assert _own(stack, opened, tmp_path / ".stop") == "mine"
    (tmp_path / ".stop").touch()
    with ExitStack() as stack, pytest.raises(Stopped):
        _own(stack, never, tmp_path / ".stop")
