"""Peak memory of one variant on the CPU, in a separate process: python -m benchmarks.memory '{"what": "infer", ...}'."""

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
from .networks import Case, Networks, Variant, Workload
from .sizes import SIZES

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2


def peak_bytes() -> int:
    """Peak resident memory of this process, since its start or since `reset_peak`.

    Read from /proc if there is one: getrusage's value is inherited from the parent process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Return freed memory to the system and reset the peak, if the system supports it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_of(case: Case, variant: Variant, timeout: float = 600) -> dict:
    """{"peak_memory_bytes", "idle_memory_bytes"} of a new process: over two steps, and before the network was created.

    {} if that failed or took too long.
    """
    arguments = {"case": asdict(case) | {"size": case.size.name, "device": "cpu"}, "variant": asdict(variant)}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return {}


def main(text: str) -> None:
    arguments = json.loads(text)
    case = Case(**arguments["case"] | {"size": SIZES[arguments["case"]["size"]], "device": torch.device("cpu")})
    variant = Variant(**arguments["variant"])
    reset_peak()
    idle = peak_bytes()
    with threads(1):
        work = Workload(case, variant, Networks(case).get(variant.side))  # the original networks are freed here
        reset_peak()
        for _ in range(STEPS):
            work.step()
    print(json.dumps({"peak_memory_bytes": peak_bytes(), "idle_memory_bytes": idle}))


if __name__ == "__main__":
    main(sys.argv[1])
