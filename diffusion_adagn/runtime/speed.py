"""How a network is computed on the machine at hand: number type, layout in memory, operator, compiled or not."""

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

MIN_FLOPS_FOR_BF16 = 5e8  # FLOPs of a picture: below, a CPU loses more by converting to bf16 than it gains
COMPILER = "inductor"  # torch.compile's backend


def resolve_speed(asked: SpeedConfig, device: torch.device, flops: int) -> SpeedConfig:
    """What was asked for, each `auto` replaced by the choice for this device. flops: forward, of one picture.

    Raises InputError for what was forced and cannot be.
    """
    precision, memory_format, operator = asked.precision, asked.memory_format, asked.operator
    if precision == "auto":
        precision = _precision(device, flops)
    check_precision(precision, device, "speed.precision")
    if memory_format == "auto":
        memory_format = best_memory_format(device.type, precision != "fp32")
    if operator != "eager":
        why = _no_kernel(device, precision, memory_format, note=operator == "auto")
        if why and operator == "fused":
            raise InputError(f"speed.operator fused cannot be: {why} Take auto or eager.")
        operator = "eager" if why else "fused"
    if asked.compile and device.type == "cpu":
        try:
            compiler()
        except RuntimeError as error:
            raise InputError(f"torch.compile cannot be: {error} Leave out speed.compile (--compile).") from None
    return dataclasses.replace(asked, precision=precision, memory_format=memory_format, operator=operator)


def resolve_speed_together(asked: SpeedConfig, device: torch.device, flops: int) -> SpeedConfig:
    """`resolve_speed`, with the main process's number type on every process: the cards of one job may differ."""
    (precision,) = broadcast_object_list([resolve_speed(asked, device, flops).precision])
    return resolve_speed(dataclasses.replace(asked, precision=precision), device, flops)


def describe_speed(chosen: SpeedConfig, asked: SpeedConfig, device: torch.device | None = None) -> str:
    """ "bf16, channels_last, fused operator (chosen for this machine: precision, layout)"

    device: where it is given, and `auto` means the eager operator on it, the reason follows.
    """
    own = [f.name for f in dataclasses.fields(asked) if getattr(asked, f.name) == "auto" and f.name != "device"]
    told = f"{chosen.precision}, {chosen.memory_format}, {chosen.operator} operator" + ", compiled" * chosen.compile
    if device is not None and chosen.operator == "eager" and asked.operator == "auto":
        why = _no_kernel(device, chosen.precision, chosen.memory_format, note=False)
        own[-1] += f", since the fused one cannot be used: {why.rstrip('.')}" * bool(why)
    return told + (f" (chosen for this machine: {', '.join(own)})" if own else "")


def _no_kernel(device: torch.device, precision: str, memory_format: str, note: bool) -> str:
    """Why there is no fused operator for what was chosen; "" if there is one."""
    return unsupported_reason(device, AUTOCAST[precision] or torch.float32, memory_format == "channels_last", note=note)


def apply_speed(unet: AdaGNUNet, speed: SpeedConfig) -> None:
    """Set layout and operator. `speed` is one that `resolve_speed` returned."""
    unet.set_memory_format(speed.memory_format)
    unet.set_operator(speed.operator)


def compile_blocks(unet: AdaGNUNet) -> None:
    """torch.compile for each kind of repeated block, in place; a few seconds or minutes of the first calls go into it."""
    blocks = [m for m in unet.modules() if isinstance(m, ResBlock | SelfAttention)]
    # one piece of code for all of them, compiled for each shape: torch gives up after eight
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 16 * len(blocks)
    )
    for block in blocks:
        block.compile(dynamic=False, backend=COMPILER)


class CUDAGraphDenoiser:
    """`unet.denoise` as one CUDA graph a shape: captured at its first call, replayed at the others, which spares the host's
    launching of each kernel. Sampling only: no gradients.

    Casts of autocast lie in the graph, since their results do not outlive the context that they were made in.
    """

    def __init__(self, unet: AdaGNUNet):
        self._denoise = unet.denoise
        self._made: dict[tuple, tuple] = {}
        self._side: torch.cuda.Stream | None = None
        self._pool: tuple | None = None  # the memory of all graphs: one replays at a time, and what it leaves is copied

    def __call__(self, x: Tensor, m: Modulation) -> Tensor:
        """As `AdaGNUNet.denoise`."""
        key = x.shape, x.dtype, len(next(iter(m.values()))[0])
        with torch.cuda.device_of(x):  # streams and graphs are the current device's
            if key not in self._made:
                self._made[key] = self._capture(x, m)
            graph, kept_x, kept_m, out = self._made[key]
            kept_x.copy_(x)
            torch._foreach_copy_(_fields(kept_m), _fields(m))
            graph.replay()
            return out.clone()

    def _capture(self, x: Tensor, m: Modulation) -> tuple[torch.cuda.CUDAGraph, Tensor, Modulation, Tensor]:
        x, m = x.clone(), {name: type(told)(*(field.clone() for field in told)) for name, told in m.items()}
        dtype, half = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype, enabled=half, cache_enabled=False):
            self._side = self._side or torch.cuda.Stream()
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                for _ in range(3):  # what libraries do at a first call cannot be captured
                    self._denoise(x, m)
            torch.cuda.current_stream().wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            # not torch's own stream for captures, which is of the device that captured first
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side):
                out = self._denoise(x, m)
            self._pool = graph.pool()
        return graph, x, m, out


def _fields(m: Modulation) -> list[Tensor]:
    return [field for told in m.values() for field in told]


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16, rather than imitating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return any(
        getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )  # torch has no public question


def _precision(device: torch.device, flops: int) -> str:
    if device.type == "cuda":
        return "bf16" if has_bf16(device) else "fp16"
    return "bf16" if flops >= MIN_FLOPS_FOR_BF16 and has_bf16(device) else "fp32"


def measure_peak_flops(device: torch.device | str, dtype: torch.dtype = torch.float32, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest square matrix product that was tried, on as many threads as torch uses now."""
    device, best = torch.device(device), 0.0
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    end = time.perf_counter() + seconds
    for side in {"cpu": (512, 1024), "mps": (1024, 2048)}.get(device.type, (4096, 8192)):
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        a @ b
        tries = 0
        while tries < 2 or (time.perf_counter() < end and tries < 20):
            wait()
            began = time.perf_counter()
            a @ b
            wait()
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
            tries += 1
    return best
