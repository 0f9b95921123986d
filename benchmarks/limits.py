"""The limits of the machine: matrix products, copies, and the convolutions of a network alone."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from . import ours, peers
from .machine import DTYPES, full_fp32
from .networks import MEMORY_FORMATS, Case, inputs
from .timing import Clock, Deadline

SECONDS = 0.2  # minimum time for measuring one limit


def min_seconds(call: Callable[[], object], clock: Clock, seconds: float, tries: int = 3) -> float:
    """The minimum of a few samples of a call, seconds, after one call for warm-up."""
    call()
    repeats = max(1, min(1000, math.ceil(seconds / tries / max(clock.sample(call).seconds, 1e-9))))
    return min(clock.sample(call, repeats).seconds for _ in range(tries))


def matmul_rate(clock: Clock, dtype: str, seconds: float = SECONDS) -> float:
    """FLOP/s of the best square matrix product of a few sizes; full fp32 on CUDA, no TF32."""
    rates = []
    with full_fp32(), torch.inference_mode():
        for side in (4096, 8192) if clock.device.type == "cuda" else (512, 1024):
            a, b = (torch.randn(side, side, device=clock.device).to(DTYPES[dtype]) for _ in range(2))
            rates.append(2 * side**3 / min_seconds(lambda a=a, b=b: a @ b, clock, seconds))
    return max(rates)


def copy_rate(clock: Clock, size: int, seconds: float = SECONDS) -> float:
    """Bytes/s, read and written together, of copying a tensor of `size` bytes."""
    a = torch.ones(size // 4, device=clock.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min_seconds(lambda: b.copy_(a), clock, seconds)


def copy_bytes(device: torch.device) -> int:
    """A size well above the last-level cache: 8 times the GPU's L2, or 256 MiB."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if device.type == "cuda" else 0
    return max(2**28, 8 * cache)


# ---------------------------------------------------------------------- the floor of a network


class LayerCounter(TorchFunctionMode):
    """Counts the convolutions, linear layers and attentions called inside it: {(operation, shapes, settings): calls}."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name == "conv2d":
            x, weight, _, stride, padding, dilation, groups = (*args, *(None, 1, 0, 1, 1)[len(args) - 2 :])
            settings = (_pair(stride), _pair(padding), _pair(dilation), groups)
            self.counts[name, tuple(x.shape), tuple(weight.shape), settings] += 1
        elif name == "linear":
            self.counts[name, tuple(args[0].shape), tuple(args[1].shape), None] += 1
        elif name == "scaled_dot_product_attention":
            q, k = (kwargs[n] if n in (kwargs or {}) else args[i] for i, n in enumerate(("query", "key")))
            self.counts[name, tuple(q.shape), tuple(k.shape), None] += 1
        return func(*args, **(kwargs or {}))


def _pair(value) -> tuple | str:
    return (value, value) if isinstance(value, int) else value if isinstance(value, str) else tuple(value)


def count_layers(case: Case) -> Counter:
    """The layers of the case's network at its batch size, counted on the meta device in diffusers' equivalent network."""
    net = peers.diffusers_twin(ours.network(**case.size.network(case.resample))).to("meta")
    x, t, y, _ = (v.to("meta") for v in inputs(case, torch.float32, torch.contiguous_format))
    with torch.no_grad(), LayerCounter() as counter:
        net(x, t, y, return_dict=False)
    return counter.counts


def floor_seconds(case: Case, clock: Clock, seconds: float = SECONDS, deadline: Deadline | None = None) -> float | None:
    """Seconds of the case's convolutions, linear layers and attentions alone, each in its faster memory format.

    For training, with their backward passes and the optimizer. None if the deadline was reached.
    """
    deadline = deadline or Deadline()
    layers = count_layers(case)
    total = 0.0
    with full_fp32():
        for layer, count in tqdm(layers.items(), desc=f"floor {case.task} {case.size.name}", leave=False, disable=None):
            if deadline.passed:
                return None
            total += count * min(
                min_seconds(_layer_call(layer, case, memory_format), clock, seconds / 4)
                for memory_format in (MEMORY_FORMATS if layer[0] == "conv2d" else ("nchw",))
            )
        if case.task == "train":
            net = ours.network(**case.size.network(case.resample)).to(case.device)
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            total += min_seconds(torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True).step, clock, seconds)
    return total


def _layer_call(layer: tuple, case: Case, memory_format: str) -> Callable[[], object]:
    operation, first, second, settings = layer
    dtype, train = DTYPES[case.dtype], case.task == "train"

    def draw(shape: tuple) -> Tensor:
        tensor = torch.randn(shape, device=case.device).to(dtype)
        tensor = (
            tensor.to(memory_format=MEMORY_FORMATS[memory_format])
            if len(shape) == 4 and operation == "conv2d"
            else tensor
        )
        return tensor.requires_grad_(train)

    inputs = [draw(first), draw(second)]
    if operation == "conv2d":
        inputs.append(draw((second[0],)))
        stride, padding, dilation, groups = settings
        forward = lambda x, w, b: F.conv2d(x, w, b, stride, padding, dilation, groups)  # noqa: E731
    elif operation == "linear":
        inputs.append(draw((second[0],)))
        forward = F.linear
    else:
        inputs.append(draw(second))
        forward = F.scaled_dot_product_attention
    if not train:
        return torch.inference_mode()(lambda: forward(*inputs))
    with torch.no_grad():
        grad_output = torch.ones_like(forward(*inputs))
    return lambda: torch.autograd.grad(forward(*inputs), inputs, grad_output)
