"""Time of a training step under each process, and of tracking EMA lengths, as paired ratios to a step of ddpm.

    python -m benchmarks.training_step [--size digits|cifar] [--rounds 16]

All runs take steps in turn, in one process, in rounds of alternating order. Images: the digits, enlarged for cifar.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from diffusion_adagn.config import as_config
from diffusion_adagn.training.setup import prepare
from diffusion_adagn.training.trainer import Trainer

from .machine import machine_info
from .timing import Clock, Sample, interleave

SIZES = {
    "digits": {
        "model.model_channels": 32, "model.channel_mult": "1,2", "model.num_res_blocks": 1,
        "model.attention_resolutions": 4, "model.num_head_channels": 32, "model.norm_groups": 8,
        "training.batch_size": 128,
    },
    "cifar": {
        "data.image_size": 32, "data.channels": 3, "model.model_channels": 32, "model.channel_mult": "1,2,2",
        "model.num_res_blocks": 1, "model.attention_resolutions": 8, "model.num_head_channels": 32,
        "training.batch_size": 64,
    },
}  # fmt: skip
RUNS = {
    "ddpm": {},
    "edm": {"diffusion.process": "edm"},
    "flow": {"diffusion.process": "flow"},
    "ddpm, no EMA lengths": {"training.ema_lengths": ""},
}


def trainer(size: str, run: str, folder: Path) -> Trainer:
    common = {"data.source": "digits", "training.max_steps": 10_000, "output_dir": str(folder / run.replace(" ", "_"))}
    return Trainer(prepare(as_config(common | SIZES[size] | RUNS[run]), resume=False))


def cpu_seconds(sample: Sample) -> float:
    """CPU time of the process, which other processes change less than the wall time; on CUDA the time of the GPU."""
    return sample.seconds * (1 if sample.cpu_fraction is None else sample.cpu_fraction)


def ratio_of(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean, and the ends of its 95 % interval by a normal distribution of its logarithm."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.mean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    return tuple(math.exp(value) for value in (mean, mean - error, mean + error))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.training_step", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="digits")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_step.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainers = {run: trainer(args.size, run, Path(folder)) for run in RUNS}
        for one in trainers.values():
            stack.enter_context(one.batches)
        calls = {name: lambda one=one: one.train_step(False, lambda *_: None) for name, one in trainers.items()}
        device = next(iter(trainers.values())).accelerator.device
        samples = interleave(calls, Clock(device, torch.get_num_threads()), args.rounds, 2.0, title="training steps")
    print("run: time of a step, and its ratio to ddpm's (mean, 95 % interval)")
    results = {}
    for name, taken in samples.items():
        seconds = [cpu_seconds(sample) for sample in taken]
        ratios = [a / cpu_seconds(b) for a, b in zip(seconds, samples["ddpm"])]
        results[name] = {"seconds": seconds, "ratio": ratio_of(ratios) if name != "ddpm" else None}
        mean, low, high = results[name]["ratio"] or (1, 1, 1)
        print(
            f"{name}: {1000 * statistics.median(seconds):.1f} ms, {mean:.3f} ({low:.3f} .. {high:.3f}), {len(ratios)} pairs"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine_info(device), "size": args.size, "runs": results}, default=str))
    print(f"Values  {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
