"""The precision that a network computes in: autocast and TF32. No other module sets TF32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from ..errors import InputError

AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Value = TypeVar("Value")


def has_tf32(device: torch.device) -> bool:
    """Whether the device supports TF32."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_tf32_supported()


def check_precision(precision: str, device: torch.device, option: str) -> None:
    """Raises InputError if the device does not support tf32 or fp16, and this is the precision.

    option: its name in the message.
    """
    if (precision == "fp16" and device.type != "cuda") or (precision == "tf32" and not has_tf32(device)):
        needed = "that has TF32 (Ampere or later); use fp32" if precision == "tf32" else "; use bf16 or fp32"
        raise InputError(f"{option} {precision} needs a CUDA GPU {needed} here.".replace(" ;", ";"))


@contextmanager
def use_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Compute the block in this precision: autocast, and TF32 only for "tf32". Restores both settings."""
    dtype = AUTOCAST[precision]
    with use_tf32(precision == "tf32"), torch.autocast(device.type, dtype, enabled=dtype is not None):
        yield


@contextmanager
def use_tf32(on: bool) -> Iterator[None]:
    """Switch TF32 on or off for CUDA's float32 convolutions and matrix products. Restores the setting.

    torch's default is TF32 in convolutions only, accurate to about 1e-3. The setting is per process, not per thread.
    Both of torch's settings, `allow_tf32` and `fp32_precision`, get the value: reading one raises if they differ.
    """
    before = _tf32_state()
    _set_tf32(("highest", "high")[on], on, *[("ieee", "tf32")[on]] * 3)
    try:
        yield
    finally:
        _set_tf32(*before)


def _tf32_state() -> tuple[str | None, bool | None, str, str, str]:
    backends = torch.backends
    return (
        _or_none_if_inconsistent(torch.get_float32_matmul_precision),
        _or_none_if_inconsistent(lambda: backends.cudnn.allow_tf32),
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.rnn.fp32_precision,
    )


def _set_tf32(products: str | None, convolutions: bool | None, matmul: str, conv: str, rnn: str) -> None:
    """Set the values of `_tf32_state`. None leaves a setting unchanged."""
    if products == "medium":  # set by the caller, and also for the CPU
        torch.set_float32_matmul_precision(products)
    elif products is not None:
        torch.backends.cuda.matmul.allow_tf32 = products == "high"
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.fp32_precision = matmul
    torch.backends.cudnn.conv.fp32_precision = conv
    torch.backends.cudnn.rnn.fp32_precision = rnn


def _or_none_if_inconsistent(flag: Callable[[], Value]) -> Value | None:
    try:
        return flag()
    except RuntimeError:  # the caller set torch's two settings to different values
        return None
