"""What `adagn doctor` looks at: versions, device, operator, memory, caches. A check returns what it found, and what is wrong."""

import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ..atomic import cache_root
from ..errors import InputError
from ..version import __version__

DISTRIBUTION = "diffusion-adagn"
OPTIONAL = (
    "triton",
    "matplotlib",
    "scipy",
    "tensorboard",
    "wandb",
    "trackio",
    "torch-fidelity",
    "transformers",
    "gradio",
)
MIN_FREE = 2 * 2**30  # bytes of disk: decoded images and a few checkpoints
GIB = 2**30


def examine(device: str = "auto", say: Callable[..., None] = print) -> list[str]:
    """Look at this machine and print a line for each thing, its name before the work is done.

    Args:
        device: as `processes.choose_device` takes it.
        say: as `print`.

    Returns:
        What is wrong, each with what to do; empty where all is well.
    """
    wrong = []
    checks = {
        "versions": _versions,
        "optional": _optional,
        "device": lambda: _device(device),
        "cores": _cores,
        "memory": lambda: _memory(device),
        "speed": lambda: _speed(device),
        "operator": lambda: _operator(device),
        "caches": _caches,
        "disk": _disk,
    }
    for name, check in checks.items():
        say(f"{name:10}", end="", flush=True)
        try:
            found, problems = check()
        except Exception as error:  # one check that fails leaves the others
            found = "could not be checked"
            problems = [str(error) if isinstance(error, InputError) else f"{name}: {type(error).__name__}: {error}"]
        say(f"\n{'':10}".join(found.splitlines()))
        wrong += [problem for problem in problems if problem not in wrong]
    return wrong


def _versions() -> tuple[str, list[str]]:
    """This package's and those of what it needs."""
    from packaging.requirements import Requirement

    found, wrong = [f"{DISTRIBUTION} {__version__}, Python {platform.python_version()}, {platform.platform()}"], []
    try:
        needed = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:  # its folder is on the path
        needed = [
            Requirement(name) for name in ("torch", "diffusers", "accelerate", "datasets", "safetensors", "numpy")
        ]
    import torch

    names = []
    for one in needed:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        have = _version(one.name)
        shown = torch.__version__ if one.name == "torch" and have else have  # it names the build, +cpu or +cu130
        names.append(f"{one.name} {shown or '(missing)'}")
        if have is None or not one.specifier.contains(have, prereleases=True):
            is_there = "is not installed" if have is None else f"{have} is installed, {one.specifier} is expected"
            wrong.append(f"{one.name} {is_there}: pip install '{one.name}{one.specifier}'.")
    found += [", ".join(names[i : i + 6]) for i in range(0, len(names), 6)]
    return "\n".join(found), wrong


def _optional() -> tuple[str, list[str]]:
    have = {name: _version(name) for name in OPTIONAL}
    there = ", ".join(f"{name} {number}" for name, number in have.items() if number) or "none"
    missing = ", ".join(name for name, number in have.items() if not number)
    return there + (f"; not installed: {missing}" if missing else ""), []


def _device(asked: str) -> tuple[str, list[str]]:
    """The device that commands use, and a driver that nothing uses."""
    import torch

    from .distributed import choose_device, no_gpu_note

    device = choose_device(asked)
    found = f"{device}" + (f", {_processor()}" if device.type == "cpu" else "")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        found += f"\ncuda:{i} {card.name}, {card.total_memory / GIB:.1f} GiB, capability {card.major}.{card.minor}, CUDA {torch.version.cuda}"
    note = no_gpu_note() if asked == "auto" else ""
    return found, [note.removeprefix("note: ")] if note else []


def _cores() -> tuple[str, list[str]]:
    import torch

    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = (
        f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else "its own choice"
    )
    return f"{count} of {os.cpu_count()} for this process; torch uses {torch.get_num_threads()} threads ({threads})", []


def _memory(asked: str) -> tuple[str, list[str]]:
    import torch

    from ..models.config import machine_memory
    from .distributed import choose_device

    found = f"{machine_memory() / GIB:.1f} GiB" + (f", {free / GIB:.1f} available" if (free := _available()) else "")
    device = choose_device(asked)
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        found += f"; on {device} {whole / GIB:.1f} GiB, {free / GIB:.1f} free"
    return found, []


def _speed(asked: str) -> tuple[str, list[str]]:
    """What `auto` means here; on a CPU the number type depends on the network."""
    small, large = (_chosen(asked, flops) for flops in (0, 10**12))
    found = f"{small.precision}, {small.memory_format} for --precision auto of adagn train and adagn sample"
    if large.precision != small.precision:
        found += f"; {large.precision} for networks of half a GFLOP an image or more"
    return found, []


def _operator(asked: str) -> tuple[str, list[str]]:
    """Build the fused operator and compare it with plain PyTorch; a few seconds where it lies in no cache."""
    import torch

    from ..ops import unsupported_reason
    from .distributed import choose_device
    from .precision import AUTOCAST

    device, speed = choose_device(asked), _chosen(asked, 0)
    dtype = AUTOCAST[speed.precision] or torch.float32
    began = time.perf_counter()
    why = unsupported_reason(device, dtype, speed.memory_format == "channels_last", note=False)
    seconds = f"{time.perf_counter() - began:.1f} s"
    if not why:
        kernel = "Triton" if device.type == "cuda" else "C++"
        return f"fused ({kernel}), self-check passed in {speed.precision}, {speed.memory_format} ({seconds})", []
    if device.type == "mps":
        return "eager (plain PyTorch): there is no fused kernel for Apple's GPU", []
    problem = f"the fused operator cannot be used, and plain PyTorch, which is slower, takes its place: {why}"
    return "eager (plain PyTorch), since the fused one cannot be used", [problem]


def _caches() -> tuple[str, list[str]]:
    """Each folder of what can be made or downloaded again, and its size."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = cache_root()
    own = [root / name for name in ("ops", "judges", "references")]
    stores = [p for p in root.iterdir() if p.is_dir() and p not in own] if root.is_dir() else []
    folders = {
        f"decoded data in {root}": stores,
        "compiled operator in ops": own[:1],
        "judges in judges": own[1:2],
        "references in references": own[2:],
        f"hub {HF_HUB_CACHE}": [Path(HF_HUB_CACHE)],
    }
    found = [f"{_size(sum(map(_bytes, some))):>9}  {what}" for what, some in folders.items()]
    return "\n".join(found), _not_writable(root)


def _disk() -> tuple[str, list[str]]:
    """Free space where caches lie and where runs go."""
    found, wrong = [], []
    for what, folder in (("caches", cache_root()), ("here", Path.cwd())):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(there).free
        found.append(f"{_size(free)} free for {what} ({folder})")
        if free < MIN_FREE:
            remedy = "make room, or name another disk in DIFFUSION_ADAGN_CACHE" if what == "caches" else "make room"
            wrong.append(f"the disk of {folder} has {_size(free)} free, {_size(MIN_FREE)} are expected: {remedy}.")
    return "\n".join(found), wrong


def _chosen(asked: str, flops: int):
    """`speed.resolve_speed` without the operator, which has a line of its own."""
    from ..config import SpeedConfig
    from .distributed import choose_device
    from .speed import resolve_speed

    return resolve_speed(SpeedConfig(operator="eager"), choose_device(asked), flops)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _available() -> int | None:
    """Bytes of memory that programs may still take, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _bytes(folder: Path) -> int:
    return sum(entry.stat(follow_symlinks=False).st_size for entry in _files(folder))


def _files(folder: Path) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):  # the hub's links count once
                    yield entry
    except OSError:  # missing, or another's
        return


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _not_writable(root: Path) -> list[str]:
    probe = root / f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return [
            f"the cache {root} cannot be written to ({error.strerror}): name another folder in DIFFUSION_ADAGN_CACHE."
        ]
    return []
