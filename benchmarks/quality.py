"""Which process gives the best images in equal time, and how do the peers compare? Every part can be stopped and run again.

    python -m benchmarks.quality processes --data PATH/TO/cifar10   # 13 runs of 20 minutes
    python -m benchmarks.quality peers --data PATH/TO/cifar10       # 5 runs of 40 minutes

Each run has one pinned core; two train at a time, and those that are compared are in the same pair where possible. The
number of training images is determined once for each network, from its speed, so that all runs of a network see
the same number. All train in the same precision, the peers too; all are sampled in fp32. Results: OUT/processes.json and
OUT/processes/report.html; of peers OUT/peers.json and OUT/peers/report.html.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from queue import Queue

import torch

from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import open_dataset
from diffusion_adagn.runtime.speed import has_bf16

from .machine import machine_info
from .peers import PEERS
from .quality_peers import MARKS
from .quality_peers import PEERS as PEER_METHODS
from .quality_report import quality_report

DOCUMENTED = "documented network"  # of a peer: its speed alone is measured
SCALES, ALL_SCALES, CALLS = "1,2", "1,1.5,2,3", 12  # network calls per image and pass, for all
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
    "training.log_every": 20, "training.checkpoint_every": 100, "training.preview_every": 0,
    "training.diagnostics_every": 0, "speed.device": "cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run."""

    process: str
    network: str
    seed: int
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.process}-{self.network}-{self.note or self.seed}"

    def __str__(self) -> str:
        return self.name

    def settings(self, data: str, steps: int) -> dict[str, object]:
        own = {"data.source": data, "training.max_steps": steps, "training.seed": self.seed}
        return COMMON | NETWORKS[self.network] | PROCESSES[self.process] | own


# pairs train at the same time: {eps, edm} x {small, patches} x 2 seeds, each seed in another order, then the other processes
RUNS = [
    *(Run(p, n, s) for s in (0, 1) for n in ("small", "patches") for p in ("eps", "edm")[:: 1 - 2 * s]),
    *(Run(p, "small", 0) for p in ("flow", "v", "flow_edm", "flow_uniform", "edm_cosine")),
]


def pinned(core: int, log: Path, *command: object) -> str:
    """Run a Python module on one core; its output goes to a file. Returns the output of this call."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("a+") as out:
        begin = out.seek(0, os.SEEK_END)
        status = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            stdout=out, stderr=out, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        ).returncode  # fmt: skip
        if status:
            print(f"status {status}, see {log}: {' '.join(map(str, command))}", flush=True)
        out.seek(begin)
        return out.read()


def in_parallel(jobs: Sequence[Callable[[int], None]], cores: Sequence[int]) -> None:
    """Run jobs in order, one per core at a time. A job receives its core."""
    free: Queue[int] = Queue()
    for core in cores:
        free.put(core)

    def run(job: Callable[[int], None]) -> None:
        core = free.get()
        try:
            job(core)
        finally:
            free.put(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(run, jobs))


def options(settings: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def speed_of(network: str, args: argparse.Namespace, core: int) -> float:
    """Training images per second of a network on one core, measured once, in a short run."""
    data, out = args.data, args.out
    file = out / "speeds.json"  # images per second
    known = json.loads(file.read_text()) if file.exists() else {}
    if network not in known:
        trial = out / f"trial-{network.replace(' ', '-')}"
        peer, _, documented = network.partition(" ")
        if peer in PEERS:
            count = 256 if documented else 1280  # 16 or 80 steps
            words = ["benchmarks.quality_peers", "train", peer, "--data", data, "--images", count, "--out", trial]
            words += ["--precision", args.precision, *(["--documented"] if documented else [])]
            known[network] = float(pinned(core, out / "trial.log", *words).split()[-2])
        else:
            settings = Run("eps", network, 0).settings(data, 60)
            settings |= {"training.log_every": 5, "speed.precision": args.precision}
            pinned(core, out / "trial.log", "diffusion_adagn", "train", "--output_dir", trial, *options(settings))
            lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
            known[network] = statistics.median(line["images_per_s"] for line in lines if "images_per_s" in line)
        shutil.rmtree(trial, ignore_errors=True)
        file.write_text(json.dumps(known))
    return known[network]


def images_of(network: str, args: argparse.Namespace, minutes: float, core: int) -> int:
    """Training images that a network sees in so many minutes on one core, in whole batches."""
    batch = PEER_METHODS[network].batch if network in PEERS else COMMON["training.batch_size"]
    return int(minutes * 60 * speed_of(network, args, core)) // batch * batch


def is_finished(run: Run, args: argparse.Namespace) -> bool:
    """Whether its training is done; the pipeline is written last."""
    return (args.out / run.name / "pipeline").is_dir()


def train(run: Run, args: argparse.Namespace, images: int, core: int) -> None:
    """Train a run, or what is missing of it."""
    out, folder = args.out, args.out / run.name
    if is_finished(run, args):
        return
    started = any(folder.glob("checkpoints/step-*"))
    if not started:
        shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
    steps = images // COMMON["training.batch_size"]
    begin, settings = time.time(), run.settings(args.data, steps) | {"training.keep_every": steps // 4}
    settings["speed.precision"] = args.precision
    place = ["--output_dir", folder, *(["--resume", "auto"] if started else [])]
    pinned(core, out / f"{run.name}.log", "diffusion_adagn", "train", *place, *options(settings))
    print(f"{run.name}: {steps} steps in {(time.time() - begin) / 60:.1f} min", flush=True)


def sweep(run: Run, model: Path, name: str, scales: str, count: int, out: Path, core: int) -> None:
    """Measure a model at several guidance scales."""
    sampler = ["--sampler", "dpm++", "--spacing", "karras", "--steps", CALLS, "--guidance", scales]
    place = ["--count", count, "--keep", "--out", out / "sweeps" / name]
    pinned(core, out / f"{run.name}.log", "diffusion_adagn", "sweep", model, *sampler, *place)


def processes(args: argparse.Namespace, cores: Sequence[int]) -> list[dict]:
    """Train and measure the runs that compare processes. Returns their rows."""
    runs = [run for run in RUNS if re.fullmatch(args.only, run.name)]
    images = {n: images_of(n, args, args.minutes or 20, cores[0]) for n in {r.network for r in runs}}

    def train_and_measure(run: Run, core: int) -> None:
        train(run, args, images[run.network], core)
        if is_finished(run, args):
            sweep(run, args.out / run.name, run.name, SCALES, args.count, args.out, core)

    in_parallel([partial(train_and_measure, run) for run in runs], cores)
    return [
        {"run": r.name, "network": r.network, "images": images[r.network], **row}
        for r in runs
        for row in points(args.out, r.name)
    ]


def points(out: Path, name: str) -> list[dict]:
    """The rows of a sweep. samples: the file of its images."""
    files = sorted((out / "sweeps" / name).glob("points/*/row.json"))
    return [{"samples": str(f.with_name("samples.npz").relative_to(out)), **json.loads(f.read_text())} for f in files]


def peers(args: argparse.Namespace, cores: Sequence[int]) -> list[dict]:
    """Train and measure our processes and the peers, with a curve over the training. Returns their rows."""
    minutes, module = args.minutes or 40, "benchmarks.quality_peers"
    methods: list[Run | str] = [*(Run(p, "small", 0, "long") for p in ("eps", "edm", "flow")), *PEERS]
    methods = [m for m in methods if re.fullmatch(args.only, str(m))]
    images = {
        n: images_of(n, args, minutes, cores[0]) for n in {m if isinstance(m, str) else m.network for m in methods}
    }

    def train_method(method: Run | str, core: int) -> None:
        if isinstance(method, Run):
            train(method, args, images[method.network], core)
        elif not (args.out / method / "ema-1.pt").exists():
            place = ["--data", args.data, "--images", images[method], "--out", args.out / method]
            place += ["--precision", args.precision]
            pinned(core, args.out / f"{method}.log", module, "train", method, *place)

    def measure(method: Run | str, mark: float, core: int) -> None:
        scales = ALL_SCALES if mark == 1 else SCALES
        if isinstance(method, Run):
            quarter = images[method.network] // COMMON["training.batch_size"] // 4
            step = f"checkpoints/step-{round(4 * mark) * quarter:08d}"
            model = args.out / method.name / (step if mark < 1 else "")
            sweep(method, model, f"{method}-{mark:g}", scales, args.count, args.out, core)
            return
        place, log = ["--out", args.out / method, "--mark", mark], args.out / f"{method}.log"
        size = ["--scales", scales, "--count", args.count, "--calls", CALLS]
        pinned(core, log, module, "sample", method, *place, *size)
        for file in sorted((args.out / method / f"{mark:g}").glob("*.npz")):
            target = args.out / "sweeps" / f"{method}-{mark:g}" / "points" / file.stem
            if not (target / "evaluation.json").exists():
                words = ["evaluate", file, "--against", args.data, "--out", target, "--neighbours", 0]
                pinned(core, log, "diffusion_adagn", *words)
                row = json.loads((target / "evaluation.json").read_text())
                row |= {"scale": float(file.stem[1:]), "samples": str(file.relative_to(args.out))}
                (target / "row.json").write_text(json.dumps(row))

    for peer in set(methods) & set(PEERS):
        speed_of(f"{peer} {DOCUMENTED}", args, cores[0])
    in_parallel([partial(train_method, m) for m in methods], cores)
    in_parallel([partial(measure, m, mark) for mark in MARKS[::-1] for m in methods], cores)
    return [
        {"run": str(m), "minutes": mark * minutes, "images": round(mark * images[getattr(m, "network", m)]), **row}
        for m in methods
        for mark in MARKS
        for row in points(args.out, f"{m}-{mark:g}")
    ]


def write_report(rows: Sequence[dict], args: argparse.Namespace, command: str) -> Path:
    """results.json, report.html with its images, and quality.md."""
    speeds = json.loads((args.out / "speeds.json").read_text())
    about = {"command": command, "date": date.today().isoformat(), "machine": machine_info(torch.device("cpu"))}
    about |= {"precision": args.precision, "speeds": speeds}
    (args.out / f"{args.what}.json").write_text(json.dumps({**about, "rows": rows}, indent=1, default=str))
    classes = open_dataset(DataConfig(source=args.data), progress=False).label_space.names
    words = f"{command} ({about['date']}, training in {args.precision})"
    report = quality_report(rows, classes, args.out, words, speeds)
    return report.save(args.out / args.what, text="quality.md")[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("processes", "peers"))
    parser.add_argument("--data", default="cifar10", help="training images, as in data.source (default: cifar10)")
    parser.add_argument("--minutes", type=float, help="of training, per run (default: 20, peers 40)")
    parser.add_argument("--count", type=int, default=1000, help="images per scale (default: 1000)")
    parser.add_argument("--only", default=".*", help="regular expression of run names, such as 'edm-small.*'")
    known = ("fp32", "bf16")
    best = known[has_bf16(torch.device("cpu"))]
    parser.add_argument("--precision", choices=known, default=best, help=f"of training (default on this CPU: {best})")
    parser.add_argument("--cores", default="0,1", help="cores, one run each (default: 0,1)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    cores = [int(core) for core in args.cores.split(",")]
    rows = {"processes": processes, "peers": peers}[args.what](args, cores)
    if not rows or any(row["metrics"]["frechet"]["value"] is None for row in rows):
        few = f"--count {args.count} is too few for a Frechet distance: give another --out and 500 or more"
        print(few if rows else f"no run of {args.out} is finished; see the logs there", file=sys.stderr)
        return 1
    command = " ".join(["python -m benchmarks.quality", *(argv if argv is not None else sys.argv[1:])])
    print(f"Look at {write_report(rows, args, command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
