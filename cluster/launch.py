"""Train a recipe through Ray Train. The run folder stays authoritative: Ray only starts and watches the workers."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from arae.config import Recipe, dump_recipe
from arae.errors import AraeError, InputError, Stopped
from arae.launch import Where
from arae.progress import tail
from arae.runs import RunFolder
from arae.train.log import Listener

ROOT = Path(__file__).resolve().parent.parent
WATCH_S = 0.2
OBJECT_STORE_BYTES = 256 * 2**20  # batches never go through Ray: the workers read their own


def launch(recipe: Recipe, folder: RunFolder, where: Where, listener: Listener, stop: Callable[[], bool]) -> None:
    """Run `cluster.worker.loop` on `where.workers` workers until the recipe is trained.

    Raises Stopped where `stop` asked for it and a state was kept, the worker's own AraeError where it raised one, and
    AraeError with the first line of what went wrong otherwise.
    """
    assert where.workers is not None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    connect(where)
    for number, handler in handlers.items():  # Ray has put its own in their place, which save nothing
        signal.signal(number, handler)
    outcome: dict[str, Any] = {}
    # Ray Train takes SIGINT for itself when it runs in the main thread; a stop must save first.
    thread = threading.Thread(target=_fit, args=(recipe, folder, where, outcome), daemon=True)
    done = threading.Event()
    offset = folder.log.stat().st_size if folder.log.exists() else 0
    read = partial(tail, folder.log, listener, done, offset=offset)
    reader = threading.Thread(target=read, daemon=True)
    thread.start()
    reader.start()
    try:
        while thread.is_alive():
            thread.join(WATCH_S)
            if stop() and not folder.stop.exists():
                folder.stop.touch()
    finally:
        done.set()
        reader.join(5)
        folder.stop.unlink(missing_ok=True)
    error = outcome.get("error")
    if error is not None:
        raise _cause(error) from None
    shutil.rmtree(folder.path / "ray", ignore_errors=True)  # Ray's own notes of a run that ended as it should
    if outcome["value"] is not None:
        raise Stopped(outcome["value"])


def connect(where: Where) -> None:
    """Join the cluster at `where.address`, or start one on this machine; once a process.

    Raises InputError where no cluster answers, or Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    if where.address is None:
        # A cluster for this command alone, on loopback: no tokens, no other node, no spot instance to watch.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        import ray
    except ImportError:
        raise InputError("--workers needs Ray: pip install 'arae[cluster]'") from None
    if ray.is_initialized():
        return
    env = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": env}
    if where.address is not None:
        try:
            ray.init(address=where.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"--address {where.address}: no Ray cluster answers ({_first_line(error)})") from None
        return
    cpus = max(where.workers or 1, os.cpu_count() or 1)
    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


def _fit(recipe: Recipe, folder: RunFolder, where: Where, outcome: dict[str, Any]) -> None:
    """Body of the thread: `outcome` gets `value` or `error`."""
    try:
        outcome["value"] = _trainer(recipe, folder, where).fit().return_value
    except Exception as error:  # noqa: BLE001 -- it crosses to the main thread, which raises it
        outcome["error"] = error


def _trainer(recipe: Recipe, folder: RunFolder, where: Where) -> Any:
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.worker import loop

    workers, has = where.workers or 1, ray.cluster_resources()
    gpu = where.device != "cpu" and has.get("GPU", 0) >= workers
    if where.device not in (None, "cpu") and not gpu:
        raise InputError(f"--workers {workers} --device {where.device}: the cluster has {has.get('GPU', 0):g} GPUs")
    if has.get("CPU", 0) < workers:
        raise InputError(f"--workers {workers}: the cluster has {has.get('CPU', 0):g} CPUs; a worker needs one")
    return TorchTrainer(
        loop,
        train_loop_config={"recipe": dump_recipe(recipe), "folder": str(folder.path), "cwd": str(Path.cwd())},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(
            # A name of its own each time: Ray would otherwise resume from its own bookkeeping, and ours is what counts.
            name=f"{time.time_ns():x}",
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _cause(error: Exception) -> AraeError:
    """The AraeError behind a failed fit, where a worker raised one; else one that names the first failure."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    for failure in failures:
        seen: BaseException | None = failure
        while seen is not None:
            for candidate in (seen, getattr(seen, "_base_exc", None), getattr(seen, "cause", None)):
                if isinstance(candidate, AraeError):
                    return candidate
            seen = seen.__cause__
    return AraeError(f"training failed in a worker: {_first_line(failures[0])} (Ray's logs have the whole of it)")


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
