"""The fused operator's check of itself, and what happens where it fails."""

import importlib.util
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion_adagn.config import SpeedConfig
from diffusion_adagn.errors import InputError
from diffusion_adagn.ops import adagn_silu, adagn_silu_reference, cpu, self_check, unsupported_reason
from diffusion_adagn.ops.adagn_silu import _triton, _unsupported_reason
from diffusion_adagn.runtime import speed

needs_kernel = pytest.mark.skipif(
    bool(cpu.unsupported_reason()), reason=f"no fused operator here: {cpu.unsupported_reason()}"
)
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
TYPES = [(dtype, last) for dtype in (torch.float32, torch.bfloat16) for last in (True, False)]


@pytest.fixture
def unchecked(monkeypatch):
    """As a process that has not used the operator yet."""
    monkeypatch.setattr(self_check, "_found", {})
    monkeypatch.setattr(self_check, "_noted", False)


def x_of(dtype=torch.float32):
    return torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


def spoiled(forward=lambda *made: made, backward=lambda *made: made):
    """The C++ kernels with other results."""
    return SimpleNamespace(
        forward=lambda *given: forward(*cpu.forward(*given)), backward=lambda *given: backward(*cpu.backward(*given))
    )


def raising(error):
    def kernel(*_):
        raise error

    return SimpleNamespace(forward=kernel, backward=kernel)


def failure(kernels, dtype=torch.float32, last=True):
    return self_check.failure(lambda: kernels, "cpu", None, dtype, last)


@needs_kernel
@pytest.mark.parametrize("dtype, last", TYPES)
def test_right_kernels_pass_the_check(unchecked, dtype, last, capsys):
    assert unsupported_reason("cpu", dtype, last) == "" and not capsys.readouterr().err


WRONG = {
    "nothing written": ("output", spoiled(forward=lambda y, *stats: (torch.zeros_like(y), *stats))),
    "not a number": ("output", spoiled(forward=lambda y, *stats: (y * float("nan"), *stats))),
    "one pixel": ("output", spoiled(forward=lambda y, *stats: (y.index_fill(3, torch.tensor(4), 0.0), *stats))),
    "another group's": ("gradient by x", spoiled(forward=lambda y, mean, rstd: (y, mean.roll(1, 1), rstd))),
    "dx": ("gradient by x", spoiled(backward=lambda dx, *rows: (1.1 * dx, *rows))),
    "dgain": ("gradient by the gain", spoiled(backward=lambda dx, dgain, dshift: (dx, dshift, dshift))),
    "dshift": ("gradient by the shift", spoiled(backward=lambda dx, dgain, dshift: (dx, dgain, -dshift))),
}


@needs_kernel
@pytest.mark.parametrize("what", WRONG)
def test_wrong_values_fail_the_check(unchecked, what):
    word, kernels = WRONG[what]
    for dtype, last in TYPES:
        why = failure(kernels, dtype, last)
        assert f"its {word} is wrong in {str(dtype)[6:]}" in why and "expected at most" in why


@needs_kernel
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_wrong_cpp_kernel_falls_back_once(unchecked, monkeypatch, capsys, part):
    real = getattr(cpu, part)
    monkeypatch.setattr(cpu, part, lambda *given: tuple(2 * made for made in real(*given)))
    for dtype in (torch.float32, torch.bfloat16):
        x = x_of(dtype)
        assert torch.equal(adagn_silu(x, None, None, 4), adagn_silu_reference(x, None, None, 4))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("note: the fused operator is not used") and "is wrong in" in said
    with pytest.raises(
        InputError, match=r"the fused operator cannot be used: its .* is wrong in float32.*auto or eager"
    ):
        adagn_silu(x_of(), None, None, 4, operator="fused")


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("\n  first line \nsecond"), "failed with RuntimeError: first line."),
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "Triton is not installed: pip install triton."),
        (RuntimeError("Failed to find C compiler. Please specify"), "no C compiler: install gcc, or name one in CC."),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), "(/usr/bin/gcc ended with status 1): is Python.h"),
        (AssertionError(), "failed with AssertionError: it said nothing."),
    ],
)  # fmt: skip
def test_raising_kernels_fail_with_one_line(unchecked, error, words):
    why = failure(raising(error))
    assert words in why and "\n" not in why and why.endswith(".")


@needs_kernel
def test_full_memory_is_no_verdict(unchecked):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert failure(raising(error)) == "" and not self_check._found
    assert failure(cpu) == "" and len(self_check._found) == 1


@needs_kernel
def test_check_runs_once(unchecked):
    asked = []

    def kernels():
        asked.append(threading.current_thread())
        return raising(RuntimeError("no"))

    threads = [
        threading.Thread(target=self_check.failure, args=(kernels, "cpu", None, torch.float32, True)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "no." in self_check.failure(kernels, "cpu", None, torch.float32, True)
    assert len(asked) == 1 and asked[0] not in threads


@needs_kernel
def test_check_leaves_caller_state(unchecked):
    state = torch.get_rng_state()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        FakeTensorMode(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: 1 / 0, lambda t: 1 / 0),
    ):
        assert [unsupported_reason("cpu", *one) for one in TYPES] == [""] * 4
        assert torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()
        assert torch.empty(1).is_meta
    assert torch.equal(torch.get_rng_state(), state) and len(self_check._found) == 4


@needs_kernel
@pytest.mark.parametrize("through", ["compile", "vmap", "checkpoint"])
def test_first_use_may_be_anywhere(unchecked, through):
    x = x_of().requires_grad_()
    norm = lambda x: adagn_silu(x, None, None, 4, operator="fused")  # noqa: E731
    wanted = adagn_silu_reference(x, None, None, 4)
    if through == "compile":
        torch._dynamo.reset()
        y = torch.compile(norm, backend="aot_eager", fullgraph=True)(x)
    elif through == "vmap":
        why = []
        torch.func.vmap(lambda row: why.append(unsupported_reason("cpu")) or row)(x)
        assert why == [""]
        y = norm(x)
    else:
        y = torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=True)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    y.sum().backward()
    assert x.grad.isfinite().all() and self_check._found


def test_no_compiler_on_path_falls_back(unchecked, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for x in (x_of(), x_of(), x_of(torch.bfloat16)):
        assert torch.equal(adagn_silu(x, None, None, 4), adagn_silu_reference(x, None, None, 4))
    asked, device = SpeedConfig(), torch.device("cpu")
    chosen = speed.resolve_speed(asked, device, 1)
    said, why = capsys.readouterr().err, "there is no C++ compiler (c++, g++ or clang++; or name one in CXX)"
    assert said.count("\n") == 1 and said.startswith("note: ") and why in said
    assert f"eager operator (chosen for this machine: precision, memory_format, operator, since the fused one cannot be used: {why})" in (
        speed.describe_speed(chosen, asked, device)
    )  # fmt: skip
    assert "cannot be used" not in speed.describe_speed(chosen, SpeedConfig(operator="eager"), device)


# ---------------------------------------------------------------------- CUDA's, without a GPU


@pytest.fixture
def pretended(monkeypatch, unchecked):
    """Tensors "on cuda:0" stay on the CPU."""
    real = torch.device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def there(kernels):
        failing = self_check._failure
        monkeypatch.setattr(
            self_check, "_failure", lambda _, device, *rest: failing(lambda: kernels, real("cpu"), *rest)
        )

    return there


@needs_kernel
@pytest.mark.parametrize(
    "kernels, words",
    [
        (raising(RuntimeError("Failed to find C compiler.")), "Triton finds no C compiler"),
        (raising(subprocess.CalledProcessError(1, "gcc")), "Python.h"),
        (WRONG["one pixel"][1], "its output is wrong"),
        (WRONG["dx"][1], "its gradient by x is wrong"),
        (cpu, ""),
    ],
    ids=["no compiler", "no Python.h", "forward", "backward", "right"],
)
def test_cuda_fallback_names_the_reason(pretended, capsys, kernels, words):
    pretended(kernels)
    asked, cuda = SpeedConfig(precision="fp32"), torch.device("cuda")
    chosen = speed.resolve_speed(asked, cuda, 1)
    said = capsys.readouterr().err
    assert chosen.operator == ("eager" if words else "fused")
    assert words in said and said.count("\n") == bool(words) and words in speed.describe_speed(chosen, asked, cuda)
    if words:
        with pytest.raises(InputError, match=r"speed.operator fused is not available: .*Use auto or eager"):
            speed.resolve_speed(SpeedConfig(precision="fp32", operator="fused"), cuda, 1)
    assert list(self_check._found) == [("cuda", 0, torch.float32, False)]


def test_devices_dtypes_formats_checked_separately(pretended):
    pretended(raising(RuntimeError("no")))
    for device in ("cuda", "cuda:0", "cuda:1"):
        unsupported_reason(device, torch.bfloat16, True, note=False)
    unsupported_reason("cuda:1", torch.float16, False, note=False)
    assert list(self_check._found) == [
        ("cuda", 0, torch.bfloat16, True),
        ("cuda", 1, torch.bfloat16, True),
        ("cuda", 1, torch.float16, False),
    ]


def test_graph_capture_skips_the_check(pretended, monkeypatch):
    pretended(raising(RuntimeError("no")))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert unsupported_reason("cuda:0") == "" and not self_check._found
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert "no." in unsupported_reason("cuda:0", note=False)


def test_missing_triton_is_named(unchecked, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "diffusion_adagn.ops.triton_kernels", raising=False)
    monkeypatch.delattr("diffusion_adagn.ops.triton_kernels", raising=False)
    assert (
        self_check.failure(_triton, "cpu", None, torch.float32, True) == "Triton is not installed: pip install triton."
    )


def test_asking_again_costs_no_search(unchecked, monkeypatch):
    unsupported_reason("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: 1 / 0)
    monkeypatch.setattr(threading, "Thread", lambda *_, **__: 1 / 0)
    assert _unsupported_reason("cpu", None, torch.float32, True, True) == unsupported_reason("cpu")


@needs_triton
def test_cases_cover_one_and_several_tiles():
    triton_kernels = _triton()
    for dtype in self_check.LIMIT:
        for last in (True, False):
            for most in (triton_kernels.MOST, triton_kernels.MOST // 2):
                tiles = []
                for shape, groups, rows in self_check.CASES:
                    x = self_check._inputs(dtype, last, shape, rows)[0]
                    assert x.is_contiguous() != last
                    tiles.append(triton_kernels._plan(x, groups, most)[2])
                assert [tile["WHOLE"] for tile in tiles] == [True, False] and [t["D"] for t in tiles] == [3, 6]


INTERPRETED = """
import torch
from diffusion_adagn.ops import self_check, triton_kernels as kernels
for dtype in self_check.LIMIT:
    for last in (True, False):
        assert self_check.failure(lambda: kernels, "cpu", None, dtype, last) == ""
self_check._found.clear()
real = kernels.backward
kernels.backward = lambda *given: tuple(made[..., :1] + 0 * made for made in real(*given))
print(self_check.failure(lambda: kernels, "cpu", None, torch.float16, True))
"""


@needs_triton
@pytest.mark.slow
def test_interpreted_triton_passes_the_check(tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=300)
    assert "its gradient by x is wrong in float16, channels_last" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_passes_the_check(unchecked):
    for dtype in self_check.LIMIT:
        for last in (True, False):
            assert unsupported_reason("cuda", dtype, last) == ""


# ---------------------------------------------------------------------- the tensor's device


class Launched:
    """In place of a Triton kernel: which guard it was launched in."""

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *_, **__: self.log.append("launch")


@needs_triton
def test_kernels_launch_on_tensor_device(monkeypatch):
    log, triton_kernels = [], _triton()

    class Guard:
        def __init__(self, of):
            self.of = of

        def __enter__(self):
            log.append(("enter", id(self.of)))

        def __exit__(self, *_):
            log.append("leave")

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(triton_kernels, name, Launched(log))
    x, rows = x_of(), torch.ones(1, 8)
    _, mean, rstd = triton_kernels.forward(x, rows, rows, 4, 1e-5, True)
    dy = torch.ones_like(x)
    triton_kernels.backward(dy, x, rows, rows, mean, rstd, 4, True)
    assert log == [("enter", id(x)), "launch", "leave"] * 2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
def test_second_gpu_equals_the_first():
    x, gamma = x_of(), torch.linspace(-1, 1, 8)[None]
    found = []
    for device in ("cuda:0", "cuda:1"):  # the current device is 0 for both
        here = x.to(device).requires_grad_()
        y = adagn_silu(here, gamma.to(device), None, 4, operator="fused")
        y.square().sum().backward()
        graphed = torch.compile(lambda x, g: adagn_silu(x, g, None, 4, operator="fused"))(here, gamma.to(device))
        assert y.device == torch.device(device)
        found.append([t.detach().cpu() for t in (y, here.grad, graphed)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------- fake tensors


@needs_kernel
@pytest.mark.parametrize("axes", [(2, 3), (1, 2), (0, 1), (0, 3)])
def test_fake_strides_equal_real_strides(axes):
    x = torch.randn(2, 8, 8, 8).transpose(*axes)
    gain = torch.ones(1, x.shape[1])
    real = torch.ops.diffusion_adagn.adagn_silu(x, gain, gain, 2, 1e-5, True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.ops.diffusion_adagn.adagn_silu(mode.from_tensor(x), mode.from_tensor(gain), mode.from_tensor(gain), 2, 1e-5, True)  # fmt: skip
    for a, b in zip(real, fake):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
