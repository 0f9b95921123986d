"""A device without float64, such as Apple's GPUs, simulated on the CPU.

Its tensors are a subclass whose device is `mps`. Every function of them gives tensors of that device again, until `.cpu()`
or `.to("cpu")`; float64 raises Float64OnDevice, and `.numpy()` TypeError as there. Two modes: one of functions, which
carries the device along, and one of dispatched operations, which sees those that a function is made of.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MPS, CPU = torch.device("mps"), torch.device("cpu")
DEVICE_OF = torch.Tensor.device.__get__
NO_TENSORS = {torch.device, torch._C._nn._parse_to}  # take the name of a device and make nothing there
ON_THE_HOST = {torch.Tensor.item, torch.Tensor.tolist}  # their results


class Float64OnDevice(AssertionError):
    """What would be a TypeError there. An AssertionError, which nothing catches by mistake."""


class DeviceTensor(torch.Tensor):
    """A tensor of the device. Its numbers are on the CPU."""

    def __deepcopy__(self, memo):
        memo[id(self)] = out = self.detach().clone().requires_grad_(self.requires_grad)
        out._is_param = getattr(self, "_is_param", False)
        return out

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _called(func, args, kwargs or {}, inherit=True)


def _called(func, args, kwargs, inherit):
    """func(*args) without its device arguments; the result is on the device they name, or (inherit) that of its operands."""
    if func == DEVICE_OF:
        return MPS
    if func is torch.Tensor.numpy:
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")
    named = [d for d in map(_device, (*args, *kwargs.values())) if d is not None]
    if named:
        args = tuple(CPU if _device(a) is not None else a for a in args)
        kwargs = {key: CPU if _device(a) is not None else a for key, a in kwargs.items()}
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)
    there = named[-1].type == "mps" if named else inherit and func is not torch.Tensor.cpu
    if there:
        return out if func in ON_THE_HOST else _moved(out)
    if not isinstance(out, DeviceTensor):
        return out
    return (out.clone() if func in (torch.Tensor.cpu, torch.Tensor.to) else out).as_subclass(torch.Tensor)


def _device(value):
    """The device that an argument names; None for all others."""
    if isinstance(value, str):
        return torch.device(value) if value in ("mps", "cpu") else None
    return value if isinstance(value, torch.device) and value.type in ("mps", "cpu") else None


def _moved(out):
    if isinstance(out, tuple | list):
        return type(out)(map(_moved, out)) if type(out) in (tuple, list) else type(out)([_moved(x) for x in out])
    if not isinstance(out, torch.Tensor):
        return out
    if out.dtype == torch.float64:
        raise Float64OnDevice("a float64 tensor on the device")
    return out if isinstance(out, DeviceTensor) else out.as_subclass(DeviceTensor)


def _on_it(values):
    """Whether there is a tensor of the device among them."""
    return any(isinstance(v, DeviceTensor) or (isinstance(v, list | tuple) and _on_it(v)) for v in values)


class _Functions(TorchFunctionMode):
    """Moves to the device, and what is made there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        inherit = _on_it(values)
        named = any(d is not None and d.type == "mps" for d in map(_device, values))
        if (inherit or named) and func not in NO_TENSORS:
            return _called(func, args, kwargs, inherit)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """No operation on the device's tensors may give float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else (out,)
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in results) and _on_it(args):
            raise Float64OnDevice(f"{func} gives a float64 tensor on the device")
        return out


@contextlib.contextmanager
def simulated():
    """All that is moved to `mps` in here is on such a device."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters become tensors of the device
    try:
        with _Functions(), _Operations():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
