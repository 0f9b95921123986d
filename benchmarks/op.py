"""The operator alone: silu(GroupNorm(x) * (1 + gamma) + beta), fused and as a formula, compared with a copy of the tensor."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_adagn.ops import adagn_silu, unsupported_reason

from .limits import copy_bytes
from .machine import DTYPES, full_fp32, unpinned
from .networks import MEMORY_FORMATS, TOLERANCE, free
from .sizes import Size
from .timing import Clock, Deadline, fastest, interleave, paired, summary

EPS = 1e-5
PASSES = {
    "forward": 2,
    "forward+backward": 5,
}  # minimum passes of the tensor through memory: x, out; x, out, x, d out, d x


def formula(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """The operator in plain PyTorch."""
    h = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(h * (1 + gamma[..., None, None]) + beta[..., None, None])


def shapes(size: Size, batch: int, dtype: str, device: torch.device) -> list[tuple[int, int, int, int]]:
    """[B, C, H, W] of the widest feature map of every level of at least 8x8 (or of the first level).

    On CUDA the batch is so large that the tensor is well above the L2; on the CPU it is the network's.
    """
    shapes = []
    for level, mult in enumerate(size.mult):
        channels, side = size.channels * mult, size.side >> level
        if level and side < 8:
            continue
        rows = batch
        if device.type == "cuda":
            image_bytes = channels * side * side * torch.finfo(DTYPES[dtype]).bits // 8
            rows = max(batch, -(-copy_bytes(device) // image_bytes))
        shapes.append((rows, channels, side, side))
    return shapes


def measure(
    size: Size,
    dtype: str,
    batch: int,
    clock: Clock,
    rounds: int,
    sample_seconds: float = 0.2,
    compile: str | None = None,
    deadline: Deadline | None = None,
) -> dict:
    """{"rows", "ratios", "not_measured"} over every shape, memory format, direction and implementation."""
    deadline = deadline or Deadline()
    result: dict = {"rows": [], "ratios": [], "not_measured": []}
    reason = unsupported_reason(clock.device)
    implementations: dict[str, Callable] = {"formula": formula}
    if reason:
        result["not_measured"].append(f"fused operator: {reason}")
    else:
        implementations["fused"] = adagn_silu
    if compile:
        implementations["formula compiled"] = formula
    for number, shape in enumerate(shapes(size, batch, dtype, clock.device)):
        for memory_format in MEMORY_FORMATS:
            where = f"{'x'.join(map(str, shape))} {memory_format}"
            if number and deadline.passed:
                result["not_measured"].append(f"operator {where}: the time limit was reached")
                continue
            with full_fp32():
                measured = _one(
                    shape, memory_format, implementations, size.groups, dtype, clock, rounds, sample_seconds, deadline
                )
            for key, values in measured.items():
                result[key] += values
            free(clock.device)
    return result


def _one(shape, memory_format, implementations, groups, dtype, clock, rounds, sample_seconds, deadline) -> dict:
    """Measure one shape in one memory format."""
    device = clock.device
    generator = torch.Generator(device).manual_seed(0)
    rows, channels = shape[:2]
    x = (
        torch.randn(shape, generator=generator, device=device)
        .to(DTYPES[dtype])
        .to(memory_format=MEMORY_FORMATS[memory_format])
    )
    modulation = [
        torch.randn(rows, channels, generator=generator, device=device).mul(0.2).to(x.dtype) for _ in range(2)
    ]
    affine = [torch.rand(channels, generator=generator, device=device).to(x.dtype) for _ in range(2)]
    inputs = [v.requires_grad_() for v in (x, *modulation, *affine)]
    grad_output, target = torch.randn_like(x), torch.empty_like(x)
    where = {"shape": list(shape), "memory_format": memory_format, "bytes": x.nbytes}
    result: dict = {"rows": [], "ratios": [], "not_measured": []}
    errors_of: dict[str, list[float]] = {}

    def forward(call: Callable) -> Tensor:
        return call(inputs[0], inputs[1], inputs[2], groups, EPS, inputs[3], inputs[4])

    def forward_backward(call: Callable) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(call), inputs, grad_output)

    calls: dict[tuple[str, str], Callable] = {("copy", "forward"): lambda: target.copy_(x.detach())}
    expected = _outputs_and_gradients(formula, inputs, grad_output, groups, torch.float32)
    for implementation, call in implementations.items():
        if implementation.endswith("compiled"):
            call = torch.compile(call, dynamic=False)
        try:
            with unpinned():
                errors = _errors(_outputs_and_gradients(call, inputs, grad_output, groups, x.dtype), expected)
                torch.no_grad()(forward)(call)
                forward_backward(call)
        except Exception as error:  # as in networks._ready
            if not (implementation.endswith("compiled") or isinstance(error, RuntimeError)):
                raise
            result["not_measured"].append(
                f"operator {implementation} {where['shape']} {memory_format}: {' '.join(str(error).split())[:200]}"
            )
            continue
        if not max(errors) <= TOLERANCE[dtype][1]:
            result["not_measured"].append(
                f"operator {implementation} {where['shape']} {memory_format}: rejected: it differs from the formula in fp32 by {max(errors):.2g}"
            )
            continue
        errors_of[implementation] = errors
        calls[implementation, "forward"] = torch.no_grad()(lambda call=call: forward(call))
        calls[implementation, "forward+backward"] = lambda call=call: forward_backward(call)
    samples = interleave(calls, clock, rounds, sample_seconds, deadline, f"op {where['shape']} {memory_format}")
    copied = samples["copy", "forward"]
    for (implementation, direction), taken in samples.items():
        passes = PASSES[direction]
        row = (
            {"name": f"{implementation} {direction}", "implementation": implementation, "direction": direction}
            | where
            | summary(taken)
        )
        row |= {"errors": errors_of.get(implementation), "not_measured": None}
        row["bytes_per_s"] = passes * x.nbytes / row["median_s"]
        row["copy_fraction"] = passes / PASSES["forward"] * paired(taken, copied)["median"]
        result["rows"].append(row)
    for direction in PASSES:
        others = [
            r for r in result["rows"] if r["direction"] == direction and r["implementation"].startswith("formula")
        ]
        if ("fused", direction) in samples:
            other = fastest(others)
            pair = paired(samples["fused", direction], samples[other["implementation"], direction])
            result["ratios"].append({"ours": f"fused {direction}", "peer": other["name"]} | where | pair)
    return result


def _outputs_and_gradients(call, inputs, grad_output, groups, dtype) -> list[Tensor]:
    """Output and gradients of the first rows, float32."""
    first_rows = [v.detach()[:4].to(dtype).requires_grad_() for v in inputs[:3]]
    first_rows += [v.detach().to(dtype).requires_grad_() for v in inputs[3:]]
    out = call(first_rows[0], first_rows[1], first_rows[2], groups, EPS, first_rows[3], first_rows[4])
    grads = torch.autograd.grad(out, first_rows, grad_output[:4].to(dtype))
    return [v.detach().float() for v in (out, *grads)]


def _errors(outputs: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(outputs, expected)]
