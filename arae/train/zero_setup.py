"""DeepSpeed made ready: imported quietly, on this worker's device, in its process group, with nothing to compile."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from arae.errors import InputError

if TYPE_CHECKING:
    from arae.config import EngineChoice
    from arae.train.engine import Engine

BUCKET = 2**24
"""Gradients that are averaged in one message, at most; DeepSpeed holds a buffer of so many."""
PERSISTENT = 10_000
"""Stage 3 leaves tensors of at most so many weights whole on every worker: gathering them would cost more."""


def refuse_unfit(engine: Engine) -> None:
    """InputError for float64, which DeepSpeed does not do."""
    if engine.dtype == torch.float64:
        raise InputError("precision = fp64: DeepSpeed's weights are float32; set engine: ddp, or precision=fp32")


def load_deepspeed(device: str) -> Any:
    """The package, for devices of this type (`cpu`, `cuda`); InputError where it is missing or of another kind."""
    os.environ.setdefault("DS_ACCELERATOR", device)  # else it takes a GPU wherever there is one
    try:
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise InputError(
            f"engine.kind = deepspeed: the package can't be imported ({error}); pip install 'arae[deepspeed]', or set "
            "engine: ddp"
        ) from None
    found: Any = get_accelerator()
    if found.device_name() != device:
        raise InputError(
            f"engine.kind = deepspeed: DeepSpeed is set to {found.device_name()} and this worker trains on {device}: "
            f"set DS_ACCELERATOR={device}"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimiser that is not its own
    # DeepSpeed calls torch's collectives by names that torch has deprecated.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device == "cpu" and "__compatible_ops__" not in vars(deepspeed.ops):
        # Read for one op alone, which is faster messages between processes of one machine: a minute of compiling, and
        # where that is interrupted, a lock that later processes wait on for ever.
        deepspeed.ops.__dict__["__compatible_ops__"] = defaultdict(bool)
    return deepspeed


def join_group(device: torch.device) -> None:
    """A process group of one, where there is none: DeepSpeed does nothing without."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    atexit.register(leave_group)


def leave_group() -> None:
    """Leave the process group, if there still is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def name_device(device: torch.device) -> None:
    """DeepSpeed takes the number of its device from the environment, now and later, whatever its network is on."""
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("LOCAL_RANK", "0")


def configuration(choice: EngineChoice) -> dict[str, Any]:
    """DeepSpeed's settings: all that would make it compute anything but the plain step is off."""
    sharing: dict[str, Any] = {
        "stage": choice.stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": PERSISTENT,
    }
    if choice.offload:
        sharing["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # it counts with this, and computes nothing from it
        "gradient_accumulation_steps": 1,  # the boundary of a step is told, and losses come divided
        "gradient_clipping": 0.0,  # its default is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own would have to be compiled
        "steps_per_print": None,
        "zero_optimization": sharing,
    }
