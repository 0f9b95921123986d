"""The command: python -m benchmarks.compare --what train,infer,sample,op,data --size S,M --against diffusers."""

import argparse
import datetime
import re
import shlex
import sys
import warnings
from pathlib import Path

import torch

from diffusion_adagn.errors import UsageError

from . import data, grow, limits, machine, memory, networks, op, ours, peers, sampling, tables
from .sizes import SIZES, Size, parse_choices
from .timing import Clock, Deadline, fastest

WHAT = ("train", "infer", "sample", "op", "data", "grow")
ROOT = Path(__file__).resolve().parent


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises UsageError: one line with the choices."""
    parser = _Parser(
        prog="python -m benchmarks.compare",
        description="Time and memory of this package's network, compared with others. See benchmarks/README.md.",
    )
    add = parser.add_argument
    add(
        "--what",
        default="train,infer,sample,op,data",
        help=f"of {', '.join(WHAT)}, separated by commas (default: %(default)s)",
    )
    add("--size", default="S,M", help=f"of {', '.join(SIZES)} (default: %(default)s; XS is for trials)")
    add("--against", default=peers.DIFFUSERS, help=f"of {', '.join(peers.PEERS)}, or none (default: %(default)s)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default here: %(default)s)",
    )
    add(
        "--dtype",
        help=f"of {', '.join(machine.DTYPES)} (default: fp32,bf16 on a CPU with bf16 instructions, else fp32; bf16 on CUDA)",
    )
    add(
        "--threads",
        default="1",
        help="numbers of threads, each pinned to a core: 1 for the main ratios, 1,2 for both (default: %(default)s)",
    )
    add("--batch", type=int, help="batch size (default: the size's own, see benchmarks/README.md)")
    add(
        "--rounds",
        type=int,
        default=5,
        help="rounds of interleaved samples, up to twice as many while some are noisy (default: %(default)s)",
    )
    add(
        "--sample-ms",
        type=float,
        default=200.0,
        help="a shorter call is repeated until a sample lasts this long (default: %(default)s)",
    )
    add("--steps", type=int, default=50, help="DDIM steps of --what sample (default: %(default)s)")
    add(
        "--resample",
        default="residual",
        choices=("residual", "conv"),
        help="between levels: ADM's residual blocks, or plain convolutions (default: %(default)s)",
    )
    add(
        "--compile",
        nargs="?",
        const="best",
        choices=("best", "all"),
        help="also torch.compile each side's fastest variant, or all",
    )
    add(
        "--memory",
        default="best",
        choices=("best", "all", "none"),
        help="peak memory on the CPU, in separate processes: of each side's best variant, of all, or none (default: %(default)s)",
    )
    add(
        "--no-floor",
        action="store_true",
        help="do not measure the time of the convolutions, linear layers and attentions alone",
    )
    add("--limit-minutes", type=float, help="start nothing new after this time, and list what was skipped")
    add("--out", type=Path, help="folder of results.json and results.md (default: benchmarks/results/DATE-DEVICE)")
    args = parser.parse_args(argv)
    args.what = parse_choices("--what", args.what, WHAT)
    args.size = parse_choices("--size", args.size, SIZES)
    args.against = [] if args.against.strip() == "none" else parse_choices("--against", args.against, peers.PEERS)
    args.device = parse_choices("--device", args.device, ("cpu", "cuda"))[0]
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU here; choose --device cpu.")
    device = torch.device(args.device)
    usual = "bf16" if args.device == "cuda" else "fp32,bf16" if machine.has_bf16(device) else "fp32"
    args.dtype = parse_choices("--dtype", usual if args.dtype is None else args.dtype, machine.DTYPES)
    cores = machine.cores()
    if not re.fullmatch(r"\d+(,\d+)*", args.threads):
        raise UsageError(f"--threads must be numbers separated by commas, such as 1,2, not {args.threads!r}.")
    args.threads = sorted({int(n) for n in args.threads.split(",")})
    if not 1 <= args.threads[0] <= args.threads[-1] <= cores:
        raise UsageError(f"--threads: choose from 1 to {cores}, the cores that this process may use.")
    for name, minimum in (
        ("batch", 1),
        ("rounds", 1),
        ("steps", networks.CHECKED_IMAGES),
        ("sample_ms", 0),
        ("limit_minutes", 0),
    ):
        value = getattr(args, name)
        if value is not None and not minimum <= value < 1e6:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {minimum}, not {value:g}.")
    return args


def run(args: argparse.Namespace, command: str) -> Path:
    """Measure everything requested; returns the folder of the results."""
    device = torch.device(args.device)
    deadline = Deadline(args.limit_minutes)
    date = datetime.datetime.now().astimezone()
    name = re.sub(r"[^\w.-]+", "-", machine.device_name(device))
    folder = args.out or ROOT / "results" / f"{date:%Y-%m-%d-%H%M%S}-{name}"
    results: dict = {
        "command": command,
        "date": date.isoformat(timespec="seconds"),
        "machine": machine.machine_info(device),
        "threads": args.threads,
        "limits": [],
        "groups": [],
        "not_measured": []
        if args.device == "cuda"
        else ["CUDA: this run is on the CPU; benchmarks/README.md has the command for one GPU."],
    }
    plan = [(t, w, s, d) for t in args.threads for w in args.what for s in args.size for d in args.dtype]
    # the data loading does not depend on network and dtype
    plan = [p for i, p in enumerate(plan) if p[1] != "data" or (p[0], p[1]) not in [q[:2] for q in plan[:i]]]
    rates: dict[tuple[int, str], float] = {}
    try:
        tables.write(results, folder)
    except OSError as error:
        raise UsageError(f"cannot write to --out {folder} ({error.strerror}): give a folder.") from None
    for number, (threads, task, size, dtype) in enumerate(plan, 1):
        clock = Clock(device, threads)
        group: dict = {"task": task, "threads": threads} | ({} if task == "data" else {"size": size, "dtype": dtype})
        if deadline.passed:
            results["not_measured"].append(
                f"{tables.heading(group)}: the limit of {args.limit_minutes:g} minutes was reached."
            )
            continue
        print(f"[{number}/{len(plan)}] {tables.heading(group)}", file=sys.stderr, flush=True)
        try:
            # on a GPU, the compiler and the launcher may use every core
            with machine.threads(threads, pin=args.device == "cpu"):
                if (threads, dtype) not in rates and task != "data":
                    rates[threads, dtype] = _measure_limits(results, clock, dtype, device, _limit_seconds(args))
                group |= _group(args, task, SIZES[size], dtype, clock, deadline, folder, rates.get((threads, dtype)))
        except torch.OutOfMemoryError as error:
            group |= {"rows": [], "ratios": [], "not_measured": [f"out of memory ({str(error).split('.')[0]})"]}
        results["groups"].append(group)
        tables.write(results, folder)
        for ratio in group["ratios"]:
            if ratio.get("best"):
                print(f"    {tables.ratio_line(ratio).strip('*')}", file=sys.stderr, flush=True)
    tables.write(results, folder)
    return folder


def _limit_seconds(args: argparse.Namespace) -> float:
    """Seconds for which one limit is measured: at most one sample."""
    return min(limits.SECONDS, args.sample_ms / 1000)


def _measure_limits(results: dict, clock: Clock, dtype: str, device: torch.device, seconds: float) -> float:
    """The matmul rate of a dtype, FLOP/s. Adds it and, once per number of threads, the copy bandwidth to the results."""
    thread_note = f"{clock.threads} thread{'s' if clock.threads > 1 else ''}"
    rate = limits.matmul_rate(clock, dtype, seconds)
    results["limits"].append({"name": f"matmul {dtype}, {thread_note}", "rate": rate, "unit": "GFLOP/s", "scale": 1e9})
    size = limits.copy_bytes(device)
    name = f"copy of {size / 2**20:.0f} MiB (read and write), {thread_note}"
    if all(limit["name"] != name for limit in results["limits"]):
        results["limits"].append(
            {"name": name, "rate": limits.copy_rate(clock, size, seconds), "unit": "GB/s", "scale": 1e9}
        )
    return rate


def _group(
    args, task: str, size: Size, dtype: str, clock: Clock, deadline: Deadline, folder: Path, rate: float | None
) -> dict:
    """Measure one table."""
    workload = {"op": "infer", "grow": "infer"}.get(task, task)
    batch = args.batch or size.batch[args.device].get(workload, 0)
    shared = {"sample_seconds": args.sample_ms / 1000}
    timed = shared | {"deadline": deadline}
    if task == "data":
        return data.measure(clock, args.rounds, **shared, count=2_000 if size.name == "XS" else data.IMAGES)
    if task == "op":
        return {"batch": batch} | op.measure(size, dtype, batch, clock, args.rounds, compile=args.compile, **timed)
    if task == "grow":
        return {"batch": batch} | grow.measure(size, dtype, batch, clock, args.rounds, folder, args.resample, **timed)
    case = networks.Case("infer" if task == "sample" else task, size, dtype, batch, clock.device, args.resample)
    if task == "sample":
        return {"batch": batch} | sampling.measure(case, args.against, clock, args.rounds, args.steps, **timed)
    group = {"batch": batch} | networks.measure(case, args.against, clock, args.rounds, compile=args.compile, **timed)
    floor = None if args.no_floor else limits.floor_seconds(case, clock, _limit_seconds(args), deadline)
    if floor is None:
        group["not_measured"].append(f"the floor: {'--no-floor' if args.no_floor else 'the time limit was reached'}")
    group["floor_s"] = floor
    for row in group["rows"]:
        if row.get("median_s"):
            row["matmul_fraction"] = row["flops_per_s"] / rate if rate else None
            # the floor is that of our network and diffusers' equivalent
            row["floor_fraction"] = floor / row["median_s"] if floor and row["side"] != peers.LUCIDRAINS else None
    _memory(args, case, group, deadline)
    return group


def _memory(args, case: networks.Case, group: dict, deadline: Deadline) -> None:
    """Add peak memory on the CPU to the rows; on CUDA it was measured during warm-up."""
    if args.device == "cuda" or args.memory == "none":
        return
    measured = [row for row in group["rows"] if row.get("median_s") and not row["compiled"]]
    if args.memory == "best":
        sides = dict.fromkeys(row["side"] for row in measured)
        measured = [fastest([row for row in measured if row["side"] == side]) for side in sides]
    for row in measured:
        variant = networks.Variant(row["side"], row["memory_format"], row["operator"], row["compiled"])
        if not deadline.passed:
            row |= memory.peak_of(case, variant, timeout=min(600.0, deadline.remaining))
    sized = [row for row in measured if row["peak_memory_bytes"]]
    mine = [row for row in sized if row["side"] == ours.SIDE]
    group["sentences"] = [
        f"peak memory: {a['name']} {a['peak_memory_bytes'] / b['peak_memory_bytes']:.2f} of {b['name']}."
        for a in mine[:1]
        for b in sized
        if b["side"] != ours.SIDE
    ]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        from diffusers.utils import logging

        logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        folder = run(args, shlex.join(["python", "-m", "benchmarks.compare", *argv]))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Results: {folder / 'results.md'} and {folder / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
