"""The sampling loop: guided DDIM by our pipeline, by diffusers' parts, and the bare network calls inside them."""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from . import ours, peers
from .machine import full_fp32
from .networks import MEMORY_FORMATS, Case, Differs, Nets, Variant, Work, free
from .timing import Clock, Deadline, fastest, interleave, paired, summary

SCALE = 2.0
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 1.5e-1}  # ||a - b|| / ||b|| of the pictures of a loop of few steps
CHECKED_STEPS = 4


@torch.inference_mode()
def diffusers_loop(unet: nn.Module, scheduler, noise: Tensor, labels: Tensor, null: int, steps: int) -> Tensor:
    """Guided sampling as diffusers' class-conditional pipelines do it: the batch doubled, one call, the two halves combined.

    noise [N, 3, H, W], labels int [N] -> x0 [N, 3, H, W], float32.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    together = torch.cat([labels, torch.full_like(labels, null)])
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = torch.cat([x, x]).to(unet.dtype)
        cond, uncond = unet(both, t.expand(len(both)), together, return_dict=False)[0].float().chunk(2)
        x = scheduler.step(uncond + SCALE * (cond - uncond), t, x, return_dict=False)[0]
    return x


def measure(
    case: Case,
    against: list[str],
    clock: Clock,
    rounds: int,
    steps: int = 50,
    sample_seconds: float = 0.2,
    deadline: Deadline | None = None,
) -> dict:
    """{"rows", "ratios", "not_measured"}: whole loops of N = case.batch pictures, and `steps` bare calls with 2N rows.

    case: of what "infer"; each side in its fastest variant, chosen by the better of two samples of the bare call.
    """
    deadline = deadline or Deadline()
    double = Case("infer", case.size, case.dtype, 2 * case.batch, case.device, case.resample)
    operators, why = ours.operators(case.device)
    result: dict = {"rows": [], "ratios": [], "not_measured": [f"ours fused: {why}"] if why else []}
    nets = Nets(double)
    with full_fp32():
        mine, variant = _fastest(double, [(ours.SIDE, op) for op in operators], nets, clock)
        pipe, scheduler = ours.pipeline(mine.net)
        pipe.to(case.device)
        names = [i % case.size.classes for i in range(case.batch)]
        labels = torch.tensor(names, device=case.device)
        shape = (3, case.size.side, case.size.side)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(case.batch)])
        noise = noise.to(case.device)

        def our_loop(count: int = steps) -> Tensor:
            kept = {
                "guidance_scale": SCALE,
                "seeds": list(range(case.batch)),
                "output_type": "pt",
                "return_dict": False,
            }
            return pipe(names, num_inference_steps=count, **kept)[0]

        @torch.inference_mode()
        def bare_image_path() -> None:
            for _ in range(steps):
                mine.net.denoise(mine.x, told)

        def bare(work: Work):
            return lambda: [work.step() for _ in range(steps)]

        with torch.inference_mode():
            told = mine.net.modulation(mine.t[:1], mine.y)
        calls = {
            "our loop": our_loop,
            "our bare calls": bare(mine),
            "our bare calls, image path alone": bare_image_path,
        }
        chosen = dict.fromkeys(calls, variant)
        if peers.DIFFUSERS in against:
            peer, theirs = _fastest(double, [(peers.DIFFUSERS, None)], nets, clock)

            def their_loop(count: int = steps) -> Tensor:
                return diffusers_loop(peer.net, scheduler, noise, labels, case.size.classes, count)

            try:
                found = _same_pictures(our_loop(CHECKED_STEPS), their_loop(CHECKED_STEPS), case.dtype)
                calls |= {"diffusers' loop": their_loop, "diffusers' bare calls": bare(peer)}
                chosen |= dict.fromkeys(("diffusers' loop", "diffusers' bare calls"), theirs)
                result["pictures_differ"] = found
            except Differs as error:
                result["not_measured"].append(str(error))
        result["not_measured"] += [
            f"sample: {name} has no such loop over the same network" for name in against if name != peers.DIFFUSERS
        ]
        our_loop(CHECKED_STEPS)
        samples = interleave(calls, clock, rounds, sample_seconds, deadline, f"sample {case.size.name} {case.dtype}")
    for name, taken in samples.items():
        row = {"name": f"{name} ({chosen[name].name})", "not_measured": None} | asdict(chosen[name]) | summary(taken)
        result["rows"].append(row | {"per_s": case.batch / row["median_s"], "steps": steps})
    labelled = {name: row["name"] for name, row in zip(samples, result["rows"])}
    pairs = [
        ("our loop", "diffusers' loop"),
        ("our loop", "our bare calls"),
        ("our loop", "our bare calls, image path alone"),
    ]
    pairs.append(("diffusers' loop", "diffusers' bare calls"))
    for a, b in pairs:
        if a in samples and b in samples:
            pair = paired(samples[a], samples[b])
            if "bare" in b:  # loop / bare - 1
                pair["overhead"] = 1 / pair["median"] - 1
                pair["overhead_range"] = [1 / pair["max"] - 1, 1 / pair["min"] - 1]
            result["ratios"].append({"ours": labelled[a], "peer": labelled[b]} | pair)
    free(case.device)
    return result


def _fastest(case: Case, kinds: list[tuple[str, str | None]], nets: Nets, clock: Clock) -> tuple[Work, Variant]:
    """The fastest variant of a side, by the better of two samples of a warmed-up call."""
    tried = []
    for side, operator in kinds:
        for layout in MEMORY_FORMATS:
            variant = Variant(side, layout, operator)
            work = Work(case, variant, nets.get(side))
            work.step()
            tried.append(
                {"median_s": min(clock.sample(work.step).seconds for _ in range(2)), "work": work, "variant": variant}
            )
    chosen = fastest(tried)
    return chosen["work"], chosen["variant"]


def _same_pictures(mine: Tensor, theirs: Tensor, dtype: str) -> float:
    """The difference of our pictures (0..1) from theirs (x0). Raises Differs beyond TOLERANCE."""
    theirs = (theirs / 2 + 0.5).clamp(0, 1)
    error = float((mine - theirs).norm() / theirs.norm())
    if not error <= TOLERANCE[dtype]:
        raise Differs(
            f"sample: refused: after {CHECKED_STEPS} steps the pictures differ by {error:.2g} ({TOLERANCE[dtype]} at most)"
        )
    return error
