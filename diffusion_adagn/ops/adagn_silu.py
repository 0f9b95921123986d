"""adagn_silu: the operator as PyTorch sees it. Kernels: `cpu` (C++) and `triton_kernels` (CUDA)."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import cpu, self_check
from .reference import adagn_silu_reference

OPERATORS = ("auto", "fused", "eager")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def adagn_silu(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    silu: bool = True,
    operator: str = "auto",
) -> Tensor:
    """silu(GroupNorm(x; weight, bias) * (1 + gamma) + beta), in one pass over memory where a kernel exists.

    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3, equation 3; Wu & He 2018 (GroupNorm), equation 2.

    Args:
        x: [B, C, ...]. [B, C, H, W] may be contiguous or channels_last, and the result is the same; others become contiguous.
        gamma: [B or 1, C], or None for 0.
        beta: [B or 1, C], or None for 0.
        groups: of the norm; must divide C.
        eps: of the norm.
        weight: [C], of the norm, or None for 1.
        bias: [C], of the norm, or None for 0.
        silu: apply SiLU.
        operator: "fused", "eager" (plain PyTorch), or "auto": fused where possible, and eager inside torch.func, forward-mode
            gradients and torch.jit.trace. Batched gradients, and second derivatives through torch.compile, need "eager".

    Returns:
        Like x, in its dtype. Statistics and intermediate values are float32 (float64 for float64).

    Raises:
        InputError: groups do not divide C, shapes do not fit, or "fused" is not possible.
    """
    _check(x, gamma, beta, groups, weight, bias)
    if not _fuses(x, operator) or (operator == "auto" and in_functional_transform()):
        return adagn_silu_reference(x, gamma, beta, groups, eps, weight, bias, silu)
    gain, shift = _gain_and_shift(x, gamma, beta, weight, bias)
    return _apply(x, gain, shift, groups, eps, silu)


def available(device: torch.device | str) -> bool:
    """Whether there is a kernel for this device. On the CPU the first call may compile one."""
    return not unsupported_reason(device)


def unsupported_reason(
    device: torch.device | str, dtype: torch.dtype = torch.float32, last: bool = True, note: bool = True
) -> str:
    """Why the fused operator cannot be used on this device, for this dtype and memory format (last: channels_last); "" if it can.

    The first call for a device, dtype and memory format builds the kernels and checks them against plain PyTorch (`self_check`).
    note: print once on stderr that plain PyTorch is used instead.
    """
    device = torch.device(device)
    return _unsupported_reason(device.type, device.index, dtype, last, note)


@torch.compiler.assume_constant_result
def _unsupported_reason(kind: str, index: int | None, dtype: torch.dtype, last: bool, note: bool) -> str:
    if kind == "meta":
        return "" if dtype in TRITON_DTYPES else f"it does not take {dtype}."
    if kind not in ("cpu", "cuda"):
        return f"there is no kernel for {kind} devices."
    if dtype not in (cpu.DTYPES if kind == "cpu" else TRITON_DTYPES):
        return f"it does not take {dtype}{' on a CPU' * (kind == 'cpu')}."
    if kind == "cpu":
        why = cpu.unsupported_reason(dtype, last) or self_check.failure(_cpu, kind, None, dtype, last)
    elif index is None and not torch.cuda.is_available():
        return self_check.NO_GPU
    else:
        index = torch.cuda.current_device() if index is None else index
        why = self_check.failure(_triton, kind, index, dtype, last)
    if why and note and why != self_check.NO_GPU:
        self_check.note(why)
    return why


def _fuses(x: Tensor, operator: str) -> bool:
    if operator == "eager":
        return False
    if operator not in OPERATORS:
        raise InputError(f"operator is one of {', '.join(OPERATORS)}, not {operator!r}.")
    no = _unsupported_reason(x.device.type, x.device.index, x.dtype, not x.is_contiguous(), operator == "auto")
    if no and operator == "fused":
        raise InputError(f"the fused operator cannot be used: {no} Take operator auto or eager.")
    return not no


def _gain_and_shift(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """GroupNorm's weight and bias merged with the modulation: (gain, shift), float32 [B or 1, C] each.

    (xhat w + b) (1 + gamma) + beta = xhat (w + w gamma) + (beta + b + b gamma)
    """
    w = x.new_ones(x.shape[1], dtype=torch.float32) if weight is None else weight.float()
    b = x.new_zeros(x.shape[1], dtype=torch.float32) if bias is None else bias.float()
    gain, shift = w[None], b[None]
    if gamma is not None:
        gain, shift = torch.addcmul(w, w, gamma.float()), torch.addcmul(b, b, gamma.float())
    if beta is not None:
        shift = shift + beta.float()
    return torch.broadcast_tensors(gain, shift)


def _check(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None
) -> None:
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        raise InputError(f"x is [B, C, ...] with {groups} groups dividing C, not {list(x.shape)}.")
    n, c = x.shape[:2]
    given = {"gamma": gamma, "beta": beta, "weight": weight, "bias": bias}
    for name, values in given.items():
        leads = ((n,), (1,)) if name in ("gamma", "beta") else ((),)
        if values is not None and values.shape not in [(*lead, c) for lead in leads]:
            expected = f"[{n} or 1, {c}]" if len(leads) > 1 else f"[{c}]"
            raise InputError(f"{name} is {expected} for x {list(x.shape)}, not {list(values.shape)}.")


# ---------------------------------------------------------------------- registration with torch


def _apply(x: Tensor, gain: Tensor, shift: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """The operator through torch's dispatcher where something looks on (compile, export, fake tensors), else past it, which
    takes a third of the time: it counts where images are small."""
    if (
        type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or torch.compiler.is_compiling()
        or in_functional_transform()
        or torch._C._len_torch_dispatch_stack()
    ):
        return torch.ops.diffusion_adagn.adagn_silu(x, gain, shift, groups, eps, silu)[0]
    x, gain, shift = _dense(x), _dense(gain), _dense(shift)
    if torch.is_grad_enabled() and (x.requires_grad or gain.requires_grad or shift.requires_grad):
        return _AdaGNSiLU.apply(x, gain, shift, groups, eps, silu)
    return _kernels(x).forward(x, gain, shift, groups, eps, silu)[0]


def in_functional_transform() -> bool:
    """Whether torch.func, forward-mode gradients or torch.jit look on: they see into plain PyTorch alone."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )  # torch has no public question


def _dense(x: Tensor) -> Tensor:
    """x in one of the two layouts, with no minus sign waiting to be applied."""
    if x.is_neg():
        x = x.resolve_neg()
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else x.contiguous()


class _AdaGNSiLU(torch.autograd.Function):
    """The same, for eager gradients; those that are to be differentiated again are plain PyTorch's."""

    @staticmethod
    def forward(ctx, x, gain, shift, groups, eps, silu):
        y, mean, rstd = _kernels(x).forward(x, gain, shift, groups, eps, silu)
        ctx.save_for_backward(x, gain, shift, mean, rstd)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy, _kernels(dy).backward)
        x, gain, shift, *_ = ctx.saved_tensors
        asked = [t for t, needed in zip((x, gain, shift), ctx.needs_input_grad) if needed]
        y = adagn_silu_reference(x, gain - 1, shift, ctx.groups, ctx.eps, silu=ctx.silu)
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=True))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None


@torch.library.custom_op("diffusion_adagn::adagn_silu", mutates_args=())
def _forward(
    x: Tensor, gain: Tensor, shift: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x; mean and rstd float32 [B, groups]. x in either layout; gain, shift float32 [B or 1, C]."""
    return _kernels(x).forward(_dense(x), _dense(gain), _dense(shift), groups, eps, silu)


@torch.library.custom_op("diffusion_adagn::adagn_silu_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dgain, dshift float32 [B, C]. dy in x's type and layout."""
    return _kernels(x).backward(dy, x, _dense(gain), _dense(shift), mean, rstd, groups, silu)


def _kernels(x: Tensor) -> ModuleType:
    return _cpu() if x.device.type == "cpu" else _triton()


def _cpu() -> ModuleType:
    return cpu


def _triton() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


@_forward.register_fake
def _(x, gain, shift, groups, eps, silu):
    mean = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(_dense(x)), mean, torch.empty_like(mean)


@_backward.register_fake
def _(dy, x, gain, shift, mean, rstd, groups, silu):
    rows = x.new_empty(x.shape[0], x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), rows, torch.empty_like(rows)


def _keep(ctx, inputs, output) -> None:
    x, gain, shift, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, gain, shift, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, dy: Tensor, backward: Callable) -> tuple[Tensor | None, ...]:
    x, *rows = ctx.saved_tensors  # hooks may have stored them in another way
    x, (gain, shift, mean, rstd) = _dense(x.to(dy.dtype)), (_dense(t.float()) for t in rows)
    if dy.stride() != x.stride() or dy.is_neg():
        dy = torch.empty_like(x).copy_(dy)
    dx, dgain, dshift = backward(dy, x, gain, shift, mean, rstd, ctx.groups, ctx.silu)
    if gain.shape[0] == 1:
        dgain, dshift = dgain.sum(0, keepdim=True), dshift.sum(0, keepdim=True)
    return dx, dgain, dshift, None, None, None


_forward.register_autograd(
    lambda ctx, dy, *_: _gradients(ctx, dy, torch.ops.diffusion_adagn.adagn_silu_backward), setup_context=_keep
)
