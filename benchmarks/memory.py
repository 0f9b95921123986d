"""Peak memory of one variant on the CPU, in a process of its own: python -m benchmarks.memory '{"what": "infer", ...}'."""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .machine import threads
from .networks import Case, Nets, Variant, Work
from .sizes import SIZES

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2


def peak_bytes() -> int:
    """Most memory this process has held (resident), since its start or since `forget_peak`.

    Read from /proc where there is one: getrusage's figure is inherited from the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> None:
    """Give freed memory back to the system and start counting the peak anew, where the system knows how."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_of(case: Case, variant: Variant, timeout: float = 600) -> dict:
    """{"peak_memory_bytes", "idle_memory_bytes"} of a fresh process: over two steps, and before the network was made.

    {} where that failed or took too long.
    """
    told = {"case": asdict(case) | {"size": case.size.name, "device": "cpu"}, "variant": asdict(variant)}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(told)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return {}


def main(text: str) -> None:
    told = json.loads(text)
    case = Case(**told["case"] | {"size": SIZES[told["case"]["size"]], "device": torch.device("cpu")})
    variant = Variant(**told["variant"])
    forget_peak()
    idle = peak_bytes()
    with threads(1):
        work = Work(case, variant, Nets(case).get(variant.side))  # the networks it was made from are freed here
        forget_peak()
        for _ in range(STEPS):
            work.step()
    print(json.dumps({"peak_memory_bytes": peak_bytes(), "idle_memory_bytes": idle}))


if __name__ == "__main__":
    main(sys.argv[1])
