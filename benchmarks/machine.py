"""The machine that is measured, and the number of cores used."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusion_adagn.runtime.speed import has_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _cpu_info(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; "" if there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def machine_info(device: torch.device) -> dict:
    """What the numbers depend on: machine, CPU, GPU, versions."""
    import diffusers

    info = {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_info("model name") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "cpu_bf16": has_bf16(torch.device("cpu")),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "gpu": None,
    }
    with contextlib.suppress(OSError, AttributeError):
        info["load_average"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "gpu_l2_bytes": getattr(gpu, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return info


def device_name(device: torch.device) -> str:
    """A short name of the device, for a folder."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@contextlib.contextmanager
def threads(count: int, pin: bool = True) -> Iterator[None]:
    """Run torch with `count` threads on as many cores, the most idle of those allowed."""
    before, allowed = torch.get_num_threads(), _allowed()
    if pin and allowed:
        os.sched_setaffinity(0, idlest(allowed, count))
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if pin and allowed:
            os.sched_setaffinity(0, allowed)


def idlest(allowed: set[int], count: int, seconds: float = 0.2) -> set[int]:
    """The `count` cores that were most idle for `seconds`.

    If the system does not report idle times, the last cores: the first one handles interrupts.
    """
    order = sorted(allowed, reverse=True)
    if count < len(order):
        before = _idle_ticks()
        time.sleep(seconds)
        after = _idle_ticks()
        order.sort(key=lambda core: before.get(core, 0) - after.get(core, 0))
    return set(order[:count])


def _idle_ticks() -> dict[int, int]:
    """{core: its idle time so far, ticks}; {} if the system does not report it."""
    with contextlib.suppress(OSError):
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        return {int(words[0][3:]): int(words[4]) for words in lines if words[0][:3] == "cpu" and words[0] != "cpu"}
    return {}


@contextlib.contextmanager
def unpinned() -> Iterator[None]:
    """Use every core of this process, for compiling, which is not timed."""
    before = _allowed()
    if before:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, _AT_START)
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Full fp32 on CUDA for every side: TF32 is off."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


_AT_START = _allowed()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(_AT_START) or os.cpu_count() or 1
