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
from .sizes import SIZES, Size, chosen
from .timing import Clock, Deadline, fastest

WHAT = ("train", "infer", "sample", "op", "data", "grow")
ROOT = Path(__file__).resolve().parent


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UsageError, one line, with the choices."""
    parser = _Parser(
        prog="python -m benchmarks.compare",
        description="Time and memory of this package's network, side by side with others. See benchmarks/README.md.",
    )
    add = parser.add_argument
    add(
        "--what",
        default="train,infer,sample,op,data",
        help=f"of {', '.join(WHAT)}, with commas between (default: %(default)s)",
    )
    add("--size", default="S,M", help=f"of {', '.join(SIZES)} (default: %(default)s; XS is for trying out)")
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
        help="numbers of threads, each pinned to a core: 1 for the ratios that count, 1,2 for both (default: %(default)s)",
    )
    add("--batch", type=int, help="pictures at once (default: the size's own, see benchmarks/README.md)")
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
        help="torch.compile too: of each side's fastest variant, or of all",
    )
    add(
        "--memory",
        default="best",
        choices=("best", "all", "none"),
        help="peak memory on the CPU, a process each: of each side's best variant, of all, of none (default: %(default)s)",
    )
    add(
        "--no-floor",
        action="store_true",
        help="leave out the time of the convolutions, linear layers and attentions alone",
    )
    add("--limit-minutes", type=float, help="begin nothing new after this long, and say what was left out")
    add("--out", type=Path, help="folder of results.json and results.md (default: benchmarks/results/DATE-DEVICE)")
    given = parser.parse_args(argv)
    given.what = chosen("--what", given.what, WHAT)
    given.size = chosen("--size", given.size, SIZES)
    given.against = [] if given.against.strip() == "none" else chosen("--against", given.against, peers.PEERS)
    given.device = chosen("--device", given.device, ("cpu", "cuda"))[0]
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU here; choose --device cpu.")
    device = torch.device(given.device)
    usual = "bf16" if given.device == "cuda" else "fp32,bf16" if machine.has_bf16(device) else "fp32"
    given.dtype = chosen("--dtype", usual if given.dtype is None else given.dtype, machine.DTYPES)
    cores = machine.cores()
    if not re.fullmatch(r"\d+(,\d+)*", given.threads):
        raise UsageError(f"--threads is numbers with commas between, such as 1,2, not {given.threads!r}.")
    given.threads = sorted({int(n) for n in given.threads.split(",")})
    if not 1 <= given.threads[0] <= given.threads[-1] <= cores:
        raise UsageError(f"--threads: choose from 1 to {cores}, the cores that this process may use.")
    for name, least in (
        ("batch", 1),
        ("rounds", 1),
        ("steps", networks.CHECKED),
        ("sample_ms", 0),
        ("limit_minutes", 0),
    ):
        value = getattr(given, name)
        if value is not None and not least <= value < 1e6:
            raise UsageError(f"--{name.replace('_', '-')} is at least {least}, not {value:g}.")
    return given


def run(given: argparse.Namespace, command: str) -> Path:
    """Measure everything asked for; returns the folder of the results."""
    device = torch.device(given.device)
    deadline = Deadline(given.limit_minutes)
    date = datetime.datetime.now().astimezone()
    name = re.sub(r"[^\w.-]+", "-", machine.device_name(device))
    folder = given.out or ROOT / "results" / f"{date:%Y-%m-%d-%H%M%S}-{name}"
    results: dict = {
        "command": command,
        "date": date.isoformat(timespec="seconds"),
        "machine": machine.facts(device),
        "threads": given.threads,
        "limits": [],
        "groups": [],
        "not_measured": []
        if given.device == "cuda"
        else ["CUDA: this run is on the CPU; benchmarks/README.md has the command for one GPU."],
    }
    plan = [(t, w, s, d) for t in given.threads for w in given.what for s in given.size for d in given.dtype]
    # the data do not depend on network and dtype
    plan = [p for i, p in enumerate(plan) if p[1] != "data" or (p[0], p[1]) not in [q[:2] for q in plan[:i]]]
    rates: dict[tuple[int, str], float] = {}
    try:
        tables.write(results, folder)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written to ({error.strerror}): name a folder.") from None
    for number, (threads, what, size, dtype) in enumerate(plan, 1):
        clock = Clock(device, threads)
        group: dict = {"what": what, "threads": threads} | ({} if what == "data" else {"size": size, "dtype": dtype})
        if deadline.passed:
            results["not_measured"].append(
                f"{tables.heading(group)}: the limit of {given.limit_minutes:g} minutes came first."
            )
            continue
        print(f"[{number}/{len(plan)}] {tables.heading(group)}", file=sys.stderr, flush=True)
        try:
            # a GPU's compiler and launcher may use every core
            with machine.threads(threads, pin=given.device == "cpu"):
                if (threads, dtype) not in rates and what != "data":
                    rates[threads, dtype] = _limits(results, clock, dtype, device, _limit_seconds(given))
                group |= _group(given, what, SIZES[size], dtype, clock, deadline, folder, rates.get((threads, dtype)))
        except torch.OutOfMemoryError as error:
            group |= {"rows": [], "ratios": [], "not_measured": [f"out of memory ({str(error).split('.')[0]})"]}
        results["groups"].append(group)
        tables.write(results, folder)
        for ratio in group["ratios"]:
            if ratio.get("best"):
                print(f"    {tables.ratio_line(ratio).strip('*')}", file=sys.stderr, flush=True)
    tables.write(results, folder)
    return folder


def _limit_seconds(given: argparse.Namespace) -> float:
    """How long one limit is measured: no longer than a sample."""
    return min(limits.SECONDS, given.sample_ms / 1000)


def _limits(results: dict, clock: Clock, dtype: str, device: torch.device, seconds: float) -> float:
    """The matmul rate of a dtype, FLOP/s; with it, once for each number of threads, the copy's bandwidth."""
    words = f"{clock.threads} thread{'s' if clock.threads > 1 else ''}"
    rate = limits.matmul_rate(clock, dtype, seconds)
    results["limits"].append({"name": f"matmul {dtype}, {words}", "rate": rate, "unit": "GFLOP/s", "scale": 1e9})
    size = limits.copy_bytes(device)
    name = f"copy of {size / 2**20:.0f} MiB (read and write), {words}"
    if all(limit["name"] != name for limit in results["limits"]):
        results["limits"].append(
            {"name": name, "rate": limits.copy_rate(clock, size, seconds), "unit": "GB/s", "scale": 1e9}
        )
    return rate


def _group(
    given, what: str, size: Size, dtype: str, clock: Clock, deadline: Deadline, folder: Path, rate: float | None
) -> dict:
    """One table."""
    kind = {"op": "infer", "grow": "infer"}.get(what, what)
    batch = given.batch or size.batch[given.device].get(kind, 0)
    shared = {"sample_seconds": given.sample_ms / 1000}
    timed = shared | {"deadline": deadline}
    if what == "data":
        return data.measure(clock, given.rounds, **shared, pictures=2_000 if size.name == "XS" else data.PICTURES)
    if what == "op":
        return {"batch": batch} | op.measure(size, dtype, batch, clock, given.rounds, compile=given.compile, **timed)
    if what == "grow":
        return {"batch": batch} | grow.measure(size, dtype, batch, clock, given.rounds, folder, given.resample, **timed)
    case = networks.Case("infer" if what == "sample" else what, size, dtype, batch, clock.device, given.resample)
    if what == "sample":
        return {"batch": batch} | sampling.measure(case, given.against, clock, given.rounds, given.steps, **timed)
    group = {"batch": batch} | networks.measure(
        case, given.against, clock, given.rounds, compile=given.compile, **timed
    )
    floor = None if given.no_floor else limits.floor_seconds(case, clock, _limit_seconds(given), deadline)
    if floor is None:
        group["not_measured"].append(f"the floor: {'--no-floor' if given.no_floor else 'the time limit came first'}")
    group["floor_s"] = floor
    for row in group["rows"]:
        if row.get("median_s"):
            row["share_of_matmul"] = row["flops_per_s"] / rate if rate else None
            # the floor is of the network that ours and diffusers' are
            row["share_of_floor"] = floor / row["median_s"] if floor and row["side"] != peers.LUCIDRAINS else None
    _memory(given, case, group, deadline)
    return group


def _memory(given, case: networks.Case, group: dict, deadline: Deadline) -> None:
    """Peak memory on the CPU into the rows; CUDA's was taken while they were warmed up."""
    if given.device == "cuda" or given.memory == "none":
        return
    measured = [row for row in group["rows"] if row.get("median_s") and not row["compiled"]]
    if given.memory == "best":
        sides = dict.fromkeys(row["side"] for row in measured)
        measured = [fastest([row for row in measured if row["side"] == side]) for side in sides]
    for row in measured:
        variant = networks.Variant(row["side"], row["layout"], row["operator"], row["compiled"])
        if not deadline.passed:
            row |= memory.peak_of(case, variant, timeout=min(600.0, deadline.left))
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
        given = parse(argv)
        from diffusers.utils import logging

        logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        folder = run(given, shlex.join(["python", "-m", "benchmarks.compare", *argv]))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Results: {folder / 'results.md'} and {folder / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
