"""The sampling loop: guided DDIM by our pipeline, by diffusers' components, and the network evaluations alone."""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from . import ours, peers
from .machine import full_fp32
from .networks import MEMORY_FORMATS, Case, Networks, OutputsDiffer, Variant, Workload, free
from .timing import Clock, Deadline, fastest, interleave, paired, summary

SCALE = 2.0
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 1.5e-1}  # ||a - b|| / ||b|| of the images after CHECKED_STEPS steps
CHECKED_STEPS = 4


@torch.inference_mode()
def diffusers_loop(unet: nn.Module, scheduler, noise: Tensor, labels: Tensor, null: int, steps: int) -> Tensor:
    """Guided sampling as in diffusers' class-conditional pipelines: one evaluation of the doubled batch, then combine the halves.

    noise [N, 3, H, W], labels int [N] -> x0 [N, 3, H, W], float32.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    doubled_labels = torch.cat([labels, torch.full_like(labels, null)])
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = torch.cat([x, x]).to(unet.dtype)
        cond, uncond = unet(both, t.expand(len(both)), doubled_labels, return_dict=False)[0].float().chunk(2)
        x = scheduler.step(uncond + SCALE * (cond - uncond), t, x, return_dict=False)[0]
    return x


def measure(
    case: Case,
    peer_names: list[str],
    clock: Clock,
    rounds: int,
    steps: int = 50,
    sample_seconds: float = 0.2,
    deadline: Deadline | None = None,
) -> dict:
    """{"rows", "ratios", "not_measured"}: whole loops of N = case.batch images, and `steps` bare evaluations of 2N rows.

    case: with task "infer". Each side uses its fastest variant by the better of two samples of the bare evaluation.
    """
    deadline = deadline or Deadline()
    double = Case("infer", case.size, case.dtype, 2 * case.batch, case.device, case.resample)
    operators, reason = ours.operators(case.device)
    result: dict = {"rows": [], "ratios": [], "not_measured": [f"ours fused: {reason}"] if reason else []}
    nets = Networks(double)
    with full_fp32():
        mine, variant = _fastest(double, [(ours.SIDE, op) for op in operators], nets, clock)
        pipe, scheduler = ours.pipeline(mine.net)
        pipe.to(case.device)
        class_ids = [i % case.size.classes for i in range(case.batch)]
        labels = torch.tensor(class_ids, device=case.device)
        shape = (3, case.size.side, case.size.side)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(case.batch)])
        noise = noise.to(case.device)

        def our_loop(count: int = steps) -> Tensor:
            settings = {
                "guidance_scale": SCALE,
                "seeds": list(range(case.batch)),
                "output_type": "pt",
                "return_dict": False,
            }
            return pipe(class_ids, num_inference_steps=count, **settings)[0]

        @torch.inference_mode()
        def bare_image_path() -> None:
            for _ in range(steps):
                mine.net.denoise(mine.x, modulation)

        def bare(work: Workload):
            return lambda: [work.step() for _ in range(steps)]

        with torch.inference_mode():
            modulation = mine.net.modulation(mine.t[:1], mine.y)
        calls = {
            "our loop": our_loop,
            "our bare calls": bare(mine),
            "our bare calls, image path alone": bare_image_path,
        }
        chosen = dict.fromkeys(calls, variant)
        if peers.DIFFUSERS in peer_names:
            peer, theirs = _fastest(double, [(peers.DIFFUSERS, None)], nets, clock)

            def their_loop(count: int = steps) -> Tensor:
                return diffusers_loop(peer.net, scheduler, noise, labels, case.size.classes, count)

            try:
                difference = _check_images(our_loop(CHECKED_STEPS), their_loop(CHECKED_STEPS), case.dtype)
                calls |= {"diffusers' loop": their_loop, "diffusers' bare calls": bare(peer)}
                chosen |= dict.fromkeys(("diffusers' loop", "diffusers' bare calls"), theirs)
                result["image_difference"] = difference
            except OutputsDiffer as error:
                result["not_measured"].append(str(error))
        result["not_measured"] += [
            f"sample: {name} has no such loop over the same network" for name in peer_names if name != peers.DIFFUSERS
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


def _fastest(
    case: Case, candidates: list[tuple[str, str | None]], nets: Networks, clock: Clock
) -> tuple[Workload, Variant]:
    """The fastest of the candidates (side, operator), by the better of two samples after warm-up."""
    tried = []
    for side, operator in candidates:
        for memory_format in MEMORY_FORMATS:
            variant = Variant(side, memory_format, operator)
            work = Workload(case, variant, nets.get(side))
            work.step()
            tried.append(
                {"median_s": min(clock.sample(work.step).seconds for _ in range(2)), "work": work, "variant": variant}
            )
    chosen = fastest(tried)
    return chosen["work"], chosen["variant"]


def _check_images(mine: Tensor, theirs: Tensor, dtype: str) -> float:
    """The relative difference of our images (0..1) from theirs (x0). Raises OutputsDiffer if it exceeds TOLERANCE."""
    theirs = (theirs / 2 + 0.5).clamp(0, 1)
    error = float((mine - theirs).norm() / theirs.norm())
    if not error <= TOLERANCE[dtype]:
        raise OutputsDiffer(
            f"sample: rejected: after {CHECKED_STEPS} steps the images differ by {error:.2g} (at most {TOLERANCE[dtype]})"
        )
    return error
