"""Forward passes and training steps: the variants of one network, compared for equal outputs, then timed in turn."""

import contextlib
import copy
import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ours, peers
from .machine import DTYPES, full_fp32, unpinned
from .sizes import Size
from .timing import Clock, Deadline, fastest, interleave, paired, summary

MEMORY_FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# ||a - b|| / ||b|| against the peer in fp32: of the output, and of the first convolution's gradient
TOLERANCE = {"fp32": (1e-4, 1e-3), "fp16": (2e-2, 5e-2), "bf16": (5e-2, 1.5e-1)}
CHECKED_IMAGES = 4  # images whose outputs are compared


class OutputsDiffer(Exception):
    """The outputs of the two sides differ; the message says by how much."""


@dataclass(frozen=True)
class Case:
    """What is measured. task: "infer" or "train". batch: images. resample: see Size.network."""

    task: str
    size: Size
    dtype: str
    batch: int
    device: torch.device
    resample: str = "residual"


@dataclass(frozen=True)
class Variant:
    """One way to run a network. operator: "fused" or "eager", for our network only."""

    side: str
    memory_format: str
    operator: str | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        parts = (self.side, self.operator, self.memory_format, "compiled" if self.compiled else None)
        return " ".join(part for part in parts if part)


class Workload:
    """One variant of a case, ready to run. `step()` is timed: a forward pass, or forward, backward and AdamW."""

    def __init__(self, case: Case, variant: Variant, net: nn.Module):
        self.case, self.variant = case, variant
        dtype = DTYPES[case.dtype]
        training = case.task == "train"
        self.dtype = torch.float32 if training else dtype
        net = net.to(case.device, self.dtype).to(memory_format=MEMORY_FORMATS[variant.memory_format]).train(training)
        if variant.operator:
            ours.prepare(net, variant.operator, MEMORY_FORMATS[variant.memory_format])
        if training:
            self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
            self.scaler = torch.amp.GradScaler(case.device.type, init_scale=1024.0, enabled=case.dtype == "fp16")
        self.net = net
        self.call = _compiled(net, variant) if variant.compiled else net
        self.x, self.t, self.y, self.target = inputs(case, self.dtype, MEMORY_FORMATS[variant.memory_format])
        self.step: Callable[[], object] = self._train if training else self._infer

    def check(self) -> tuple[Tensor, Tensor | None]:
        """(output of the first images, gradient of the first convolution or None), float32 on the CPU; weights do not change."""
        if self.case.task == "infer":
            return self._infer()[:CHECKED_IMAGES].float().cpu(), None
        out = self._backward()
        grad = dict(self.net.named_parameters()).get("conv_in.weight")
        grad = None if grad is None else grad.grad.float().cpu() / self.scaler.get_scale()
        self.optimizer.zero_grad(set_to_none=True)
        return out[:CHECKED_IMAGES].float().cpu(), grad

    @torch.inference_mode()
    def _infer(self) -> Tensor:
        return self.call(self.x, self.t, self.y, return_dict=False)[0]

    def _backward(self) -> Tensor:
        with torch.autocast(self.case.device.type, DTYPES[self.case.dtype], enabled=self.case.dtype != "fp32"):
            out = self.call(self.x, self.t, self.y, return_dict=False)[0]
        self.scaler.scale(F.mse_loss(out.float(), self.target)).backward()
        return out.detach()

    def _train(self) -> None:
        self._backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def inputs(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, timesteps, labels, targets) of a case, the same for every variant."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.size.side, case.size.side)
    x, target = (torch.randn(shape, generator=generator).to(case.device) for _ in range(2))
    t = torch.randint(0, 1000, shape[:1], generator=generator).to(case.device)
    y = torch.randint(0, case.size.classes, shape[:1], generator=generator).to(case.device)
    x, target = (v.to(memory_format=memory_format) for v in (x, target))
    return x.to(dtype), t, y, target


def _compiled(net: nn.Module, variant: Variant) -> nn.Module:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # a block is compiled for each input shape
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise it would run uncompiled without an error
    return ours.compile_network(net) if variant.side == ours.SIDE else torch.compile(net)


# ---------------------------------------------------------------------- equal outputs on both sides


def differences(outputs: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> list[float]:
    """||a - b|| / ||b|| of the output and, where both have one, of the gradient."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(outputs, expected) if a is not None and b is not None]


def check_outputs(
    outputs: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None], dtype: str
) -> list[float]:
    """The differences. Raises OutputsDiffer if one exceeds TOLERANCE, or if the expected output is constant or not finite."""
    errors = differences(outputs, expected)
    if not all(b is None or (b.isfinite().all() and b.std() > 0) for b in expected):
        raise OutputsDiffer("the reference output is constant or not finite and cannot be compared")
    for name, error, tolerance in zip(("outputs", "gradients"), errors, TOLERANCE[dtype]):
        if not error <= tolerance:
            raise OutputsDiffer(
                f"rejected: its {name} differ from the reference by {error:.2g} ({dtype}: at most {tolerance:.2g})"
            )
    return errors


# ---------------------------------------------------------------------- measuring


def variants(case: Case, peer_names: list[str]) -> tuple[list[Variant], list[str]]:
    """The uncompiled variants of every side, and sentences on missing ones."""
    operators, reason = ours.operators(case.device)
    variants = [
        Variant(ours.SIDE, memory_format, operator) for operator in operators for memory_format in MEMORY_FORMATS
    ]
    variants += [Variant(peer, memory_format) for peer in peer_names for memory_format in MEMORY_FORMATS]
    return variants, [f"ours fused: {reason}"] if reason else []


class Networks:
    """The networks of a case by side, created once: ours on the CPU in fp32, the peer's with the same weights if possible."""

    def __init__(self, case: Case):
        self.case = case
        self.networks = {ours.SIDE: ours.network(**case.size.network(case.resample))}
        self.forward_flops: dict[str, int] = {}  # FLOPs of a forward pass of one image

    def get(self, side: str) -> nn.Module:
        """A fresh copy. Raises PeerMissing."""
        if side not in self.networks:
            make = {
                peers.DIFFUSERS: lambda: peers.diffusers_twin(self.networks[ours.SIDE]),
                peers.LUCIDRAINS: lambda: peers.lucidrains(self.case.size),
            }[side]
            self.networks[side] = make()
        return copy.deepcopy(self.networks[side])

    def flops(self, side: str) -> int:
        """FLOPs of the case for one image: forward, or three times that for training."""
        # ours counts as the exported network: the counter does not see our fused operator
        side = peers.DIFFUSERS if side == ours.SIDE else side
        if side not in self.forward_flops:
            one = Case("infer", self.case.size, "fp32", 1, torch.device("cpu"))
            x, t, y, _ = inputs(one, torch.float32, torch.contiguous_format)
            self.forward_flops[side] = peers.flops(self.get(side).eval(), x, t, y)
        return self.forward_flops[side] * (3 if self.case.task == "train" else 1)


def measure(
    case: Case,
    peer_names: list[str],
    clock: Clock,
    rounds: int,
    sample_seconds: float = 0.2,
    compile: str | None = None,
    deadline: Deadline | None = None,
) -> dict:
    """Time every variant of a case, interleaved: {"rows": one per variant, "ratios", "not_measured": sentences}.

    compile: None, "best" (the variant of each side that was fastest once warmed up) or "all" (every variant).
    """
    deadline = deadline or Deadline()
    nets = Networks(case)
    plain, missing = variants(case, peer_names)
    rows: dict[Variant, dict] = {}
    works: dict[Variant, Workload] = {}
    with full_fp32():
        expected = _reference(case, nets)
        for variant in plain:
            rows[variant], work = _prepare_variant(case, variant, nets, expected, clock)
            if work is not None:
                works[variant] = work
        for variant in _variants_to_compile(rows, compile):
            spent = max((row["warm_up_s"] for v, row in rows.items() if v.compiled and row["warm_up_s"]), default=60)
            if deadline.remaining < 2 * spent:
                missing.append(f"{variant.name}: not enough time left for compiling")
                continue
            rows[variant], work = _prepare_variant(case, variant, nets, expected, clock)
            if work is not None:
                works[variant] = work
        calls = {variant: work.step for variant, work in works.items()}
        title = f"{case.task} {case.size.name} {case.dtype}"
        known = {variant: rows[variant]["first_s"] for variant in works}
        samples = interleave(calls, clock, rounds, sample_seconds, deadline, title, known)
    flops: dict[str, int] = {}
    for variant, taken in samples.items():
        if variant.side not in flops:
            flops[variant.side] = nets.flops(variant.side)
        row = rows[variant]
        row |= summary(taken)
        row["per_s"] = case.batch / row["median_s"]
        row["flops_per_s"] = flops[variant.side] * row["per_s"]
    missing += [f"{variant.name}: {row['not_measured']}" for variant, row in rows.items() if row["not_measured"]]
    result = {
        "rows": list(rows.values()),
        "ratios": ratios(list(rows.values()), {v.name: s for v, s in samples.items()}),
        "flops_per_image": flops,
        "not_measured": missing,
    }
    del works, nets, calls
    free(case.device)
    return result


def ratios(rows: list[dict], samples: dict) -> list[dict]:
    """Our best variant, and our best of each operator, against each peer's best by median time; compiled against compiled too."""
    ratios_found = []
    mine = [row for row in rows if row["side"] == ours.SIDE]
    for peer in dict.fromkeys(row["side"] for row in rows if row["side"] != ours.SIDE):
        theirs = [row for row in rows if row["side"] == peer]
        pairs = [(fastest(mine), fastest(theirs))]
        for operator in ("fused", "eager"):
            for compiled in (False, True):
                same_operator = [row for row in mine if row["operator"] == operator and row["compiled"] == compiled]
                pairs.append((fastest(same_operator), fastest([row for row in theirs if row["compiled"] == compiled])))
        for a, b in pairs:
            if a and b and all((a["name"], b["name"]) != (r["ours"], r["peer"]) for r in ratios_found):
                pair = paired(samples[a["name"]], samples[b["name"]])
                ratios_found.append({"ours": a["name"], "peer": b["name"], "best": (a, b) == pairs[0]} | pair)
                if a.get("flops_per_s") and peer == peers.LUCIDRAINS:
                    ratios_found[-1]["flops_ratio"] = a["flops_per_s"] / b["flops_per_s"]
    return ratios_found


def free(device: torch.device) -> None:
    """Drop compiled code and free memory."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reference(case: Case, nets: Networks) -> tuple[Tensor, Tensor | None]:
    """The output of diffusers' network with our weights, in fp32 and NCHW."""
    exact = Case(case.task, case.size, "fp32", case.batch, case.device, case.resample)
    return Workload(exact, Variant(peers.DIFFUSERS, "nchw"), nets.get(peers.DIFFUSERS)).check()


def _prepare_variant(
    case: Case, variant: Variant, nets: Networks, expected, clock: Clock
) -> tuple[dict, Workload | None]:
    """Warm up and check a variant: (its row, its workload or None if that failed)."""
    row = {"name": variant.name} | asdict(variant)
    row |= {"errors": None, "warm_up_s": None, "peak_memory_bytes": None, "not_measured": None}
    cuda = case.device.type == "cuda"
    try:
        net = nets.get(variant.side)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
        started = time.perf_counter()
        with unpinned() if variant.compiled else contextlib.nullcontext():
            work = Workload(case, variant, net)
            outputs = work.check()
            if variant.side != peers.LUCIDRAINS:
                row["errors"] = check_outputs(outputs, expected, case.dtype)
            work.step()
        row["warm_up_s"] = time.perf_counter() - started
        for _ in range(3 if cuda else 0):
            work.step()
        row["first_s"] = clock.sample(work.step).seconds
        if cuda:
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - allocated
        return row, work
    except (OutputsDiffer, peers.PeerMissing) as error:
        row["not_measured"] = str(error)
    except Exception as error:  # out of memory, or a missing kernel; a compiler raises various exceptions
        if not (variant.compiled or isinstance(error, RuntimeError)):
            raise
        row["not_measured"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row, None


def _variants_to_compile(rows: dict[Variant, dict], which: str | None) -> list[Variant]:
    """The compiled variants to try, chosen after the warm-up of the uncompiled ones."""
    measured_variants = {variant: row["first_s"] for variant, row in rows.items() if not row["not_measured"]}
    chosen = list(measured_variants) if which == "all" else []
    if which == "best":
        chosen = [
            min((v for v in measured_variants if v.side == side), key=measured_variants.get)
            for side in dict.fromkeys(v.side for v in measured_variants)
        ]
    return [dataclasses.replace(variant, compiled=True) for variant in chosen]
