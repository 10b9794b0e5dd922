"""Stand-ins for Slurm's commands, which start real processes on this machine."""

import os
import socket
import stat
import sys
from pathlib import Path

FILES = Path(__file__).resolve().parent.parent / "cluster" / "files"
SCRIPT = FILES / "slurm.sh"

# Runs the command once a task, hands SIGTERM on as srun does, and is done when all tasks are.
SRUN = """#!/bin/bash
echo "srun $*" >>"$STUB_LOG"
tasks=1
while [[ ${1:-} == --* ]]; do
  case $1 in --ntasks=*) tasks=${1#*=} ;; esac
  shift
done
pids=()
for ((i = 0; i < tasks; i++)); do "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$STUB_LOG"
if [ "$1" = show ]; then for node in ${3//,/ }; do echo "$node"; done; fi
"""
SQUEUE = '#!/bin/bash\necho "${STUB_STATE:-RUNNING}"\n'
GETENT = '#!/bin/bash\necho "127.0.1.1 STREAM here"\necho "$STUB_ADDRESS STREAM here"\n'


def program(path: Path, text: str) -> None:
    """An executable script at the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def slurm_job(folder: Path, address: str, *, nodes: int = 2, gpus: int = 0) -> dict[str, str]:
    """The environment of a batch script on `nodes` hosts that are all this machine, under `address`.

    `folder/home` is to be filled with `.venv/bin`; what the stand-ins were asked is in `folder/log`.
    """
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("getent", GETENT)):
        program(folder / "slurm" / name, text)
    (folder / "log").touch()
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_", "ARAE_"))},
        "PATH": f"{folder / 'slurm'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "XDG_STATE_HOME": str(folder / "state"),
        "ARAE_HOME": str(folder / "home"),
        "ARAE_RUNS": str(folder / "runs"),
        "SLURM_JOB_ID": str(free_port() - 20000),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(f"node{i}" for i in range(1, nodes + 1)),
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_GPUS_ON_NODE": str(gpus),
        "SLURM_SUBMIT_DIR": str(folder),
        "STUB_LOG": str(folder / "log"),
        "STUB_ADDRESS": address,
    }


def link_python(folder: Path) -> None:
    """`folder/home/.venv/bin/python`: this interpreter."""
    program(folder / "home" / ".venv" / "bin" / "python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')


def free_port() -> int:
    """A port between 20000 and 29999, where the script's lie."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")
