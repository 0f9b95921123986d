"""The fused operator on the CPU: adagn_silu.cpp, compiled by the machine's compiler at first use, and cached."""

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from ..atomic import atomic_write, cache_root

SOURCE = Path(__file__).with_name("adagn_silu.cpp")
DTYPES = (torch.float32, torch.bfloat16)

_lock = threading.Lock()
_libraries: dict[tuple[torch.dtype, bool], tuple[ctypes.CDLL | None, str]] = {}


def unsupported_reason(dtype: torch.dtype = torch.float32, last: bool = True) -> str:
    """Why there is no operator for this dtype (last: in channels_last); "" if there is one."""
    return _library(dtype, last)[1]


def _library(dtype: torch.dtype, last: bool) -> tuple[ctypes.CDLL | None, str]:
    """The compiled operator, built by the first call (a second or two) unless it is cached; or None and the reason."""
    if dtype not in DTYPES:
        return None, f"it does not take {dtype} on a CPU."
    with _lock:
        if (dtype, last) not in _libraries:
            try:
                lib = _load(_build(dtype, last))
                threads = torch.get_num_threads()
                slow = threads > 2 and not lib.adagn_silu_has_threads()
                why = f"this compiler builds it without threads (OpenMP), and PyTorch uses {threads}."
                _libraries[dtype, last] = (None, why) if slow else (lib, "")
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                _libraries[dtype, last] = None, " ".join(str(error).split())[:300]
        return _libraries[dtype, last]


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first of c++, g++, clang++. Raises RuntimeError where there is none."""
    named = os.environ.get("CXX", "")
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise RuntimeError(f"CXX ({named}) is not a command: {error}.") from None
    if command and shutil.which(command[0]) is None:
        raise RuntimeError(f"CXX names {command[0]}, and there is no such compiler.")
    if not command:
        command = [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not command:
        raise RuntimeError("there is no C++ compiler (c++, g++ or clang++; or name one in CXX).")
    return command


def _build(dtype: torch.dtype, last: bool) -> Path:
    """The shared library for this source, compiler and CPU: from the cache, or built. Raises OSError, RuntimeError or
    SubprocessError."""
    command = compiler()
    flags = [
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fno-exceptions",
        "-fno-rtti",
    ]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    number = "float" if dtype == torch.float32 else "bf16"
    flags += [f"-DNUMBER={number}", f"-DLAST={str(last).lower()}"]
    recipe = [SOURCE.read_bytes(), _cpu().encode(), torch.__version__.encode(), " ".join(command + flags).encode()]
    recipe.append(subprocess.run([*command, "--version"], capture_output=True, timeout=60).stdout)
    name = f"adagn_silu-{number}-{hashlib.sha256(b'|'.join(recipe)).hexdigest()[:16]}.so"
    file = cache_root() / "ops" / name
    try:
        return file if _is_intact(file) else _compile_into(file, command, flags)
    except OSError:  # the cache is not writable: for this process alone
        folder = tempfile.mkdtemp(prefix="adagn_silu-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return _compile_into(Path(folder, name), command, flags)


def _compile(command: list[str], flags: list[str], to: Path) -> None:
    """Build the library into `to`. Raises RuntimeError with the reason of the last try."""
    why = ""
    for native in (["-march=native"], []):  # older compilers of Apple reject it
        for openmp in _openmp():
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a failed compiler leaves files
                out = Path(folder, "adagn_silu.so")
                done = subprocess.run(
                    [*command, *native, *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(out), *openmp],
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
                if done.returncode or not out.is_file():
                    ended = f"with status {done.returncode}" if done.returncode else "to make a library"
                    why = f"{ended}: {done.stderr.strip() or 'no output'}"
                    continue
                try:
                    _load(out)
                except OSError as error:  # clang links GCC's OpenMP, which lacks functions that clang needs
                    why = f"to make a library that loads: {error}"
                    continue
                to.write_bytes(out.read_bytes())
                return
    raise RuntimeError(f"the C++ compiler ({shlex.join(command)}) failed {why}")


def _openmp() -> list[list[str]]:
    """Flags to try in this order: with torch's OpenMP library (a second one in the process would start more threads); with
    its vector pragmas alone, which need no library; without."""
    lib = Path(torch.__file__).parent / "lib"
    if sys.platform == "darwin":
        openmp = [["-Xclang", "-fopenmp", str(f), f"-Wl,-rpath,{lib}"] for f in lib.glob("libomp.dylib")]
    else:
        found = [f for f in lib.glob("libgomp*") if f.is_file()][:1]
        openmp = [["-fopenmp", *(["-nodefaultlibs", str(found[0]), "-lc"] if found else [])]]
    return [*openmp, ["-fopenmp-simd"], []]


def _is_intact(file: Path) -> bool:
    """Whether the file exists and matches its hash: loading a truncated one can kill the process."""
    try:
        return _digest(file).encode() == file.with_suffix(".sha256").read_bytes()
    except FileNotFoundError:
        return False


def _compile_into(file: Path, command: list[str], flags: list[str]) -> Path:
    """Compile into `file`; its hash is a second file, since nothing may follow the end of a signed library (macOS)."""
    atomic_write(file, lambda tmp: _compile(command, flags, tmp))
    atomic_write(file.with_suffix(".sha256"), lambda tmp: tmp.write_text(_digest(file)))
    return file


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _cpu() -> str:
    """What -march=native means here: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()


def _load(file: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(file))
    run, back = lib.adagn_silu_forward, lib.adagn_silu_backward
    pointer, whole = ctypes.c_void_p, ctypes.c_long
    run.argtypes = [ctypes.c_int, *[pointer] * 6, *[whole] * 5, ctypes.c_double, ctypes.c_int]
    back.argtypes = [ctypes.c_int, *[pointer] * 9, *[whole] * 5, ctypes.c_int]
    run.restype = back.restype = None
    return lib


def _kernels(x: Tensor) -> ctypes.CDLL:
    return _library(x.dtype, not x.is_contiguous())[0]


def forward(
    x: Tensor, gain: Tensor, shift: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, H, W] contiguous or channels_last; gain, shift float32 [N or 1, C], contiguous. Returns y like x, and mean
    and rstd float32 [N, groups]."""
    n, c = x.shape[:2]
    y = torch.empty_like(x)
    mean = x.new_empty(n, groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel():
        _kernels(x).adagn_silu_forward(
            silu, x.data_ptr(), y.data_ptr(), gain.data_ptr(),
            shift.data_ptr(), mean.data_ptr(), rstd.data_ptr(), n, c, x.numel() // (n * c), groups, len(gain), eps,
            torch.get_num_threads(),
        )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy as x, with its type and layout. Returns dx like x, and dgain and dshift float32 [N, C]."""
    n, c = x.shape[:2]
    dx = torch.empty_like(x)
    dgain = x.new_zeros(n, c, dtype=torch.float32)
    dshift = torch.zeros_like(dgain)
    if x.numel():
        _kernels(x).adagn_silu_backward(
            silu, dy.data_ptr(), x.data_ptr(), gain.data_ptr(),
            shift.data_ptr(), mean.data_ptr(), rstd.data_ptr(), dx.data_ptr(), dgain.data_ptr(), dshift.data_ptr(),
            n, c, x.numel() // (n * c), groups, len(gain), torch.get_num_threads(),
        )  # fmt: skip
    return dx, dgain, dshift
