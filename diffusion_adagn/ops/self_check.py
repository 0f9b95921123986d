"""The fused operator checks itself: once per process, device, dtype and memory format, against plain PyTorch."""

import subprocess
import sys
import threading
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

# the largest error of each result, as a fraction of its largest value
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# x, groups, rows of gain and shift: Triton holds the first in one tile and not the second, with 3 and 6 channels per group
CASES = (((2, 12, 7, 5), 4, 2), ((2, 12, 47, 45), 2, 1))
EPS = 1e-5
NO_GPU = "there is no CUDA GPU."

_lock = threading.Lock()
_found: dict[tuple[str, int | None, torch.dtype, bool], str] = {}
_noted = False  # that plain PyTorch is used


def failure(kernels: Callable[[], ModuleType], kind: str, index: int | None, dtype: torch.dtype, last: bool) -> str:
    """Why the kernels cannot be used on this device, for this dtype and memory format (last: channels_last); "" if they can.

    The first call for each runs the kernels; the answer is cached. A CUDA stream that is being captured cannot run
    them: "" and no answer is cached.

    Args:
        kernels: Imports the module with `forward` and `backward`.
        index: Which of them, where there are several.
    """
    key = kind, index, dtype, last
    if key in _found:  # every call of the operator asks
        return _found[key]
    if kind == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return ""
    with _lock:
        if key not in _found:
            # out of memory is no answer: the caller meets the same error, and the next call checks again
            device = torch.device(kind) if index is None else torch.device(kind, index)
            why = _in_own_thread(lambda: _failure(kernels, device, dtype, last))
            if why is None:
                return ""
            _found[key] = why
        return _found[key]


def note(why: str) -> None:
    """Print on stderr, once per process, that plain PyTorch is used instead of the fused operator, and why."""
    global _noted
    if not _noted:
        _noted = True
        print(
            f"note: the fused operator is not used, plain PyTorch is (slower, the same results): {why}", file=sys.stderr
        )


def _in_own_thread(question: Callable[[], str | None]) -> str | None:
    """The answer, computed in a new thread.

    Autocast, gradient and inference mode, hooks, fake tensors, tracing, torch.func and the default device are per thread:
    those of the caller do not reach the check, and the check changes none of them.
    """
    answer: list[str | None] = []
    thread = threading.Thread(target=lambda: answer.append(question()), name="fused operator's check", daemon=True)
    thread.start()
    thread.join()
    return answer[0] if answer else "its self-check did not end."


def _failure(kernels: Callable[[], ModuleType], device: torch.device, dtype: torch.dtype, last: bool) -> str | None:
    """As `failure`; None if there was not enough memory to check."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return NO_GPU
    try:
        for shape, groups, rows in CASES:
            if why := _difference(kernels(), device, dtype, last, shape, groups, rows):
                return why
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except Exception as error:  # whatever a compiler, a driver or a card may raise
        return _reason(error)
    return ""


def _difference(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, last: bool, shape: tuple[int, ...], groups: int, rows: int
) -> str:  # fmt: skip
    """How the kernels' results differ from the reference's in float64 on the CPU; "" if they do not."""
    x, gain, shift, dy = _inputs(dtype, last, shape, rows)
    there = [t.to(device) for t in (x, gain, shift, dy)]
    y, mean, rstd = kernels.forward(*there[:3], groups, EPS, True)
    found = [y, *kernels.backward(there[3], *there[:3], mean, rstd, groups, True)]

    from .reference import adagn_silu_reference

    n, c = shape[:2]
    leaves = [t.double().requires_grad_() for t in (x, gain.expand(n, c), shift.expand(n, c))]
    wanted = adagn_silu_reference(leaves[0], leaves[1] - 1, leaves[2], groups, EPS)
    wanted = [wanted.detach(), *torch.autograd.grad(wanted, leaves, dy.double())]
    names = "its output", "its gradient by x", "its gradient by the gain", "its gradient by the shift"
    for name, a, b in zip(names, found, wanted):
        gap = ((a.cpu().double() - b).abs().max() / b.abs().max()).item()
        if not gap <= LIMIT[dtype]:  # NaN is a difference
            memory_format = "channels_last" if last else "contiguous"
            return (
                f"{name} is wrong in {str(dtype).removeprefix('torch.')}, {memory_format}, on {device}: "
                f"{gap:.1e} from plain PyTorch's, {LIMIT[dtype]:.0e} expected at most."
            )
    return ""


def _inputs(dtype: torch.dtype, last: bool, shape: tuple[int, ...], rows: int) -> list[Tensor]:
    """x, gain, shift and the gradient that comes back, on the CPU: without a random generator, and each channel another."""
    n, c, h, w = shape

    def spread(count: int, step: float) -> Tensor:
        """Numbers in -1..1"""
        return (torch.arange(count, dtype=torch.float64, device="cpu") * step % 1) * 2 - 1

    def laid(t: Tensor) -> Tensor:
        return t.to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    image = torch.arange(n, dtype=torch.float64, device="cpu").reshape(n, 1, 1, 1)
    channel = torch.arange(c, dtype=torch.float64, device="cpu").reshape(1, c, 1, 1)
    x = spread(n * c * h * w, 0.618034).reshape(shape) * (1 + channel / c) + 0.2 * channel - image
    dy = spread(n * c * h * w, 0.754878).reshape(shape) + 0.1 * channel / c + 0.5 * image
    gain, shift = 1 + 0.5 * spread(rows * c, 0.569840), 0.5 * spread(rows * c, 0.324718)
    return [laid(x), gain.float().reshape(rows, c), shift.float().reshape(rows, c), laid(dy)]


def _reason(error: Exception) -> str:
    """In one line what was wrong, and what to install where that is known."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "triton":
        return "Triton is not installed: pip install triton."
    short_repr = next((line.strip() for line in str(error).splitlines() if line.strip()), "it said nothing")[:200]
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else " ".join(map(str, error.cmd[:1]))
        return (
            f"Triton could not be built for this machine ({command} ended with status {error.returncode}): "
            "is Python.h there? It comes with python3-dev or python3-devel."
        )
    if "C compiler" in short_repr:
        return "Triton finds no C compiler: install gcc, or name one in CC."
    return f"its self-check failed with {type(error).__name__}: {short_repr.rstrip('.')}."
