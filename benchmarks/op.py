"""The operator alone: silu(GroupNorm(x) * (1 + gamma) + beta), fused and as a formula, against a copy of the same tensor."""

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
PASSES = {"forward": 2, "forward+backward": 5}  # of the tensor through memory, at least: x, out; x, out, x, d out, d x


def formula(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """The operator as one writes it in PyTorch."""
    h = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(h * (1 + gamma[..., None, None]) + beta[..., None, None])


def shapes(size: Size, batch: int, dtype: str, device: torch.device) -> list[tuple[int, int, int, int]]:
    """[B, C, H, W] of the widest feature map of every level of at least 8x8 (or the first one's).

    On CUDA the batch is made so large that the tensor is well over the L2; on the CPU it is the network's.
    """
    found = []
    for level, mult in enumerate(size.mult):
        channels, side = size.channels * mult, size.side >> level
        if level and side < 8:
            continue
        rows = batch
        if device.type == "cuda":
            one = channels * side * side * torch.finfo(DTYPES[dtype]).bits // 8
            rows = max(batch, -(-copy_bytes(device) // one))
        found.append((rows, channels, side, side))
    return found


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
    """{"rows", "ratios", "not_measured"} over every shape, layout, direction and implementation."""
    deadline = deadline or Deadline()
    result: dict = {"rows": [], "ratios": [], "not_measured": []}
    why = unsupported_reason(clock.device)
    kinds: dict[str, Callable] = {"formula": formula}
    if why:
        result["not_measured"].append(f"fused operator: {why}")
    else:
        kinds["fused"] = adagn_silu
    if compile:
        kinds["formula compiled"] = formula
    for number, shape in enumerate(shapes(size, batch, dtype, clock.device)):
        for layout in MEMORY_FORMATS:
            where = f"{'x'.join(map(str, shape))} {layout}"
            if number and deadline.passed:
                result["not_measured"].append(f"operator {where}: the time limit came first")
                continue
            with full_fp32():
                found = _one(shape, layout, kinds, size.groups, dtype, clock, rounds, sample_seconds, deadline)
            for key, values in found.items():
                result[key] += values
            free(clock.device)
    return result


def _one(shape, layout, kinds, groups, dtype, clock, rounds, sample_seconds, deadline) -> dict:
    """One shape in one layout."""
    device = clock.device
    draw = torch.Generator(device).manual_seed(0)
    rows, channels = shape[:2]
    x = torch.randn(shape, generator=draw, device=device).to(DTYPES[dtype]).to(memory_format=MEMORY_FORMATS[layout])
    told = [torch.randn(rows, channels, generator=draw, device=device).mul(0.2).to(x.dtype) for _ in range(2)]
    affine = [torch.rand(channels, generator=draw, device=device).to(x.dtype) for _ in range(2)]
    given = [v.requires_grad_() for v in (x, *told, *affine)]
    answer, into = torch.randn_like(x), torch.empty_like(x)
    where = {"shape": list(shape), "layout": layout, "bytes": x.nbytes}
    found: dict = {"rows": [], "ratios": [], "not_measured": []}
    errors_of: dict[str, list[float]] = {}

    def forward(call: Callable) -> Tensor:
        return call(given[0], given[1], given[2], groups, EPS, given[3], given[4])

    def both(call: Callable) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(call), given, answer)

    calls: dict[tuple[str, str], Callable] = {("copy", "forward"): lambda: into.copy_(x.detach())}
    wanted = _checked_part(formula, given, answer, groups, torch.float32)
    for kind, call in kinds.items():
        if kind.endswith("compiled"):
            call = torch.compile(call, dynamic=False)
        try:
            with unpinned():
                errors = _errors(_checked_part(call, given, answer, groups, x.dtype), wanted)
                torch.no_grad()(forward)(call)
                both(call)
        except Exception as error:  # as in networks._ready
            if not (kind.endswith("compiled") or isinstance(error, RuntimeError)):
                raise
            found["not_measured"].append(
                f"operator {kind} {where['shape']} {layout}: {' '.join(str(error).split())[:200]}"
            )
            continue
        if not max(errors) <= TOLERANCE[dtype][1]:
            found["not_measured"].append(
                f"operator {kind} {where['shape']} {layout}: refused: it differs from the formula in fp32 by {max(errors):.2g}"
            )
            continue
        errors_of[kind] = errors
        calls[kind, "forward"] = torch.no_grad()(lambda call=call: forward(call))
        calls[kind, "forward+backward"] = lambda call=call: both(call)
    samples = interleave(calls, clock, rounds, sample_seconds, deadline, f"op {where['shape']} {layout}")
    copied = samples["copy", "forward"]
    for (kind, direction), taken in samples.items():
        passes = PASSES[direction]
        row = {"name": f"{kind} {direction}", "kind": kind, "direction": direction} | where | summary(taken)
        row |= {"errors": errors_of.get(kind), "not_measured": None}
        row["bytes_per_s"] = passes * x.nbytes / row["median_s"]
        row["share_of_copy"] = passes / PASSES["forward"] * paired(taken, copied)["median"]
        found["rows"].append(row)
    for direction in PASSES:
        others = [r for r in found["rows"] if r["direction"] == direction and r["kind"].startswith("formula")]
        if ("fused", direction) in samples:
            other = fastest(others)
            pair = paired(samples["fused", direction], samples[other["kind"], direction])
            found["ratios"].append({"ours": f"fused {direction}", "peer": other["name"]} | where | pair)
    return found


def _checked_part(call, given, answer, groups, dtype) -> list[Tensor]:
    """Output and gradients for the first rows, float32."""
    few = [v.detach()[:4].to(dtype).requires_grad_() for v in given[:3]]
    few += [v.detach().to(dtype).requires_grad_() for v in given[3:]]
    out = call(few[0], few[1], few[2], groups, EPS, few[3], few[4])
    grads = torch.autograd.grad(out, few, answer[:4].to(dtype))
    return [v.detach().float() for v in (out, *grads)]


def _errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, wanted)]
