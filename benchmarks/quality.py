"""Which process gives the best images in equal time: train, measure, compare. Every part can be stopped and run again.

    python -m benchmarks.quality --data PATH/TO/cifar10 --minutes 20

Each run has one pinned core; two train at a time, and those that are compared are in the same pair where possible. The
number of steps is determined once for each network, from the speed of its first run, so that all runs of a network see
the same number of images. Results: OUT/results.json and OUT/quality.md with one sheet of images per run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from queue import Queue

import torch

from .machine import machine_info

SCALES = "1,1.5,2,3"
STEPS = 12  # of heun: 23 network calls
SMALL = {
    "model.model_channels": 32,
    "model.channel_mult": "1,2,2",
    "model.num_res_blocks": 1,
    "model.attention_resolutions": 8,
}
PATCHES = {
    "model.model_channels": 64, "model.channel_mult": "1,2", "model.num_res_blocks": 2, "model.attention_resolutions": 8,
    "model.patch_size": 2,
}  # fmt: skip
NETWORKS = {"small": SMALL | {"model.num_head_channels": 32}, "patches": PATCHES | {"model.num_head_channels": 64}}
PROCESSES = {
    "eps": {"diffusion.schedule": "cosine", "diffusion.prediction": "eps"},
    "v": {"diffusion.schedule": "cosine", "diffusion.prediction": "v"},
    "edm": {"diffusion.process": "edm"},
    "edm_cosine": {"diffusion.process": "edm", "diffusion.noise": "cosine"},
    "flow_uniform": {"diffusion.process": "flow", "diffusion.noise": "uniform"},
    "flow": {"diffusion.process": "flow", "diffusion.noise_mean": 0, "diffusion.noise_std": 1},
    "flow_edm": {"diffusion.process": "flow", "diffusion.noise_mean": -1.2, "diffusion.noise_std": 1.2},
}
COMMON = {
    "data.flip": True, "training.batch_size": 64, "training.lr": 1e-3, "training.warmup_steps": 50,
    "training.lr_decay": "linear", "training.ema_decay": 0.999, "training.label_dropout": 0.1,
    "training.log_every": 20, "training.checkpoint_every": 200, "training.preview_every": 0,
    "training.diagnostics_every": 0, "speed.precision": "fp32", "speed.device": "cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run."""

    process: str
    network: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.process}-{self.network}-{self.seed}"

    def settings(self, data: str, steps: int) -> dict[str, object]:
        own = {"data.source": data, "training.max_steps": steps, "training.seed": self.seed}
        return COMMON | NETWORKS[self.network] | PROCESSES[self.process] | own


# pairs train at the same time: {eps, edm} x {small, patches} x 2 seeds, then the other processes
RUNS = [
    *(Run(p, n, s) for s in (0, 1) for n in ("small", "patches") for p in ("eps", "edm")),
    *(Run(p, "small", 0) for p in ("flow", "v", "flow_edm", "flow_uniform", "edm_cosine")),
]


def adagn(core: int, log: Path, *words: object) -> int:
    """Run a command on one core; its output goes to a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffusion_adagn", *map(str, words)]
    with log.open("a") as out:
        return subprocess.run(
            command, stdout=out, stderr=out, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, {core})
        ).returncode


def steps_of(network: str, data: str, minutes: float, out: Path, core: int) -> int:
    """Optimizer steps that take so many minutes on one core, measured once, while the other core is busy too."""
    file = out / "steps.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if network not in known:
        trial = out / f"trial-{network}"
        settings = Run("eps", network, 0).settings(data, 60) | {"training.log_every": 5}
        adagn(core, out / "trial.log", "train", "--output_dir", trial, *options(settings))
        lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        speeds = sorted(line["images_per_s"] for line in lines if "images_per_s" in line)
        known[network] = int(minutes * 60 * speeds[len(speeds) // 2] / COMMON["training.batch_size"])
        file.write_text(json.dumps(known))
    return known[network]


def options(settings: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def train_all(runs: Sequence[Run], data: str, minutes: float, out: Path, cores: Sequence[int]) -> None:
    """Train what is not finished, one run per core; a run that was stopped goes on."""
    steps = {network: steps_of(network, data, minutes, out, cores[0]) for network in {run.network for run in runs}}
    free: Queue[int] = Queue()
    for core in cores:
        free.put(core)

    def train(run: Run) -> None:
        if (out / run.name / "pipeline").is_dir():
            return
        core, start = free.get(), time.time()
        try:
            place = ["--output_dir", out / run.name, "--resume", "auto"]
            status = adagn(
                core, out / f"{run.name}.log", "train", *place, *options(run.settings(data, steps[run.network]))
            )
            print(
                f"{run.name}: {'done' if status == 0 else f'status {status}'} in {(time.time() - start) / 60:.1f} min",
                flush=True,
            )
        finally:
            free.put(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(train, runs))


def measure_all(runs: Sequence[Run], data: str, count: int, out: Path, cores: Sequence[int]) -> None:
    """Sweep the guidance scale of each finished run, with the same sampler and grid for all."""
    free: Queue[int] = Queue()
    for core in cores:
        free.put(core)

    def measure(run: Run) -> None:
        if not (out / run.name / "pipeline").is_dir():
            return
        core = free.get()
        try:
            sampler = ["--sampler", "heun", "--spacing", "karras", "--steps", STEPS, "--guidance", SCALES]
            place = ["--count", count, "--out", out / "sweeps" / run.name]
            adagn(core, out / f"{run.name}.log", "sweep", out / run.name, *sampler, *place)
        finally:
            free.put(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(measure, runs))


def rows(runs: Sequence[Run], out: Path) -> list[dict]:
    """The results of every finished sweep: a row for each run and scale."""
    found = []
    for run in runs:
        for file in sorted((out / "sweeps" / run.name).glob("points/*/row.json")):
            row = json.loads(file.read_text())
            found.append({"run": run.name, "process": run.process, "network": run.network, "seed": run.seed, **row})
    return found


def write_report(runs: Sequence[Run], out: Path, command: str, args: argparse.Namespace) -> Path:
    """results.json and quality.md."""
    results = {
        "command": command, "date": date.today().isoformat(), "machine": machine_info(torch.device("cpu")), "minutes": args.minutes,
        "steps": json.loads((out / "steps.json").read_text()), "rows": rows(runs, out),
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1, default=str))
    lines = [
        "| run | scale | accuracy | Frechet | precision | recall | saturation | contrast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        values = [row["metrics"][name]["value"] for name in ("accuracy", "frechet", "precision", "recall")]
        values += [row["diagnostics"][name] for name in ("saturation_ratio", "contrast_ratio")]
        cells = " | ".join("" if value is None else f"{value:.3g}" for value in values)
        lines.append(f"| {row['run']} | {row['scale']:g} | {cells} |")
    (out / "quality.md").write_text("\n".join(lines) + "\n")
    return out / "quality.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="training images, as in data.source (default: cifar10)")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, per run (default: 20)")
    parser.add_argument("--count", type=int, default=1000, help="images per scale (default: 1000)")
    parser.add_argument("--only", default=".*", help="regular expression of run names, such as 'edm-small.*'")
    parser.add_argument("--cores", default="0,1", help="cores, one run each (default: 0,1)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [run for run in RUNS if re.fullmatch(args.only, run.name)]
    cores = [int(core) for core in args.cores.split(",")]
    train_all(runs, args.data, args.minutes, args.out, cores)
    measure_all(runs, args.data, args.count, args.out, cores)
    print(
        f"Look at {write_report(runs, args.out, ' '.join(['python -m benchmarks.quality', *(argv or sys.argv[1:])]), args)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
