"""The fused operator on the CPU, and what torch does with it."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from adagn_cases import CASES, apart, inputs, slow
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from diffusion_adagn.errors import InputError
from diffusion_adagn.models.unet import AdaGNUNet
from diffusion_adagn.ops import adagn_silu, adagn_silu_reference, available, cpu, self_check

needs_kernel = pytest.mark.skipif(not available("cpu"), reason=f"no fused operator here: {cpu.unsupported_reason()}")


def run(operator, x, gamma, beta, weight, bias, dy, groups, silu=True):
    """y, and the gradients of x, gamma, beta, weight, bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, gamma, beta, weight, bias)]
    y = adagn_silu(*leaves[:3], groups, 1e-5, *leaves[3:], silu=silu, operator=operator)
    y.backward(dy)
    return [y, *(leaf.grad for leaf in leaves)]


def exact(x, gamma, beta, weight, bias, dy, groups, silu=True):
    leaves = [t.detach().double().requires_grad_() for t in (x, gamma, beta, weight, bias)]
    y = slow(*leaves, groups, 1e-5, silu)
    y.backward(dy.double())
    return [y, *(leaf.grad for leaf in leaves)]


def throughout(x, gamma, beta, weight, bias, dy, groups):
    """As the field writes it, every step in x's own type."""
    half = [t.detach().to(x.dtype).requires_grad_() for t in (x, gamma, beta, weight, bias)]
    h = torch.nn.functional.group_norm(half[0], groups, half[3], half[4], 1e-5)
    y = torch.nn.functional.silu(h * (1 + half[1][..., None, None]) + half[2][..., None, None])
    y.backward(dy)
    return [y, *(t.grad for t in half)]


@needs_kernel
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape, groups, mean", CASES)
def test_fused_operator_equals_float64_formula(shape, groups, mean, last, silu):
    for dtype in (torch.float32, torch.bfloat16):
        for rows in {1, shape[0]}:
            given = inputs(shape, mean, dtype, last, rows)
            wanted, fused, eager = (
                exact(*given, groups, silu),
                *(run(o, *given, groups, silu) for o in ("fused", "eager")),
            )
            assert fused[0].dtype == dtype and fused[0].stride() == given[0].stride()
            # with a mean of 100 and a spread of 1, float32 itself holds x to 4e-6 of the spread
            rounding = (2e-6 + 6e-8 * abs(mean) * 4) if dtype == torch.float32 else 3e-3
            for what, f, e, w in zip(("y", "x", "gamma", "beta", "weight", "bias"), fused, eager, wanted):
                assert apart(f, w) <= max(rounding, 1.1 * apart(e, w)), (what, dtype, rows)


@needs_kernel
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape, groups, mean", CASES)
def test_bf16_errors_are_small(shape, groups, mean, last):
    given = inputs(shape, mean, torch.bfloat16, last, shape[0])
    for f, e, w in zip(run("fused", *given, groups), throughout(*given, groups), exact(*given, groups)):
        assert apart(f, w) < apart(e, w)


def test_reference_is_the_formula():
    for shape, groups, mean in CASES:
        given = inputs(shape, mean, torch.float64, False, shape[0])
        y = adagn_silu_reference(
            given[0], *(t.double() for t in given[1:3]), groups, 1e-5, *(t.double() for t in given[3:5])
        )
        assert apart(y, exact(*given, groups)[0]) < 1e-12


@needs_kernel
@pytest.mark.parametrize("operator", ["fused", "eager"])
def test_missing_parts_are_neutral(operator):
    x, gamma, beta, weight, bias, _ = inputs((2, 16, 4, 4), 0.0, torch.float32, True, 2)
    none, zero, one = None, torch.zeros(2, 16), torch.ones(16)
    full = lambda g, b, w, c: adagn_silu(x, g, b, 4, 1e-5, w, c, operator=operator)  # noqa: E731
    torch.testing.assert_close(full(none, none, none, none), full(zero, zero, one, one * 0))
    torch.testing.assert_close(full(gamma, none, weight, bias), full(gamma, zero, weight, bias))
    torch.testing.assert_close(full(none, beta, weight, bias), full(zero, beta, weight, bias))
    torch.testing.assert_close(full(gamma[:1], beta, weight, bias), full(gamma[:1].expand(2, -1), beta, weight, bias))


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 64, 16, 16), (3, 24, 7, 7)])
@pytest.mark.parametrize("last", [True, False])
def test_thread_count_changes_no_bit(shape, last):
    given, threads = inputs(shape, 1.0, torch.float32, last, shape[0]), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run("fused", *given, 8))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
def test_nonfinite_values_propagate(bad, dtype, last):
    given = inputs((2, 16, 8, 8), 0.0, dtype, last, 2)
    given[0][1, 3, 2, 5] = bad
    y, dx, *_ = run("fused", *given, 4)
    assert y[0].isfinite().all() and dx[0].isfinite().all()
    assert not y[1, :4].isfinite().any() and y[1, 4:].isfinite().all()
    assert not dx[1, :4].isfinite().any()


@needs_kernel
def test_silu_s_ends():
    beta = torch.tensor([[-1e38, -200.0, -88.0, -86.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e38]])
    x = torch.randn(1, 10, 4, 4)
    for last in (True, False):
        given = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
        y = adagn_silu(given, torch.full((1, 10), -1.0), beta, 1, operator="fused")[0, :, 0, 0]
        torch.testing.assert_close(y, (beta.double() * torch.sigmoid(beta.double()))[0].float(), atol=1e-30, rtol=1e-6)


@needs_kernel
def test_slices_transposed_and_odd_tensors():
    whole, (_, gamma, beta, *_) = torch.randn(4, 32, 6, 10), inputs((2, 16, 6, 10), 0.0, torch.float32, False, 2)
    for x in (whole[::2, ::2], whole[:2, 16:].transpose(2, 3), whole[:2, :16, ::2]):
        torch.testing.assert_close(
            adagn_silu(x, gamma, beta, 4, operator="fused"),
            adagn_silu_reference(x, gamma, beta, 4),
            atol=1e-5,
            rtol=1e-5,
        )
    for shape in ((0, 16, 4, 4), (2, 16, 0, 4)):
        assert adagn_silu(torch.zeros(shape), gamma[: shape[0]], beta[: shape[0]], 4, operator="fused").shape == shape
    flat = torch.randn(2, 16)
    torch.testing.assert_close(
        adagn_silu(flat, gamma, beta, 4), adagn_silu_reference(flat, gamma, beta, 4), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"groups": 5}, "dividing C"),
        ({"gamma": torch.zeros(3, 16)}, "gamma is"),
        ({"beta": torch.zeros(2, 8)}, "beta is"),
        ({"weight": torch.ones(8)}, "weight is"),
        ({"operator": "fast"}, "operator is one of"),
        ({"x": torch.zeros(2, 16, 4, 4, dtype=torch.float64), "operator": "fused"}, "does not take"),
    ],
)
def test_wrong_input_is_rejected(change, words):
    given = {"x": torch.zeros(2, 16, 4, 4), "gamma": torch.zeros(2, 16), "beta": None, "groups": 4}
    with pytest.raises(InputError, match=words):
        adagn_silu(**given | change)


# ---------------------------------------------------------------------- what torch does with it


@needs_kernel
def test_operator_passes_torch_opcheck():
    x, gain, shift, *_ = inputs((2, 16, 4, 4), 0.0, torch.float32, True, 2)
    given = [t.requires_grad_() for t in (x, gain, shift)]
    torch.library.opcheck(torch.ops.diffusion_adagn.adagn_silu.default, (*given, 4, 1e-5, True))


@needs_kernel
def test_compiled_exported_checkpointed_operator_agree():
    given, groups = inputs((2, 16, 4, 4), 0.0, torch.float32, True, 2), 4
    plain = run("fused", *given, groups)

    def through(f):
        leaves = [t.detach().clone().requires_grad_() for t in given[:5]]
        y = f(leaves)
        y.backward(given[5])
        return [y, *(leaf.grad for leaf in leaves)]

    def op(leaves):
        return adagn_silu(*leaves[:3], groups, 1e-5, *leaves[3:], operator="fused")

    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for found in (through(compiled), through(lambda leaves: checkpoint(op, leaves, use_reentrant=False))):
        assert all(torch.equal(a, b) for a, b in zip(found, plain))

    class Layer(torch.nn.Module):
        def forward(self, x, gamma, beta):
            return adagn_silu(x, gamma, beta, groups, operator="fused")

    exported = torch.export.export(Layer(), tuple(given[:3]))
    assert any("diffusion_adagn" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*given[:3]), Layer()(*given[:3]))


@needs_kernel
def test_operators_agree_under_autocast():
    torch.manual_seed(0)
    unet = AdaGNUNet(8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, num_classes=3, num_head_channels=32)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([10, 200, 500, 900]), torch.tensor([0, 1, 2, 3])
    found = {}
    for operator in ("fused", "eager"):
        unet.set_operator(operator)
        for half in (False, True):
            unet.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = unet(x, t, y).sample
            out.float().square().mean().backward()
            found[operator, half] = [
                out.detach(),
                unet.projection.weight.grad.clone(),
                unet.conv_in.weight.grad.clone(),
            ]
    for half, error in ((False, 1e-5), (True, 3e-2)):
        for fused, eager in zip(found["fused", half], found["eager", half]):
            assert apart(fused, eager.double()) < error
    with pytest.raises(InputError, match="one of"):
        unet.set_operator("quick")


def both_ways(f, x):
    """f(operator's function) under "auto", and by the reference."""
    _, gamma, beta, *_ = inputs((2, 8, 4, 4), 0.0, torch.float32, False, 2, seed=1)
    return [f(lambda x, op=op: op(x, gamma, beta, 4)) for op in (adagn_silu, adagn_silu_reference)]


def dual(op, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(op(torch.autograd.forward_ad.make_dual(x, x * x))).tangent


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "through",
    [
        lambda op, x, y: torch.func.functionalize(op)(x),
        lambda op, x, y: torch.func.grad(lambda x: op(x).square().sum())(x),
        lambda op, x, y: torch.func.jvp(op, (x,), (y,))[1],
        lambda op, x, y: torch.func.vmap(op)(torch.stack([x, y])),
        lambda op, x, y: dual(op, x),
        lambda op, x, y: torch.jit.trace(op, x, check_trace=False)(y),
        lambda op, x, y: make_fx(lambda x: op(x), tracing_mode="real")(x)(y),
        lambda op, x, y: op(torch._neg_view(x)),
    ],
    ids=["functionalize", "grad", "jvp", "vmap", "forward mode", "jit", "make_fx", "negated view"],
)
def test_hooks_and_modes_change_nothing(through):
    x, y = torch.randn(2, 2, 8, 4, 4)
    found, wanted = both_ways(lambda op: through(op, x, y), x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@needs_kernel
def test_bare_operator_takes_any_strides():
    x, gain, shift = torch.randn(2, 8, 4, 6).transpose(2, 3), torch.randn(8, 2).t(), torch.randn(2, 8)
    found = torch.ops.diffusion_adagn.adagn_silu(x, gain, shift, 4, 1e-5, True)[0]
    torch.testing.assert_close(found, adagn_silu_reference(x, gain - 1, shift, 4), atol=1e-5, rtol=1e-5)


LAID = {  # parameters with the same values and other strides
    "transposed": (lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], 1)[:, 0]),
    "negated": (lambda t: torch.complex(t, -t).conj().imag, lambda t: torch.complex(t, -t).conj().imag),
    "expanded": (lambda t: t[:1].expand(len(t), -1), lambda t: t[:1].expand(len(t))),
}


@needs_kernel
@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("left_out", [(), (1,), (1, 2), (3, 4), (1, 3), (2, 4)], ids=str)
def test_parameters_take_any_strides(laid, left_out):
    x, *given, dy = inputs((3, 16, 4, 4), 0.0, torch.float32, True, 3)
    rows, own = LAID[laid]
    given = [None if i in left_out else (rows if i < 3 else own)(t) for i, t in enumerate(given, 1)]
    found = []
    for operator, laid_out in (("fused", given), ("eager", [t if t is None else t.contiguous() for t in given])):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *laid_out)]
        y = adagn_silu(*leaves[:3], 4, 1e-5, *leaves[3:], operator=operator)
        y.backward(dy)
        found.append([y, *(t.grad for t in leaves if t is not None)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_defaults_change_nothing(dtype):
    given = inputs((2, 16, 4, 4), 0.0, torch.float32, True, 2)
    wanted = run("fused", *given, 4)
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = run("fused", *given, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@needs_kernel
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_second_gradients_equal_plain_pytorch(rows, silu):
    *given, dy = inputs((3, 8, 4, 4), 0.0, torch.float32, True, rows)
    found = []
    for operator in ("fused", "eager"):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        y = adagn_silu(*leaves[:3], 4, 1e-5, *leaves[3:], silu=silu, operator=operator)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        found.append([*first, *second])
        (only,) = torch.autograd.grad(
            adagn_silu(leaves[0] * leaves[3][:, None, None], None, None, 4, operator=operator).square().sum(),
            leaves[0],
            create_graph=True,
        )
        found[-1] += torch.autograd.grad(only.square().sum(), leaves[3])  # a path past the operator's own leaves
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@needs_kernel
@pytest.mark.parametrize("pack", [torch.Tensor.bfloat16, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)])
def test_saved_tensor_hooks_work(pack):
    *given, dy = inputs((3, 16, 4, 4), 0.0, torch.float32, True, 3)
    given = [t.bfloat16().float() for t in given]
    leaves = [t.detach().clone().requires_grad_() for t in given]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(t) if t.ndim > 1 else t, lambda t: t):
        y = adagn_silu(*leaves[:3], 4, 1e-5, *leaves[3:], operator="fused")
    found, wanted = torch.autograd.grad(y, leaves, dy), exact(*given, dy, 4)[1:]
    limit = 2e-2 if pack is torch.Tensor.bfloat16 else 1e-6
    assert all(apart(a, b) < limit for a, b in zip(found, wanted))


@pytest.mark.parametrize("operator", ["auto", "eager"])
@pytest.mark.parametrize("modulate", [True, False])
def test_norm_trains_on_frozen_input(operator, modulate):
    """torch's own group norm ends the process here, in channels_last."""
    x, gamma, beta, weight, bias, dy = inputs((3, 16, 4, 4), 0.0, torch.float32, True, 3)
    params = [gamma, beta] if modulate else [None, None]
    leaves = [t.detach().requires_grad_() for t in (weight, bias)]
    adagn_silu(x, *params, 4, 1e-5, *leaves, operator=operator).backward(dy)
    zero = torch.zeros_like(gamma)
    wanted = exact(x, *([gamma, beta] if modulate else [zero, zero]), weight, bias, dy, 4)
    for leaf, grad in zip(leaves, wanted[-2:]):
        assert apart(leaf.grad, grad) < 1e-5


@pytest.mark.parametrize("trained", [True, False])
def test_inference_norm_needs_no_extra_pass(trained):
    x, *_, weight, bias, _ = inputs((3, 16, 4, 4), 0.0, torch.float32, True, 3)
    own = [t.detach().requires_grad_(trained) for t in (weight, bias)]
    with torch.no_grad() if trained else torch.enable_grad(), torch.profiler.profile() as seen:
        adagn_silu(x, None, None, 4, 1e-5, *own, operator="eager")
    assert not {"aten::mul", "aten::add"} & {event.key for event in seen.key_averages()}


@needs_kernel
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("place", [0, 13, 438, 1023])
def test_outlier_pixel_keeps_precision(last, place):
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    x[..., place // 32, place % 32] += 100
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    found = adagn_silu(x, None, None, 2, operator="fused", silu=False)
    wanted = adagn_silu(x.double(), None, None, 2, operator="eager", silu=False)
    assert (found - wanted).abs().max() < 5e-6 * wanted.abs().max()


@needs_kernel
def test_export_takes_any_batch_size():
    class Layer(torch.nn.Module):
        def forward(self, x, gamma, beta):
            return adagn_silu(x, gamma, beta, 4)

    given = inputs((2, 8, 4, 4), 0.0, torch.float32, True, 2)[:3]
    made = torch.export.export(Layer(), tuple(given), dynamic_shapes=({0: torch.export.Dim("B")},) * 3).module()
    more = inputs((5, 8, 4, 4), 0.0, torch.float32, True, 5)[:3]
    torch.testing.assert_close(made(*more), Layer()(*more))


@needs_kernel
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("gamma, error", [(0.0, 2e-3), (-0.9, 2e-3), (-0.99, 5e-3)])
def test_cancelling_gradients_sum_in_float32(gamma, error, last):
    x = inputs((4, 64, 16, 16), 0.0, torch.bfloat16, last, 4)[0].requires_grad_()
    params = torch.full((4, 64), gamma), torch.ones(4, 64)
    adagn_silu(x, *params, 8, operator="fused").backward(torch.ones_like(x))
    exact = x.detach().double().requires_grad_()
    adagn_silu_reference(exact, params[0].double(), params[1].double(), 8).backward(torch.ones_like(exact))
    assert apart(x.grad, exact.grad) < error


def test_eager_handles_what_torch_rejects():
    bias = torch.zeros(4, requires_grad=True)
    adagn_silu(torch.randn(2, 4, 3, 3), None, None, 2, bias=bias, operator="eager").sum().backward()
    assert bias.grad.shape == (4,)
    one = torch.randn(1, 4, 1, 1)  # a group of one number
    assert torch.equal(adagn_silu(one, None, None, 4, operator="eager"), torch.zeros(1, 4, 1, 1))


# ---------------------------------------------------------------------- building it


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    """As a process that has not asked yet, with an empty cache."""
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(self_check, "_noted", False)
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "compiler, why",
    [
        ("/nowhere/c++", "CXX names /nowhere/c++"),
        ("false", "(false) failed with status 1: no output"),
        ("true", "(true) failed to make a library"),
        ("'", "CXX (') is not a command: No closing quotation"),
    ],
)
def test_missing_compiler_falls_back_once(fresh_cache, monkeypatch, capsys, compiler, why):
    monkeypatch.setenv("CXX", compiler)
    given = inputs((2, 8, 4, 4), 0.0, torch.float32, True, 2)[:3]
    for x in (given[0], given[0].contiguous(), given[0].bfloat16()):
        torch.testing.assert_close(adagn_silu(x, *given[1:], 4), adagn_silu_reference(x, *given[1:], 4))
    said = capsys.readouterr().err
    assert said.count("note:") == 1 and why in said
    assert not available("cpu") and not list(fresh_cache.rglob("*.so"))


@pytest.fixture
def library():
    """The library for float32, from the cache of this test session."""
    return cpu._build(torch.float32, False)


@needs_kernel
@pytest.mark.parametrize("blocked", ["file", "nothing"])
def test_readonly_cache_builds_for_process(library, fresh_cache, monkeypatch, capsys, blocked):
    if blocked == "file":
        fresh_cache.write_text("in the way")
    else:
        monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", "/proc/nothing/here")
    monkeypatch.setattr(cpu, "_compile", lambda command, flags, to: shutil.copyfile(library, to))
    assert available("cpu") and not capsys.readouterr().err


@needs_kernel
def test_it_is_built_once(fresh_cache, monkeypatch):
    x = torch.randn(2, 8, 4, 4)
    for _ in range(2):
        adagn_silu(x, None, None, 4, operator="fused")
    (made,) = fresh_cache.rglob("*.so")
    before = made.stat().st_mtime_ns
    monkeypatch.setattr(cpu, "_libraries", {})
    adagn_silu(x, None, None, 4, operator="fused")
    assert made.stat().st_mtime_ns == before and set(made.parent.iterdir()) == {made, made.with_suffix(".sha256")}


CORRUPTED = """
import torch
from diffusion_adagn.ops import adagn_silu, cpu
x = torch.randn(2, 8, 4, 4)
made = cpu._build(torch.float32, False)  # from the cache
whole = made.read_bytes()
made.write_bytes(whole[:2000])  # to load it would kill the process
torch.testing.assert_close(adagn_silu(x, None, None, 4), adagn_silu(x, None, None, 4, operator="eager"), atol=1e-5, rtol=1e-5)
assert cpu.unsupported_reason(torch.float32, False) == "" and made.stat().st_size == len(whole)
"""


@pytest.mark.slow
@needs_kernel
def test_corrupted_library_is_rebuilt(library, tmp_path):
    shutil.copytree(library.parent, tmp_path / "ops")
    env = os.environ | {"DIFFUSION_ADAGN_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CORRUPTED], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
