"""`arae ui`: MLflow's own page on the runs."""

import logging
import socket
from pathlib import Path

import pytest
import tracking
from tracking import GENEROUS, begin, free_port

from arae.errors import InputError
from arae.tracking import ui

pytestmark = tracking.MARKS
root, away = tracking.root, tracking.away


def test_ui_without_a_store_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r"mlflow\.db: no runs yet"):
        ui(tmp_path, port=free_port())


@pytest.mark.parametrize("port", ["taken", 70000])
def test_ui_on_a_port_that_cannot_be_had_is_bad_input(root: Path, port: int | str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1] if port == "taken" else int(port)
        with pytest.raises(InputError, match=f"{number} can't be used .* --port"):
            ui(root, port=number)


def test_ui_points_at_a_server_that_runs_elsewhere(
    root: Path, away: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    begin(root).close(timeout=GENEROUS)
    with caplog.at_level(logging.WARNING):
        assert ui(root) == 0
    assert away in capsys.readouterr().err
    assert "not sent" in caplog.text
