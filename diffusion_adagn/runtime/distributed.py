"""The processes of a command, and the device of each."""

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
    """The processes that torchrun or accelerate started, or a single one.

    The timeout is 12 hours: one process decodes the images or trains a classifier while the others wait.

    Args:
        device: As in `choose_device`; becomes the state's `device`.

    Returns:
        The state, one per interpreter.

    Raises:
        InputError: The device is not available, or several processes cannot share it.
    """
    device = device.lower()
    chosen = choose_device(device)
    state = PartialState(cpu=chosen.type == "cpu", timeout=timedelta(hours=12))
    if state.distributed_type == DistributedType.NO:
        state.device = chosen
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)
    elif state.device.type != chosen.type:
        raise InputError(f"the processes were started on {state.device.type} and cannot change to {chosen.type}.")
    if device == "auto" and chosen.type == "cpu" and state.is_main_process and (note := no_gpu_note()):
        _print_once(note)
    return state


def choose_device(requested: str = "auto") -> torch.device:
    """The device of this process. No other function chooses one.

    Args:
        requested: "auto" (CUDA if there is one, else Apple's GPU, else the CPU), "cpu", "cuda", "cuda:1" or "mps".

    Returns:
        The device. "cuda" is the current GPU; under a launcher each process has a different one.

    Raises:
        InputError: The device is not available, or several processes cannot share it.
    """
    requested = requested.lower()
    if not re.fullmatch(DEVICE, requested):
        raise InputError(
            f"--device (speed.device): there is no device '{requested}': expected auto, cpu, cuda, cuda:1 or mps."
        )
    if requested == "auto":
        return _default_device()
    device, count = torch.device(requested), torch.cuda.device_count()
    cuda, mps = device.type == "cuda", device.type == "mps"
    fault = ""
    if cuda and not torch.cuda.is_available():
        fault = (
            f"there is no CUDA GPU for --device {requested} (speed.device): {_why_no_cuda()}. {_available_devices()}"
        )
    elif cuda and device.index is not None and "LOCAL_RANK" in os.environ:
        fault = (
            f"--device {requested} (speed.device) is for one process: torchrun and accelerate launch assign one GPU to each process. Type --device cuda, and choose the GPUs "
            "with CUDA_VISIBLE_DEVICES."
        )
    elif (cuda and (device.index or 0) >= count) or (mps and not torch.backends.mps.is_available()):
        fault = f"there is no {'Apple GPU for --device mps' if mps else f'GPU {requested}'} (speed.device). {_available_devices()}"
    elif mps and _process_count() > 1:
        fault = "several processes cannot share Apple's GPU: start one process, or type --device cpu."
    if fault:
        raise InputError(fault)
    return device


def no_gpu_note() -> str:
    """A note if a GPU is expected (several processes, or an NVIDIA driver) but none is available; "" otherwise."""
    if (
        torch.cuda.is_available()
        or torch.backends.mps.is_available()
        or not (_process_count() > 1 or _has_nvidia_driver())
    ):
        return ""
    return f"note: No GPU found: {_why_no_cuda()}. Running on the CPU. Type --device cpu if this is intended."


@contextlib.contextmanager
def main_first(state: PartialState) -> Iterator[None]:
    """Run the block on the main process, then on one process of each other machine, then on all others.

    So files are written once per machine, and the other processes read them. Every process passes two barriers: the
    main process both after the block, the first process of another machine one before and one after, the others both
    before.
    """
    with state.main_process_first(), state.local_main_process_first():
        yield


def to_float64(x: Tensor) -> Tensor:
    """`x` in float64, on its device; on the CPU if the device has no float64 (Apple's GPUs)."""
    return x.double() if has_float64(x.device) else x.cpu().double()


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def _default_device() -> torch.device:
    override = os.environ.get("ACCELERATE_TORCH_DEVICE")  # accelerate's setting
    if override:
        return torch.device(override)
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):  # accelerate launch --cpu
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    # several processes cannot share Apple's GPU
    return torch.device("mps" if torch.backends.mps.is_available() and _process_count() == 1 else "cpu")


def _process_count() -> int:
    """The number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _available_devices() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["auto", "cpu"] + ["cuda"] * (count > 0) + [f"cuda:{i}" for i in range(count)]
    names += ["mps"] * torch.backends.mps.is_available()
    return f"Available here: {', '.join(names)}."


def _has_nvidia_driver() -> bool:
    return os.path.exists("/proc/driver/nvidia") or shutil.which("nvidia-smi") is not None


def _why_no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this build of torch ({torch.__version__}) has no CUDA; pytorch.org has the command that installs one with CUDA"
    if not _has_nvidia_driver():
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but no NVIDIA driver is installed"
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and the driver may be too old for it (nvidia-smi shows the CUDA "
        "version it supports), or CUDA_VISIBLE_DEVICES hides every GPU"
    )


@functools.cache
def _print_once(note: str) -> None:
    print(note, file=sys.stderr)
