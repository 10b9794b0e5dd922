"""MLflow's own pages over the runs."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from arae.errors import InputError
from arae.tracking.mirror import log_note, prepare_environment, send_pending, tracking_uri, without_password

GRACE = 10.0  # seconds the server has to end after a signal


def ui(runs_root: Path, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Send what is pending, then serve MLflow's pages until Ctrl-C or SIGTERM; returns the server's exit code.

    Where `MLFLOW_TRACKING_URI` names a server, there is nothing to serve: its address is said and 0 returned.
    Raises InputError: MLflow is not installed, no run has been mirrored yet, or the port is taken.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise InputError("arae ui: MLflow is not installed; `pip install 'arae[track]'` adds it")
    uri = tracking_uri(runs_root)
    is_server = uri.startswith(("http:", "https:"))
    if not is_server:
        _check_port(host, port)
    sent = send_pending(runs_root, log_note)
    if sent:
        _say(f"sent {sent} operations that were pending")
    if is_server:
        _say(f"MLflow runs at {without_password(uri)} (MLFLOW_TRACKING_URI): open it in a browser")
        return 0
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InputError(
            f"{uri.removeprefix('sqlite:///')}: no runs yet; `arae demo` or `arae train RECIPE` makes some"
        )
    _say(f"MLflow's pages over {runs_root}: http://{host}:{port} (up in some seconds; Ctrl-C ends it)")
    return _serve(uri, runs_root, host, port)


def _serve(uri: str, runs_root: Path, host: str, port: int) -> int:
    prepare_environment()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", (runs_root.absolute() / "mlartifacts").as_uri()]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    # A session of its own: a signal reaches the server and its workers once, through us, and none of them outlives us.
    server = subprocess.Popen(command, start_new_session=True)
    try:
        with _forwarded(server):
            code = server.wait()
    finally:
        _end(server)
    return code if code >= 0 else 128 - code


@contextmanager
def _forwarded(server: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on to the server instead of dying of them."""

    def forward(number: int, _frame: FrameType | None) -> None:
        os.killpg(server.pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Leave no process of the server's behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"arae ui: {host}:{port} can't be used ({reason}); choose another with --port") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
