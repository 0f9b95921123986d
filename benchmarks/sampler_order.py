"""Error of every sampler on an exact denoiser, over the number of network calls: docs/images/sampler_order.png.

python -m benchmarks.sampler_order [FILE.png]
"""

import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from diffusion_adagn.diffusion.ode_scheduler import ODE_SAMPLERS, OdeScheduler
from diffusion_adagn.diffusion.oracle import integrate, two_classes

END, STEPS, REFERENCE = 0.05, (5, 10, 20, 40, 80, 160), 2560


def errors(process: str, sampler: str, spacing: str = "karras", count: int = 256) -> list[tuple[int, float]]:
    """[(network calls, RMS distance from the solution at noise level END)] for each number of steps, in values of the images."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser = two_classes()[0].x0

    def solve(sampler: str, steps: int) -> tuple[int, torch.Tensor]:
        scheduler = OdeScheduler(process, sampler, spacing, sigma_min=END)
        levels = list(scheduler.noise_levels(steps + 1))
        scheduler.set_noise_levels(levels[:-1], end=levels[-1])
        x = integrate(scheduler, noise * scheduler.init_noise_sigma, denoiser).double()
        unit = math.hypot(1, END) if process == "edm" and sampler in ("dpm++", "unipc") else 1.0
        return len(scheduler.timesteps), x * unit

    _, solution = solve("heun", REFERENCE)
    results = [solve(sampler, steps) for steps in STEPS]
    return [(calls, (x - solution).square().mean().sqrt().item()) for calls, x in results]


def main(file: str = "docs/images/sampler_order.png") -> None:
    figure = Figure((9, 3.6), layout="constrained")
    for axes, process in zip(figure.subplots(1, 2, sharey=True), ("edm", "flow")):
        for sampler, marker in zip(ODE_SAMPLERS, "os^v"):
            axes.loglog(*zip(*errors(process, sampler)), marker=marker, label=sampler, markersize=4)
        for order in (1, 2):
            axes.loglog((10, 100), (0.1, 0.1 * 10**-order), "--", color="gray", linewidth=0.8)
            axes.text(105, 0.1 * 10**-order, f"order {order}", color="gray", fontsize=8)
        axes.set(title=f"{process}, karras grid from 80 to {END}", xlabel="network calls")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("RMS error of the sample")
    figure.axes[0].legend()
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    print(f"Look at {file}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
