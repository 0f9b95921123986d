"""The fused operator on the CPU: adagn_silu.cpp, compiled by the machine's own compiler where it is first used, and kept."""

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

from ..folders import cache_root, file_into_place

SOURCE = Path(__file__).with_name("adagn_silu.cpp")
DTYPES = (torch.float32, torch.bfloat16)

_lock = threading.Lock()
_found: tuple[ctypes.CDLL | None, str] | None = None


def library() -> ctypes.CDLL | None:
    """The compiled operator, built by the first call (about two seconds) unless it lies in the cache; None if it cannot be."""
    return _library()[0]


def why_not() -> str:
    """Why there is none, in words; "" if there is one."""
    return _library()[1]


def _library() -> tuple[ctypes.CDLL | None, str]:
    global _found
    with _lock:
        if _found is None:
            try:
                _found = _load(_build()), ""
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                _found = None, " ".join(str(error).split())[:300]
                print(
                    f"note: the fused operator is not used, plain PyTorch is (slower, the same results): {_found[1]}",
                    file=sys.stderr,
                )
    return _found


def _build() -> Path:
    """The shared library for this source, compiler and CPU: from the cache, or made. Raises OSError or RuntimeError."""
    if os.environ.get("DIFFUSION_ADAGN_NO_COMPILER"):
        raise RuntimeError("DIFFUSION_ADAGN_NO_COMPILER is set.")
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "")
    ]
    if not compiler[0] or shutil.which(compiler[0]) is None:
        raise RuntimeError("there is no C++ compiler (c++, g++ or clang++; or name one in CXX).")
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    made_of = [SOURCE.read_bytes(), _cpu().encode(), torch.__version__.encode(), " ".join(compiler + flags).encode()]
    made_of.append(subprocess.run([*compiler, "--version"], capture_output=True, timeout=60).stdout)
    file = cache_root() / "ops" / f"adagn_silu-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file_into_place(file, lambda beside: _compile(compiler, flags, beside))
    return file


def _compile(compiler: list[str], flags: list[str], to: Path) -> None:
    # torch's own OpenMP: a second one in the process would bring threads of its own
    openmp = [f for f in (Path(torch.__file__).parent / "lib").glob("libgomp*") if f.is_file()]
    tries = [["-fopenmp", *(["-nodefaultlibs", str(openmp[0]), "-lc"] if openmp else [])]]
    tries.append([])  # one thread, rather than none of it
    for extra in tries:
        with tempfile.TemporaryDirectory() as folder:  # a compiler leaves what it began
            out = Path(folder, "adagn_silu.so")
            done = subprocess.run(
                [*compiler, *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(out), *extra],
                capture_output=True,
                text=True,
                timeout=300,
            )
            if done.returncode == 0:
                shutil.copyfile(out, to)
                return
    raise RuntimeError(f"{shlex.join(compiler)} failed: {done.stderr}")


def _cpu() -> str:
    """What -march=native means here: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()


def _load(file: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(file))
    pointer, whole = ctypes.c_void_p, ctypes.c_long
    lib.adagn_silu_forward.argtypes = [*[ctypes.c_int] * 3, *[pointer] * 6, *[whole] * 5, ctypes.c_double, ctypes.c_int]
    lib.adagn_silu_backward.argtypes = [*[ctypes.c_int] * 3, *[pointer] * 9, *[whole] * 5, ctypes.c_int]
    lib.adagn_silu_forward.restype = lib.adagn_silu_backward.restype = None
    return lib


def forward(
    x: Tensor, gain: Tensor, shift: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, H, W] contiguous or channels_last; gain, shift float32 [N or 1, C], contiguous. Returns y like x, and mean
    and rstd float32 [N, groups]."""
    n, c = x.shape[:2]
    y = torch.empty_like(x)
    mean, rstd = torch.empty(n, groups), torch.empty(n, groups)
    if x.numel():
        library().adagn_silu_forward(
            x.dtype == torch.bfloat16, not x.is_contiguous(), silu, x.data_ptr(), y.data_ptr(), gain.data_ptr(),
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
    dgain, dshift = torch.zeros(n, c), torch.zeros(n, c)
    if x.numel():
        library().adagn_silu_backward(
            x.dtype == torch.bfloat16, not x.is_contiguous(), silu, dy.data_ptr(), x.data_ptr(), gain.data_ptr(),
            shift.data_ptr(), mean.data_ptr(), rstd.data_ptr(), dx.data_ptr(), dgain.data_ptr(), dshift.data_ptr(),
            n, c, x.numel() // (n * c), groups, len(gain), torch.get_num_threads(),
        )  # fmt: skip
    return dx, dgain, dshift
