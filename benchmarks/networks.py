"""Forward passes and training steps: the variants of one network, checked to be the same, then timed interleaved."""

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
CHECKED = 4  # pictures whose outputs are compared


class Differs(Exception):
    """The two sides do not compute the same; the message says by how much."""


@dataclass(frozen=True)
class Case:
    """What is measured. what: "infer" or "train". batch: pictures. resample: see Size.network."""

    what: str
    size: Size
    dtype: str
    batch: int
    device: torch.device
    resample: str = "residual"


@dataclass(frozen=True)
class Variant:
    """One way to run a network. operator: ours alone, "fused" or "eager"."""

    side: str
    layout: str
    operator: str | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        parts = (self.side, self.operator, self.layout, "compiled" if self.compiled else None)
        return " ".join(part for part in parts if part)


class Work:
    """One variant of a case, ready to be called. `step()` is what is timed: a forward pass, or forward, backward and AdamW."""

    def __init__(self, case: Case, variant: Variant, net: nn.Module):
        self.case, self.variant = case, variant
        dtype = DTYPES[case.dtype]
        training = case.what == "train"
        self.dtype = torch.float32 if training else dtype
        net = net.to(case.device, self.dtype).to(memory_format=MEMORY_FORMATS[variant.layout]).train(training)
        if variant.operator:
            ours.prepare(net, variant.operator, MEMORY_FORMATS[variant.layout])
        if training:
            self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
            self.scaler = torch.amp.GradScaler(case.device.type, init_scale=1024.0, enabled=case.dtype == "fp16")
        self.net = net
        self.call = _compiled(net, variant) if variant.compiled else net
        self.x, self.t, self.y, self.target = inputs(case, self.dtype, MEMORY_FORMATS[variant.layout])
        self.step: Callable[[], object] = self._train if training else self._infer

    def check(self) -> tuple[Tensor, Tensor | None]:
        """(output of the first pictures, gradient of the first convolution or None), float32 on the CPU; no weight moves."""
        if self.case.what == "infer":
            return self._infer()[:CHECKED].float().cpu(), None
        out = self._backward()
        grad = dict(self.net.named_parameters()).get("conv_in.weight")
        grad = None if grad is None else grad.grad.float().cpu() / self.scaler.get_scale()
        self.optimizer.zero_grad(set_to_none=True)
        return out[:CHECKED].float().cpu(), grad

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


def inputs(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pictures, timesteps, labels, targets) of a case, the same for every variant."""
    draw = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.size.side, case.size.side)
    x, target = (torch.randn(shape, generator=draw).to(case.device) for _ in range(2))
    t = torch.randint(0, 1000, shape[:1], generator=draw).to(case.device)
    y = torch.randint(0, case.size.classes, shape[:1], generator=draw).to(case.device)
    x, target = (v.to(memory_format=layout) for v in (x, target))
    return x.to(dtype), t, y, target


def _compiled(net: nn.Module, variant: Variant) -> nn.Module:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # a block is compiled for each shape it meets
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would silently run uncompiled
    return ours.compile_network(net) if variant.side == ours.SIDE else torch.compile(net)


# ---------------------------------------------------------------------- the same on both sides


def differences(found: tuple[Tensor, Tensor | None], wanted: tuple[Tensor, Tensor | None]) -> list[float]:
    """||a - b|| / ||b|| of the output and, where both have one, of the gradient."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted) if a is not None and b is not None]


def check_same(found: tuple[Tensor, Tensor | None], wanted: tuple[Tensor, Tensor | None], dtype: str) -> list[float]:
    """The differences. Raises Differs if one is beyond TOLERANCE, or if there is nothing to compare (all zero, not finite)."""
    errors = differences(found, wanted)
    if not all(b is None or (b.isfinite().all() and b.std() > 0) for b in wanted):
        raise Differs("the reference's output is constant or not finite: nothing can be compared with it")
    for what, error, most in zip(("outputs", "gradients"), errors, TOLERANCE[dtype]):
        if not error <= most:
            raise Differs(f"refused: its {what} differ from the reference by {error:.2g} ({dtype}: {most:.2g} at most)")
    return errors


# ---------------------------------------------------------------------- measuring


def variants(case: Case, against: list[str]) -> tuple[list[Variant], list[str]]:
    """The uncompiled variants of every side, and sentences on what is missing."""
    operators, why = ours.operators(case.device)
    found = [Variant(ours.SIDE, layout, operator) for operator in operators for layout in MEMORY_FORMATS]
    found += [Variant(peer, layout) for peer in against for layout in MEMORY_FORMATS]
    return found, [f"ours fused: {why}"] if why else []


class Nets:
    """The networks of a case by side, made once: ours on the CPU in fp32, the peer's with the same weights where it can."""

    def __init__(self, case: Case):
        self.case = case
        self.made = {ours.SIDE: ours.network(**case.size.network(case.resample))}
        self.counted: dict[str, int] = {}  # FLOPs of a forward pass of one picture

    def get(self, side: str) -> nn.Module:
        """A fresh copy. Raises PeerMissing."""
        if side not in self.made:
            make = {
                peers.DIFFUSERS: lambda: peers.diffusers_twin(self.made[ours.SIDE]),
                peers.LUCIDRAINS: lambda: peers.lucidrains(self.case.size),
            }[side]
            self.made[side] = make()
        return copy.deepcopy(self.made[side])

    def flops(self, side: str) -> int:
        """FLOPs of the case for one picture: forward, or three times that for training."""
        # ours counts as the exported twin: an operator of its own would not be counted
        side = peers.DIFFUSERS if side == ours.SIDE else side
        if side not in self.counted:
            one = Case("infer", self.case.size, "fp32", 1, torch.device("cpu"))
            x, t, y, _ = inputs(one, torch.float32, torch.contiguous_format)
            self.counted[side] = peers.flops(self.get(side).eval(), x, t, y)
        return self.counted[side] * (3 if self.case.what == "train" else 1)


def measure(
    case: Case,
    against: list[str],
    clock: Clock,
    rounds: int,
    sample_seconds: float = 0.2,
    compile: str | None = None,
    deadline: Deadline | None = None,
) -> dict:
    """Every variant of a case, timed interleaved: {"rows": one a variant, "ratios", "not_measured": sentences}.

    compile: None, "best" (the variant of each side that was fastest once warmed up) or "all" (every variant).
    """
    deadline = deadline or Deadline()
    nets = Nets(case)
    plain, missing = variants(case, against)
    rows: dict[Variant, dict] = {}
    works: dict[Variant, Work] = {}
    with full_fp32():
        wanted = _reference(case, nets)
        for variant in plain:
            rows[variant], work = _ready(case, variant, nets, wanted, clock)
            if work is not None:
                works[variant] = work
        for variant in _to_compile(rows, compile):
            spent = max((row["warm_up_s"] for v, row in rows.items() if v.compiled and row["warm_up_s"]), default=60)
            if deadline.left < 2 * spent:
                missing.append(f"{variant.name}: the time limit is too near for compiling")
                continue
            rows[variant], work = _ready(case, variant, nets, wanted, clock)
            if work is not None:
                works[variant] = work
        calls = {variant: work.step for variant, work in works.items()}
        title = f"{case.what} {case.size.name} {case.dtype}"
        known = {variant: rows[variant]["first_s"] for variant in works}
        samples = interleave(calls, clock, rounds, sample_seconds, deadline, title, known)
    counted: dict[str, int] = {}
    for variant, taken in samples.items():
        if variant.side not in counted:
            counted[variant.side] = nets.flops(variant.side)
        row = rows[variant]
        row |= summary(taken)
        row["per_s"] = case.batch / row["median_s"]
        row["flops_per_s"] = counted[variant.side] * row["per_s"]
    missing += [f"{variant.name}: {row['not_measured']}" for variant, row in rows.items() if row["not_measured"]]
    result = {
        "rows": list(rows.values()),
        "ratios": ratios(list(rows.values()), {v.name: s for v, s in samples.items()}),
        "flops_per_image": counted,
        "not_measured": missing,
    }
    del works, nets, calls
    free(case.device)
    return result


def ratios(rows: list[dict], samples: dict) -> list[dict]:
    """Our best variant, and our best of each operator, against the best of each peer, by median time; compiled among themselves too."""
    found = []
    mine = [row for row in rows if row["side"] == ours.SIDE]
    for peer in dict.fromkeys(row["side"] for row in rows if row["side"] != ours.SIDE):
        theirs = [row for row in rows if row["side"] == peer]
        pairs = [(fastest(mine), fastest(theirs))]
        for operator in ("fused", "eager"):
            for compiled in (False, True):
                alike = [row for row in mine if row["operator"] == operator and row["compiled"] == compiled]
                pairs.append((fastest(alike), fastest([row for row in theirs if row["compiled"] == compiled])))
        for a, b in pairs:
            if a and b and all((a["name"], b["name"]) != (r["ours"], r["peer"]) for r in found):
                pair = paired(samples[a["name"]], samples[b["name"]])
                found.append({"ours": a["name"], "peer": b["name"], "best": (a, b) == pairs[0]} | pair)
                if a.get("flops_per_s") and peer == peers.LUCIDRAINS:
                    found[-1]["flops_ratio"] = a["flops_per_s"] / b["flops_per_s"]
    return found


def free(device: torch.device) -> None:
    """Forget what was compiled, and give memory back."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reference(case: Case, nets: Nets) -> tuple[Tensor, Tensor | None]:
    """What diffusers' network, with our weights, answers in fp32, contiguous."""
    exact = Case(case.what, case.size, "fp32", case.batch, case.device, case.resample)
    return Work(exact, Variant(peers.DIFFUSERS, "nchw"), nets.get(peers.DIFFUSERS)).check()


def _ready(case: Case, variant: Variant, nets: Nets, wanted, clock: Clock) -> tuple[dict, Work | None]:
    """(its row, the work warmed up and checked, or None if that failed)."""
    row = {"name": variant.name} | asdict(variant)
    row |= {"errors": None, "warm_up_s": None, "peak_memory_bytes": None, "not_measured": None}
    cuda = case.device.type == "cuda"
    try:
        net = nets.get(variant.side)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        began = time.perf_counter()
        with unpinned() if variant.compiled else contextlib.nullcontext():
            work = Work(case, variant, net)
            found = work.check()
            if variant.side != peers.LUCIDRAINS:
                row["errors"] = check_same(found, wanted, case.dtype)
            work.step()
        row["warm_up_s"] = time.perf_counter() - began
        for _ in range(3 if cuda else 0):
            work.step()
        row["first_s"] = clock.sample(work.step).seconds
        if cuda:
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - held
        return row, work
    except (Differs, peers.PeerMissing) as error:
        row["not_measured"] = str(error)
    except Exception as error:  # out of memory, a kernel that does not exist; a compiler raises this and that
        if not (variant.compiled or isinstance(error, RuntimeError)):
            raise
        row["not_measured"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row, None


def _to_compile(rows: dict[Variant, dict], which: str | None) -> list[Variant]:
    """The compiled variants to try, after the plain ones have been warmed up."""
    alive = {variant: row["first_s"] for variant, row in rows.items() if not row["not_measured"]}
    chosen = list(alive) if which == "all" else []
    if which == "best":
        chosen = [
            min((v for v in alive if v.side == side), key=alive.get) for side in dict.fromkeys(v.side for v in alive)
        ]
    return [dataclasses.replace(variant, compiled=True) for variant in chosen]
