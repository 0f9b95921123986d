"""The checks of `adagn doctor`: versions, device, operator, memory, caches.

Each returns its text and a list of problems.
"""

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


def examine(device: str = "auto", write: Callable[..., None] = print) -> list[str]:
    """Check this installation and print a line per check; the check's name is printed before it starts.

    Args:
        device: As in `distributed.choose_device`.
        write: A function with the arguments of `print`.

    Returns:
        The problems, each with a remedy; empty if there are none.
    """
    problems = []
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
        write(f"{name:10}", end="", flush=True)
        try:
            text, new_problems = check()
        except Exception as error:  # the other checks still run
            text = "could not be checked"
            new_problems = [str(error) if isinstance(error, InputError) else f"{name}: {type(error).__name__}: {error}"]
        write(f"\n{'':10}".join(text.splitlines()))
        problems += [problem for problem in new_problems if problem not in problems]
    return problems


def _versions() -> tuple[str, list[str]]:
    """Versions of this package and of its requirements."""
    from packaging.requirements import Requirement

    lines = [f"{DISTRIBUTION} {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    problems = []
    try:
        needed = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:  # not installed: its folder is on the path
        needed = [
            Requirement(name) for name in ("torch", "diffusers", "accelerate", "datasets", "safetensors", "numpy")
        ]
    import torch

    names = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        shown = (
            torch.__version__ if requirement.name == "torch" and installed else installed
        )  # with the build, +cpu or +cu130
        names.append(f"{requirement.name} {shown or '(missing)'}")
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            status = (
                "is not installed"
                if installed is None
                else f"{installed} is installed, {requirement.specifier} is expected"
            )
            problems.append(f"{requirement.name} {status}: pip install '{requirement.name}{requirement.specifier}'.")
    lines += [", ".join(names[i : i + 6]) for i in range(0, len(names), 6)]
    return "\n".join(lines), problems


def _optional() -> tuple[str, list[str]]:
    versions = {name: _version(name) for name in OPTIONAL}
    installed = ", ".join(f"{name} {number}" for name, number in versions.items() if number) or "none"
    missing = ", ".join(name for name, number in versions.items() if not number)
    return installed + (f"; not installed: {missing}" if missing else ""), []


def _device(requested: str) -> tuple[str, list[str]]:
    """The device that commands use; a driver without a usable GPU is a problem."""
    import torch

    from .distributed import choose_device, no_gpu_note

    device = choose_device(requested)
    text = f"{device}" + (f", {_processor()}" if device.type == "cpu" else "")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        text += f"\ncuda:{i} {card.name}, {card.total_memory / GIB:.1f} GiB, capability {card.major}.{card.minor}, CUDA {torch.version.cuda}"
    note = no_gpu_note() if requested == "auto" else ""
    return text, [note.removeprefix("note: ")] if note else []


def _cores() -> tuple[str, list[str]]:
    import torch

    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = (
        f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else "its own choice"
    )
    return f"{count} of {os.cpu_count()} for this process; torch uses {torch.get_num_threads()} threads ({threads})", []


def _memory(requested: str) -> tuple[str, list[str]]:
    import torch

    from ..models.config import machine_memory
    from .distributed import choose_device

    text = f"{machine_memory() / GIB:.1f} GiB" + (
        f", {free / GIB:.1f} available" if (free := _available_memory()) else ""
    )
    device = choose_device(requested)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        text += f"; on {device} {total / GIB:.1f} GiB, {free / GIB:.1f} free"
    return text, []


def _speed(requested: str) -> tuple[str, list[str]]:
    """What `auto` means here; on a CPU the precision depends on the network."""
    small, large = (_resolve_auto(requested, flops) for flops in (0, 10**12))
    text = f"{small.precision}, {small.memory_format} for --precision auto of adagn train and adagn sample"
    if large.precision != small.precision:
        text += f"; {large.precision} for networks of a quarter of a GFLOP an image or more"
    return text, []


def _operator(requested: str) -> tuple[str, list[str]]:
    """Build the fused operator and compare it with plain PyTorch; this takes a few seconds if it is not cached."""
    import torch

    from ..ops import unsupported_reason
    from .distributed import choose_device
    from .precision import AUTOCAST

    device, speed = choose_device(requested), _resolve_auto(requested, 0)
    dtype = AUTOCAST[speed.precision] or torch.float32
    start = time.perf_counter()
    reason = unsupported_reason(device, dtype, speed.memory_format == "channels_last", note=False)
    seconds = f"{time.perf_counter() - start:.1f} s"
    if not reason:
        kernel = "Triton" if device.type == "cuda" else "C++"
        return f"fused ({kernel}), self-check passed in {speed.precision}, {speed.memory_format} ({seconds})", []
    if device.type == "mps":
        return "eager (plain PyTorch): there is no fused kernel for Apple's GPU", []
    problem = f"the fused operator cannot be used; plain PyTorch is used, which is slower: {reason}"
    return "eager (plain PyTorch): the fused one cannot be used", [problem]


def _caches() -> tuple[str, list[str]]:
    """The cache folders, which can be deleted, and their sizes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = cache_root()
    own = [root / name for name in ("ops", "judges", "references")]
    stores = [p for p in root.iterdir() if p.is_dir() and p not in own] if root.is_dir() else []
    folders = {
        f"decoded data in {root}": stores,
        "compiled operator in ops": own[:1],
        "classifiers in judges": own[1:2],
        "references in references": own[2:],
        f"hub {HF_HUB_CACHE}": [Path(HF_HUB_CACHE)],
    }
    lines = [f"{_size(sum(map(_bytes, paths))):>9}  {name}" for name, paths in folders.items()]
    return "\n".join(lines), _not_writable(root)


def _disk() -> tuple[str, list[str]]:
    """Free space on the disks of the caches and of the working directory."""
    lines, problems = [], []
    for what, folder in (("caches", cache_root()), ("here", Path.cwd())):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        lines.append(f"{_size(free)} free for {what} ({folder})")
        if free < MIN_FREE:
            remedy = (
                "free some space, or set DIFFUSION_ADAGN_CACHE to a folder on another disk"
                if what == "caches"
                else "free some space"
            )
            problems.append(f"the disk of {folder} has {_size(free)} free, {_size(MIN_FREE)} is expected: {remedy}.")
    return "\n".join(lines), problems


def _resolve_auto(requested: str, flops: int):
    """`speed.resolve_speed` with the eager operator; the fused one is checked in `_operator`."""
    from ..config import SpeedConfig
    from .distributed import choose_device
    from .speed import resolve_speed

    return resolve_speed(SpeedConfig(operator="eager"), choose_device(requested), flops)


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


def _available_memory() -> int | None:
    """Bytes of memory available to programs; None if the system does not report it."""
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
                elif entry.is_file(follow_symlinks=False):  # the hub's links would be counted twice
                    yield entry
    except OSError:  # missing, or not readable
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
            f"the cache {root} cannot be written to ({error.strerror}): set DIFFUSION_ADAGN_CACHE to another folder."
        ]
    return []
