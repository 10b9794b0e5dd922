"""Join a Ray cluster, or start one on this machine for the command's time."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from arae.errors import AraeError, InputError, last_line
from arae.launch import Where
from arae.storage import is_url, without_secrets

ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 256 * 2**20  # training reads its batches itself; what an evaluation sends beyond this goes to disk
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # how Ray tells a submitted job's driver what its runtime environment is
STARTS = 3
LATE = ("timed out during startup", "Timed out waiting for file")
"""How Ray says that a part of a node was not there in time: the node itself, its control store."""
DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray counts a lost node's resources for up to 20 s more; only when this is over it looks again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
ALONE = {
    # A cluster for this command alone, on loopback: no other node, no spot instance to watch.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # No dashboard to show what they would gather, and no driver to print the logs.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
}


def address_of(where: Where) -> str | None:
    """The running cluster to join: the one that was named, else the one whose job this is."""
    return where.address or ("auto" if os.environ.get("RAY_ADDRESS") else None)


def connect(where: Where) -> None:
    """Join the cluster, or start one on this machine; once a process. What the user has set of RAY_* stays.

    Raises InputError where no cluster answers, or Ray is not installed; AraeError where none can be started.
    """
    address = address_of(where)
    # A worker that answers nothing hangs, with others in a collective or without.
    given = DEFAULTS | {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(where.timeout)}
    for name, value in (given if address else given | ALONE).items():
        os.environ.setdefault(name, value)
    if not address:
        _own_token()
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise InputError("--workers needs Ray: pip install 'arae[cluster]'") from None
    if ray.is_initialized():
        return
    env = {"env_vars": worker_environment()}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": env}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            raise InputError(f"--address {address}: no Ray cluster answers ({last_line(error)})") from None
        return
    cpus = max((where.most or where.workers or 1) * (where.cpus or 1), os.cpu_count() or 1)
    start_alone(num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


def start_alone(**options: Any) -> None:
    """Start a cluster on this machine for this process.

    Ray gives a node up that is not there within half a minute. A busy machine may need longer, so it is started
    again. Raises AraeError where that does not help.
    """
    import ray
    from psutil import NoSuchProcess, Process, wait_procs  # Ray brings its own

    for left in reversed(range(STARTS)):
        others = set(Process().children(recursive=True))
        try:
            # "local": Ray would else join whatever cluster somebody has started on this machine.
            ray.init("local", **options)
            return
        except Exception as error:
            if not any(each in str(error) for each in LATE):
                raise
            forgotten = [one for one in Process().children(recursive=True) if one not in others and _is_of_ray(one)]
            for process in forgotten:
                with suppress(NoSuchProcess):
                    process.kill()
            wait_procs(forgotten, timeout=5)
            ray.shutdown()
            if not left:
                raise AraeError(
                    f"Ray was started {STARTS} times and was not there within half a minute: this machine is too busy, "
                    "or short of memory; give the same command again when it is less so"
                ) from None


def _is_of_ray(process: Any) -> bool:
    """Whether a process below this one is Ray's, and no thread's of this command."""
    from psutil import Error

    try:
        return any("/ray/" in word or word.startswith("ray::") for word in process.cmdline()[:3])
    except Error:
        return False


def _own_token() -> None:
    """Loopback keeps other machines out; a token that nobody else knows keeps out other users of this one."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    if "ray" in sys.modules:  # it has read the mode already, and would not hear of another
        os.environ["RAY_AUTH_MODE"] = "disabled"
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def worker_environment() -> dict[str, str]:
    """What the workers get of this process's environment: no secrets, for Ray shows it to whoever may look."""
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        # Groups that are torn down have failed: there is nothing that closing them well would save.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": os.environ.get("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5"),
    }
    # A scratch folder is each node's own.
    own |= {k: v for k, v in os.environ.items() if k.startswith("ARAE_") and not k.startswith("ARAE_SCRATCH")}
    if is_url(own.get("ARAE_RUNS", "")):
        own["ARAE_RUNS"] = without_secrets(own["ARAE_RUNS"])
    job = json.loads(os.environ.get(JOB) or "{}").get("runtime_env", {}).get("env_vars", {})
    return {name: value for name, value in own.items() if name not in job}  # Ray refuses what is given twice
