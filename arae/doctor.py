"""What of the stack works on this machine, and how to mend what does not.

Heavy imports run in short-lived processes of their own with a time limit: one that crashes or hangs is reported here
and not suffered.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from arae.errors import InputError

GIB = 2**30
_LIMIT = 120.0  # seconds an import may take; on a busy laptop FFCV alone has been seen to take eleven
_FFCV_PACKAGES = "python3-dev build-essential pkg-config libopencv-dev libturbojpeg0-dev"

_TORCH = """
import json, torch
from arae.precision import cpu_has_bf16
gpu = torch.cuda
indices = range(gpu.device_count()) if gpu.is_available() else ()
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "devices": [(gpu.get_device_name(i), gpu.get_device_capability(i)) for i in indices],
    "architectures": gpu.get_arch_list(),
    "gpu_bf16": bool(indices) and gpu.is_bf16_supported(including_emulation=False),
    "cpu_bf16": cpu_has_bf16(), "threads": torch.get_num_threads(), "hub": torch.hub.get_dir(),
}))
"""
_TORCHVISION = """
import torch, torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
print(torchvision.__version__)
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what it is, how it stands, what was seen, and how to mend it (empty where it is well)."""

    name: str
    state: Literal["ok", "warn", "missing"]
    said: str
    mend: str = ""


def examine(runs_root: Path) -> list[Finding]:
    """All findings, the most basic first. Raises nothing: what can't be found out is a finding too."""
    probes = {
        "torch": _TORCH,
        "torchvision": _TORCHVISION,
        "ffcv": "import ffcv.loader, importlib.metadata; print(importlib.metadata.version('ffcv'))",
        "ray": "import ray, ray.train, ray.train.torch; print(ray.__version__)",
        "mlflow": "import mlflow; print(mlflow.__version__)",
    }
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(probes, pool.map(probe, probes.values()), strict=True))
    torch_said, about = answers["torch"], {}
    if torch_said[0]:
        about = json.loads(torch_said[1])
    return [
        python_finding(sys.version_info[:3]),
        *torch_findings(torch_said, about),
        import_finding("torchvision", answers["torchvision"], "pip install the pair that belongs together, such as "
                       "torch==2.14.1 and torchvision==0.29.1, from one index"),
        import_finding("FFCV", answers["ffcv"], f"apt-get install {_FFCV_PACKAGES}; then pip install 'arae[ffcv]'"),
        import_finding("Ray", answers["ray"], "pip install 'arae[cluster]'"),
        package_finding("DeepSpeed", "deepspeed", "pip install 'arae[deepspeed]' (optional: sharded training)"),
        mlflow_finding(answers["mlflow"], os.environ.get("MLFLOW_TRACKING_URI")),
        lpips_finding(Path(about["hub"]) if "hub" in about else None),
        chromium_finding(shutil.which),
        fashion_mnist_finding(),
        disk_finding(runs_root),
        shared_memory_finding(Path("/dev/shm")),
        open_files_finding(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        processor_finding(about.get("threads")),
    ]  # fmt: skip


def probe(code: str, seconds: float = _LIMIT) -> tuple[bool, str]:
    """Run Python code in a process of its own: (True, its last line), or (False, why it failed)."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:g} s"
    if done.returncode < 0:
        return False, f"its process died of signal {-done.returncode}"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode} without a word"


def python_finding(version: Sequence[int]) -> Finding:
    """Whether this Python is one that arae is run with."""
    said = ".".join(map(str, version))
    if (3, 11) <= tuple(version[:2]) < (3, 13):
        return Finding("Python", "ok", said)
    return Finding("Python", "warn", f"{said}, which arae is not tested with", "use Python 3.11 or 3.12")


def torch_findings(answer: tuple[bool, str], about: Mapping[str, Any]) -> list[Finding]:
    """The build, whether it has kernels for each GPU here, and where bfloat16 is fast."""
    if not answer[0]:
        return [
            Finding("torch", "missing", answer[1], "pip install 'torch>=2.11' 'torchvision>=0.26' (one index for both)")
        ]
    kind = f"CUDA {about['cuda']}" if about["cuda"] else f"ROCm {about['hip']}" if about["hip"] else "CPU only"
    architectures = ", ".join(about["architectures"])
    built = f" with kernels for {architectures}" if architectures else ""
    found = [Finding("torch", "ok", f"{about['version']}, built for {kind}{built}")]
    if about["devices"]:
        found += [arch_finding(about["architectures"], cap, about["version"], name) for name, cap in about["devices"]]
    else:
        found.append(no_gpu_finding(built_for_gpu=kind != "CPU only", driver=Path("/proc/driver/nvidia").exists()))
    if about["devices"]:
        fast = about["gpu_bf16"]
        said = "supported by the GPU itself" if fast else "only emulated by this GPU: precision auto takes fp16"
    else:
        fast = about["cpu_bf16"]
        said = "supported by this processor" if fast else "not supported by this processor: precision auto takes fp32"
    return [*found, Finding("bfloat16", "ok", said)]


def arch_finding(
    architectures: Sequence[str], capability: Sequence[int], torch_version: str, device: str = "GPU"
) -> Finding:
    """Whether a torch build has kernels for a GPU of this compute capability.

    Binary kernels (`sm_86`) run on the same major version with the same or a higher minor one; `compute_XY` is code
    that the driver compiles for that capability and every later one. The minor version is the last digit.
    """
    major, minor = capability
    name = f"{device} (sm_{major}{minor})"
    if any(a.startswith("gfx") for a in architectures):
        return Finding("GPU", "ok", f"{device}, through ROCm")
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if match is None:
            continue
        has = int(match[2]), int(match[3])
        binary = match[1] == "sm" and has[0] == major and has[1] <= minor
        if binary or (match[1] == "compute" and has <= (major, minor)):
            return Finding("GPU", "ok", name)
    said = (
        f"{name}: torch {torch_version} has no sm_{major}{minor} kernels (it has {', '.join(architectures) or 'none'})"
    )
    if (major, minor) == (7, 0):
        mend = (
            "the builds for CUDA 12.6 have them, made for torch before 2.15: pip install 'torch<2.15' "
            "'torchvision<0.30' --index-url https://download.pytorch.org/whl/cu126; until then train with --device cpu"
        )
        return Finding("GPU", "missing", said, mend)
    return Finding("GPU", "missing", said, "install a torch build for another CUDA version; see https://pytorch.org")


def no_gpu_finding(*, built_for_gpu: bool, driver: bool) -> Finding:
    """Why torch sees no GPU; training then runs on the CPU."""
    if driver and not built_for_gpu:
        return Finding("GPU", "warn", "this torch is built for the CPU, but an NVIDIA driver is there",
                       "install a CUDA build of torch; see https://pytorch.org")  # fmt: skip
    if driver:
        return Finding("GPU", "warn", "an NVIDIA driver is there, but torch sees no device",
                       "check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the driver is new enough")  # fmt: skip
    return Finding("GPU", "ok", "none here: training runs on the CPU")


def import_finding(name: str, answer: tuple[bool, str], mend: str) -> Finding:
    """Whether the package imports."""
    return Finding(name, "ok", answer[1]) if answer[0] else Finding(name, "missing", answer[1], mend)


def package_finding(name: str, package: str, mend: str) -> Finding:
    """Whether the package is installed; it is not imported."""
    if util.find_spec(package) is None:
        return Finding(name, "missing", "not installed", mend)
    try:
        return Finding(name, "ok", f"{metadata.version(package)} installed")
    except metadata.PackageNotFoundError:
        return Finding(name, "warn", "there, but without its metadata", mend)


def mlflow_finding(answer: tuple[bool, str], uri: str | None) -> Finding:
    """Whether MLflow imports, and where runs are logged to."""
    if not answer[0]:
        return Finding(
            "MLflow", "missing", answer[1], "pip install 'arae[track]' (without it, runs keep their own log)"
        )
    return Finding("MLflow", "ok", f"{answer[1]}, logging to {uri or 'mlflow.db beside the runs'}")


def lpips_finding(hub: Path | None) -> Finding:
    """Whether LPIPS needs a download: the package, and AlexNet's ImageNet weights in torch's cache."""
    found = package_finding("LPIPS", "lpips", "pip install 'arae[eval]'")
    if found.state != "ok" or hub is None:
        return found
    weights = sorted((hub / "checkpoints").glob("alexnet-*.pth"))
    if weights:
        return Finding("LPIPS", "ok", f"{found.said}, backbone weights {weights[0].name} in torch's cache")
    return Finding(
        "LPIPS", "warn", f"{found.said}, but no AlexNet ImageNet weights in {hub / 'checkpoints'}",
        "they are fetched at the first evaluation; without a network put torchvision's alexnet-*.pth there or name it "
        "in evaluate.lpips_weights (else the record says why there is no value)",
    )  # fmt: skip


def chromium_finding(which: Callable[[str], str | None]) -> Finding:
    """Whether the browser tests can run; nothing else needs a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := which(name))), None)
    driver = which("chromedriver")
    if browser and driver:
        return Finding("Chromium", "ok", f"{browser}, {driver} (for the browser tests)")
    lacking = " and ".join([*(["the browser"] if not browser else []), *(["chromedriver"] if not driver else [])])
    return Finding("Chromium", "missing", f"no {lacking}; only the browser tests need it",
                   "apt-get install chromium chromium-driver")  # fmt: skip


def fashion_mnist_finding() -> Finding:
    """Whether the demo's images are here."""
    from arae.data.catalog import find, place_of, source_files

    dataset = find("fashion-mnist")
    try:
        place = place_of(dataset, None)
        for split in ("train", "test"):
            source_files(dataset, place, split)
    except InputError as error:
        return Finding("Fashion-MNIST", "missing", f"the demo's images are not here ({error})", dataset.obtain)
    return Finding("Fashion-MNIST", "ok", str(place))


def disk_finding(runs_root: Path) -> Finding:
    """Free space where runs are written."""
    place = next(path for path in (runs_root.absolute(), *runs_root.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free / GIB
    said = f"{free:.1f} GiB free at {runs_root}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "missing", f"{place} can't be written to", "set ARAE_RUNS to a folder of yours")
    if free < 5:
        return Finding("disk", "warn", said, "free some, or set ARAE_RUNS to a folder on a larger disk")
    return Finding("disk", "ok", said)


def shared_memory_finding(place: Path) -> Finding:
    """Shared memory: Ray's object store and data loaders live in it."""
    if not place.is_dir():
        return Finding("shared memory", "warn", f"no {place}", "mount a tmpfs there; Ray is slow without")
    size = shutil.disk_usage(place).total / GIB
    if size < 1:
        return Finding("shared memory", "warn", f"{place} has {size:.2f} GiB: Ray falls back to the disk",
                       "in a container: docker run --shm-size=4g; else mount -o remount,size=4G /dev/shm")  # fmt: skip
    return Finding("shared memory", "ok", f"{size:.1f} GiB at {place}")


def open_files_finding(limit: int) -> Finding:
    """The soft limit of open files; Ray opens many for every worker."""
    if limit == resource.RLIM_INFINITY or limit >= 4096:
        return Finding("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}")
    return Finding("open files", "warn", f"at most {limit}, few for Ray with many workers", "ulimit -n 65536")


def processor_finding(threads: int | None) -> Finding:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = f"{cores} cores, {memory() / GIB:.1f} GiB of memory"
    if threads is None:
        return Finding("processor", "ok", said)
    if threads > cores:
        return Finding(
            "processor", "warn", f"{said}, but torch starts {threads} threads", f"set OMP_NUM_THREADS={cores}"
        )
    return Finding("processor", "ok", f"{said}, torch uses {threads} threads in a process")


def memory() -> int:
    """Bytes of memory that may be used: the machine's, or the container's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup here, or "max"
        return total
