"""How a network computes on this machine: precision, memory format, operator, torch.compile."""

import dataclasses
import time

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..config import SpeedConfig
from ..errors import InputError
from ..models.blocks import ResBlock, SelfAttention
from ..models.unet import AdaGNUNet, Modulation, best_memory_format
from ..ops import unsupported_reason
from ..ops.cpu import compiler
from .precision import AUTOCAST, check_precision

MIN_FLOPS_FOR_BF16 = 2.5e8  # per image, forward; below this, converting to bf16 costs a CPU more than it gains
COMPILER = "inductor"  # torch.compile's backend


def resolve_speed(requested: SpeedConfig, device: torch.device, flops: int) -> SpeedConfig:
    """Replace each `auto` by the choice for this device.

    Args:
        requested: The settings of the run or command.
        device: The device of the network.
        flops: Forward FLOPs of one image.

    Returns:
        Settings without `auto`, except in `device`.

    Raises:
        InputError: This machine does not support a setting that is not `auto`.
    """
    precision, memory_format, operator = requested.precision, requested.memory_format, requested.operator
    if precision == "auto":
        precision = _precision(device, flops)
    check_precision(precision, device, "speed.precision")
    if memory_format == "auto":
        memory_format = best_memory_format(device.type, precision != "fp32")
    if operator != "eager":
        reason = _no_kernel(device, precision, memory_format, note=operator == "auto")
        if reason and operator == "fused":
            raise InputError(f"speed.operator fused is not available: {reason} Use auto or eager.")
        operator = "eager" if reason else "fused"
    if requested.compile and device.type == "cpu":
        try:
            compiler()
        except RuntimeError as error:
            raise InputError(f"torch.compile is not available: {error} Omit speed.compile (--compile).") from None
    return dataclasses.replace(requested, precision=precision, memory_format=memory_format, operator=operator)


def resolve_speed_together(requested: SpeedConfig, device: torch.device, flops: int) -> SpeedConfig:
    """`resolve_speed`, with the main process's precision on every process: the GPUs of one job may differ."""
    (precision,) = broadcast_object_list([resolve_speed(requested, device, flops).precision])
    return resolve_speed(dataclasses.replace(requested, precision=precision), device, flops)


def describe_speed(chosen: SpeedConfig, requested: SpeedConfig, device: torch.device | None = None) -> str:
    """ "bf16, channels_last, fused operator (chosen for this machine: precision, memory_format)"

    Args:
        chosen: What `resolve_speed` returned.
        requested: The settings that it was called with.
        device: If given, and `auto` resolved to the eager operator on it, the text contains the reason.
    """
    auto_settings = [
        f.name for f in dataclasses.fields(requested) if getattr(requested, f.name) == "auto" and f.name != "device"
    ]
    text = f"{chosen.precision}, {chosen.memory_format}, {chosen.operator} operator" + ", compiled" * chosen.compile
    if device is not None and chosen.operator == "eager" and requested.operator == "auto":
        reason = _no_kernel(device, chosen.precision, chosen.memory_format, note=False)
        auto_settings[-1] += f", since the fused one cannot be used: {reason.rstrip('.')}" * bool(reason)
    return text + (f" (chosen for this machine: {', '.join(auto_settings)})" if auto_settings else "")


def _no_kernel(device: torch.device, precision: str, memory_format: str, note: bool) -> str:
    """Why the fused operator does not support these settings; "" if it does."""
    return unsupported_reason(device, AUTOCAST[precision] or torch.float32, memory_format == "channels_last", note=note)


def apply_speed(unet: AdaGNUNet, speed: SpeedConfig) -> None:
    """Set the network's memory format and operator. speed: what `resolve_speed` returned."""
    unet.set_memory_format(speed.memory_format)
    unet.set_operator(speed.operator)


def compile_blocks(unet: AdaGNUNet) -> None:
    """Compile each type of repeated block with torch.compile, in place.

    The first calls take seconds to minutes longer.
    """
    blocks = [m for m in unet.modules() if isinstance(m, ResBlock | SelfAttention)]
    # the blocks share one code object, which is compiled per shape; torch's limit is 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 16 * len(blocks)
    )
    for block in blocks:
        block.compile(dynamic=False, backend=COMPILER)


class CUDAGraphDenoiser:
    """`unet.denoise` as one CUDA graph per shape: captured at the first call, replayed at the others.

    A replay saves the host's launch of each kernel. For sampling only: no gradients. The graph includes autocast's
    casts, because their results are not valid outside the autocast context.
    """

    def __init__(self, unet: AdaGNUNet):
        self._denoise = unet.denoise
        self._captured: dict[tuple, tuple] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: tuple | None = None  # memory shared by all graphs: one replays at a time, and its output is copied

    def __call__(self, x: Tensor, m: Modulation) -> Tensor:
        """See `AdaGNUNet.denoise`."""
        key = x.shape, x.dtype, *(field.shape for field in _fields(m))
        with torch.cuda.device_of(x):  # streams and graphs belong to the current device
            if key not in self._captured:
                self._captured[key] = self._capture(x, m)
            graph, static_x, static_m, out = self._captured[key]
            static_x.copy_(x)
            torch._foreach_copy_(_fields(static_m), _fields(m))
            graph.replay()
            return out.clone()

    def _capture(self, x: Tensor, m: Modulation) -> tuple[torch.cuda.CUDAGraph, Tensor, Modulation, Tensor]:
        x, m = x.clone(), {name: type(mod)(*(field.clone() for field in mod)) for name, mod in m.items()}
        dtype, half = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype, enabled=half, cache_enabled=False):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(3):  # warm-up: the first calls of libraries cannot be captured
                    self._denoise(x, m)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # torch's own capture stream belongs to the device that captured first
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                out = self._denoise(x, m)
            self._pool = graph.pool()
        return graph, x, m, out


def _fields(m: Modulation) -> list[Tensor]:
    return [field for mod in m.values() for field in mod]


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic, and does not emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return any(
        getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )  # torch has no public function for this


def _precision(device: torch.device, flops: int) -> str:
    if device.type == "cuda":
        return "bf16" if has_bf16(device) else "fp16"
    return "bf16" if flops >= MIN_FLOPS_FOR_BF16 and has_bf16(device) else "fp32"


def measure_peak_flops(device: torch.device | str, dtype: torch.dtype = torch.float32, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest square matrix product measured, with torch's current number of threads."""
    device, peak = torch.device(device), 0.0
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    end = time.perf_counter() + seconds
    for side in {"cpu": (512, 1024), "mps": (1024, 2048)}.get(device.type, (4096, 8192)):
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        a @ b
        tries = 0
        while tries < 2 or (time.perf_counter() < end and tries < 20):
            wait()
            start = time.perf_counter()
            a @ b
            wait()
            peak = max(peak, 2 * side**3 / (time.perf_counter() - start))
            tries += 1
    return peak
