"""Fixtures that every test may ask for; the automatic one keeps tests apart from one another and the user's runs."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parent.parent
ALONGSIDE = "PYTEST_XDIST_WORKER" in os.environ  # other processes run other tests
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to a folder of the test's own, never to a tracking server; torch starts every test in the same state."""
    monkeypatch.setenv("ARAE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # One thread each: several processes whose threads spin while they wait for one another's cores are slow ones.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if torch := sys.modules.get("torch"):  # a test that does not need torch does not wait for it
        torch.manual_seed(0)
        torch.set_num_threads(1 if ALONGSIDE else min(2, os.cpu_count() or 1))  # FFCV's loader changes it


def pytest_configure() -> None:
    """A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests (`-n 2`), the files with long ones begin first."""
    items.sort(key=lambda item: item.get_closest_marker("integration") is None)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several processes share the tests by the file, and one of them has all the files with tests marked `ray`.

    What a file's tests share is then made once, and no two of those clusters want the same cores and the same ports.
    """
    from xdist.scheduler import LoadFileScheduling

    class OneClusterAtATime(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return self.cluster_or_file(super()._split_scope(nodeid))

        @staticmethod
        @functools.cache
        def cluster_or_file(file: str) -> str:
            return "ray" if "pytest.mark.ray" in (config.rootpath / file).read_text(encoding="utf-8") else file

    return OneClusterAtATime(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images named by ARAE_TEST_DATA."""
    folder = os.environ.get("ARAE_TEST_DATA")
    if not folder:
        pytest.skip("ARAE_TEST_DATA is not set: no folder of test images")
    if not Path(folder).is_dir():
        pytest.skip(f"ARAE_TEST_DATA={folder} is not a folder")
    return Path(folder)


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The folder of Debian's Fashion-MNIST."""
    if not (FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"{FASHION_MNIST} is missing: apt-get install dataset-fashion-mnist")
    return FASHION_MNIST


@pytest.fixture
def tiny_npz(tmp_path: Path) -> Path:
    """See `make_tiny_npz`."""
    return make_tiny_npz(tmp_path)


def make_tiny_npz(folder: Path) -> Path:
    """`images` uint8 [96,16,16,3] and `labels` int64 [96]: blobs of light whose place tells the class (of three)."""
    random = np.random.default_rng(0)
    labels = np.arange(96) % 3
    centres = np.array([[4, 4], [4, 11], [11, 8]])[labels] + random.normal(0, 0.7, (96, 2))
    grid = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), axis=-1)
    distance = ((grid[None] - centres[:, None, None]) ** 2).sum(-1)
    blob = np.exp(-distance / (2 * random.uniform(2, 3, (96, 1, 1)) ** 2))[..., None]
    images = 40 + 200 * blob * random.uniform(0.6, 1, (96, 1, 1, 3))
    path = folder / "tiny.npz"
    np.savez(path, images=images.round().astype(np.uint8), labels=labels)
    return path


@pytest.fixture
def run_arae(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_arae("train", "demo", env={...}, timeout=60)` runs the command line in a process of its own.

    It works in the test's folder. When the time is up the whole process group is killed, and TimeoutExpired is raised.
    """

    def run(
        *args: object, env: Mapping[str, str] | None = None, timeout: float = PATIENCE_S, cwd: Path = tmp_path
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "arae", *map(str, args)]
        whole_env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1", **(env or {})}
        with subprocess.Popen(
            command,
            cwd=cwd,
            env=whole_env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run
