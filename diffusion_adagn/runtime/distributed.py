"""The processes that share the work, and the device that each computes on."""

import contextlib
import functools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor

from ..config import DEVICE
from ..errors import InputError


def process_state(device: str = "auto") -> PartialState:
    """Those of torchrun or accelerate, or one alone. The others wait for hours while one decodes pictures or trains a judge.

    Args:
        device: as `choose_device` takes it; what the state's own `device` will be.

    Returns:
        The state that all parts of this interpreter share.

    Raises:
        InputError: for a device that is not there, or that several processes cannot share.
    """
    device = device.lower()
    chosen = choose_device(device)
    state = PartialState(cpu=chosen.type == "cpu", timeout=timedelta(hours=12))
    if state.distributed_type == DistributedType.NO:
        state.device = chosen
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)
    elif state.device.type != chosen.type:
        raise InputError(f"the processes were started on {state.device.type}, and cannot go on on {chosen.type}.")
    if device == "auto" and chosen.type == "cpu" and state.is_main_process and (note := no_gpu_note()):
        _print_once(note)
    return state


def choose_device(asked: str = "auto") -> torch.device:
    """The device of this process. The only place where one is chosen.

    Args:
        asked: "auto" (CUDA if there is one, else Apple's GPU, else the CPU), "cpu", "cuda", "cuda:1" or "mps".

    Returns:
        The device. Without a number it is the current one, which under a launcher is the process's own.

    Raises:
        InputError: for a device that is not there, or that several processes cannot share.
    """
    asked = asked.lower()
    if not re.fullmatch(DEVICE, asked):
        raise InputError(
            f"--device (speed.device): there is no device '{asked}': expected auto, cpu, cuda, cuda:1 or mps."
        )
    if asked == "auto":
        return _best()
    device = torch.device(asked)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                f"there is no CUDA GPU for --device {asked} (speed.device): {_why_no_cuda()}. {_available()}"
            )
        if device.index is not None and "LOCAL_RANK" in os.environ:
            raise InputError(
                f"--device {asked} (speed.device) is for one process: torchrun and accelerate launch give each process a GPU of its own. Type --device cuda, "
                "and choose the GPUs by CUDA_VISIBLE_DEVICES."
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(f"there is no GPU {asked} (--device, speed.device). {_available()}")
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise InputError(f"there is no Apple GPU for --device mps (speed.device). {_available()}")
        if _process_count() > 1:
            raise InputError("several processes cannot share Apple's GPU: start one, or type --device cpu.")
    return device


def no_gpu_note() -> str:
    """What to say where a GPU was to be expected and there is none: several processes, or an NVIDIA driver. "" otherwise."""
    if (
        torch.cuda.is_available()
        or torch.backends.mps.is_available()
        or not (_process_count() > 1 or _has_nvidia_driver())
    ):
        return ""
    return f"note: No GPU found: {_why_no_cuda()}. This runs on the CPU; --device cpu if that is meant."


@contextlib.contextmanager
def main_first(state: PartialState) -> Iterator[None]:
    """The main process, then one process of each other machine, then all others: what is made once a machine is found by the rest.

    Every process passes two barriers: the main one both at the end, the first of another machine one at either end, the others
    both at the beginning.
    """
    with state.main_process_first(), state.local_main_process_first():
        yield


def to_float64(x: Tensor) -> Tensor:
    """`x` in float64: on its device, or on the CPU where the device has no float64 (Apple's GPUs)."""
    return x.double() if has_float64(x.device) else x.cpu().double()


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def _best() -> torch.device:
    forced = os.environ.get("ACCELERATE_TORCH_DEVICE")  # accelerate's own way to say it
    if forced:
        return torch.device(forced)
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):  # accelerate launch --cpu
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    # several processes cannot share Apple's GPU
    return torch.device("mps" if torch.backends.mps.is_available() and _process_count() == 1 else "cpu")


def _process_count() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _available() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["auto", "cpu"] + ["cuda"] * (count > 0) + [f"cuda:{i}" for i in range(count)]
    names += ["mps"] * torch.backends.mps.is_available()
    return f"Available here: {', '.join(names)}."


def _has_nvidia_driver() -> bool:
    return os.path.exists("/proc/driver/nvidia") or shutil.which("nvidia-smi") is not None


def _why_no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this build of torch ({torch.__version__}) is without CUDA; pytorch.org has the command that installs one with it"
    if not _has_nvidia_driver():
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but no NVIDIA driver is installed"
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and the driver may be too old for that (nvidia-smi shows the CUDA "
        "version it supports), or CUDA_VISIBLE_DEVICES hides every GPU"
    )


@functools.cache
def _print_once(note: str) -> None:
    print(note, file=sys.stderr)
