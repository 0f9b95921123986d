"""The CUDA kernels, run by Triton's interpreter on the CPU, and compiled for a GPU that need not be there."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")

INTERPRETED = """
import sys
import torch
from adagn_cases import apart, inputs, slow
from diffusion_adagn.ops import triton_kernels as kernels

# the interpreter takes milliseconds for each program: few groups
CASES = [((2, 12, 7, 5), 2, 100.0), ((1, 8, 4, 4), 4, 0.0), ((2, 13, 3, 3), 1, 0.0), ((1, 6, 5, 5), 6, 0.0), ((2, 8, 1, 1), 2, 0.0)]
VARIANTS = [(True, torch.float32, 2), (False, torch.bfloat16, 1), (True, torch.float16, 1)]  # channels_last, type, rows of modulation
for most in (kernels.MOST, 32):  # 32 values per tile: images do not fit, and are read twice
    kernels.MOST = most
    for shape, groups, mean in CASES if most > 32 else [((2, 6, 5, 4), 2, 100.0)]:
        for last, dtype, rows in VARIANTS if shape == CASES[0][0] else VARIANTS[:2]:
            for silu in (True, False) if dtype == torch.float16 else (True,):
                x, gamma, beta, _, _, dy = inputs(shape, mean, dtype, last, min(rows, shape[0]))
                gain, shift = 1 + gamma, beta
                y, m, r = kernels.forward(x, gain, shift, groups, 1e-5, silu)
                found = [y, *kernels.backward(dy, x, gain, shift, m, r, groups, silu)]
                leaves = [t.double().requires_grad_() for t in (x, gamma, beta)]
                c = x.shape[1]
                wanted = slow(*leaves, torch.ones(c).double(), torch.zeros(c).double(), groups, 1e-5, silu)
                wanted.backward(dy.double())
                for a, b in zip(found, [wanted, *(t.grad for t in leaves)]):
                    if a.shape != b.shape:  # one row per image, where one row was given for all
                        a = a.sum(0, keepdim=True)
                    # the interpreter cuts bf16 off where a GPU rounds
                    limit = 2e-6 + 3e-7 * mean if dtype == torch.float32 else 4e-3
                    assert apart(a, b) < limit, (shape, most, last, dtype, rows, silu, apart(a, b))
                assert y.stride() == x.stride() and y.dtype == dtype
x = inputs((2, 16, 4, 4), 0.0, torch.float32, True, 2)[0]
x[1, 3, 1, 1] = float("nan")
y = kernels.forward(x, torch.ones(1, 16), torch.zeros(1, 16), 4, 1e-5, True)[0]
assert y[0].isfinite().all() and not y[1, :4].isfinite().any() and y[1, 4:].isfinite().all()
print("as the formula")
"""

COMPILED = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffusion_adagn.ops import triton_kernels as kernels

POINTERS = {"x": "*bf16", "y": "*bf16", "dy": "*bf16", "dx": "*bf16"}
for last in (True, False):
    x = torch.empty(128, 64, 32, 32, dtype=torch.bfloat16, device="meta")
    x = x.to(memory_format=torch.channels_last) if last else x
    for kernel, most in ((kernels._forward, kernels.MOST), (kernels._backward, kernels.MOST // 2)):
        _, (c, p, g, pixel, channel), tile, warps = kernels._plan(x, 32, most)
        whole = {"C": c, "P": p, "G": g, "row": c, "pixel": pixel, "channel": channel}
        fixed = tile | {"SILU": True} | {k: v for k, v in whole.items() if v == 1}
        kinds = {n: POINTERS.get(n, "i32" if n in whole else "fp32" if n == "eps" else "*fp32") for n in kernel.arg_names}
        kinds |= dict.fromkeys(fixed, "constexpr")
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(kernel.arg_names)
            if kinds[n].startswith("*") or (n in whole and kinds[n] == "i32")
        }
        source = ASTSource(kernel, kinds, {(kernel.arg_names.index(n),): v for n, v in fixed.items()}, attrs)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert "ld.global.v4" in made.asm["ptx"] and "st.global.v4" in made.asm["ptx"]  # 16 bytes at a time
print("for a GPU")
"""


def run(script, tmp_path, **env):
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    file = tmp_path / "script.py"  # Triton reads the source of its kernels from files
    file.write_text(script, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)} | env
    done = subprocess.run([sys.executable, str(file)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_interpreted_it_is_the_formula(tmp_path):
    assert run(INTERPRETED, tmp_path, TRITON_INTERPRET="1") == "as the formula"


@pytest.mark.slow
def test_triton_compiles_with_wide_loads(tmp_path):
    assert run(COMPILED, tmp_path, TRITON_INTERPRET="0") == "for a GPU"


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_operator_equals_formula(tmp_path):
    assert run("import torch\ntorch.set_default_device('cuda')\n" + INTERPRETED, tmp_path) == "as the formula"
