"""The CPU operator under compilers that reject flags, or whose library does not load; a script stands in for them."""

import ctypes
import shutil
import sys

import pytest
import torch

from diffusion_adagn.ops import available, cpu, self_check

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to stand in front of")

WRAPPER = """#!/bin/sh
echo "$*" >> "{log}"
for word in "$@"; do
  case "$word" in {rejected}) echo "error: unsupported option $word" >&2; exit 1;; esac
done
exec g++ "$@" -O0
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler("-fopenmp|-march=native"): one that rejects these; returns a list of what it was called with."""
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(self_check, "_found", {})
    monkeypatch.setattr(self_check, "_noted", False)
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "cache"))
    log = tmp_path / "calls"

    def make(rejected):
        script = tmp_path / "c++"
        script.write_text(WRAPPER.format(rejected=rejected, log=log))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: [line for line in log.read_text().splitlines() if "--version" not in line]

    return make


def test_pragmas_remain_without_openmp(compiler, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    calls = compiler("-fopenmp")
    assert available("cpu")
    assert "-fopenmp-simd" in calls()[-1] and "-march=native" in calls()[-1] and len(calls()) == 2
    made = cpu._build(torch.float32, True)  # from the cache
    assert cpu._is_intact(made) and len(calls()) == 2
    made.with_suffix(".sha256").write_text("0" * 64)
    assert not cpu._is_intact(made)


def test_many_threads_need_threaded_build(compiler, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    compiler("-fopenmp")
    assert "without threads (OpenMP), and PyTorch uses 8" in cpu.unsupported_reason()


def test_march_native_may_be_rejected(compiler):
    calls = compiler("-march=native")
    assert available("cpu")
    assert "-march=native" not in calls()[-1] and "-fopenmp " in calls()[-1]


def test_unloadable_library_is_built_plainly(compiler, monkeypatch):
    real, monkeypatched = ctypes.CDLL, []

    def load(file):
        if not monkeypatched:
            monkeypatched.append(file)
            raise OSError("undefined symbol: __kmpc_fork_call")
        return real(file)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(ctypes, "CDLL", load)
    calls = compiler("-none")
    assert available("cpu") and "-fopenmp-simd" in calls()[-1]


def test_mac_uses_torchs_openmp_first(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libomp.dylib").touch()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    first, *others = cpu._openmp()
    assert first[:3] == ["-Xclang", "-fopenmp", str(tmp_path / "lib" / "libomp.dylib")]
    assert others == [["-fopenmp-simd"], []]
