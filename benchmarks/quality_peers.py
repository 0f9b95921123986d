"""Train a peer's own network, process and trainer defaults on the same images, and sample it; for benchmarks.quality.

    python -m benchmarks.quality_peers train diffusers --data PATH/TO/cifar10 --images 67000 --out FOLDER
    python -m benchmarks.quality_peers sample diffusers --out FOLDER --scales 1,1.5,2,3 --calls 12

The peers' trainers read folders of files and have no classes, so their training step is repeated here with their
defaults, for images of the same store and with random flips. A stopped training continues from its last state.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from diffusion_adagn.atomic import atomic_write
from diffusion_adagn.data import open_dataset

from .peers import DIFFUSERS, LUCIDRAINS, flops, lucidrains_module

CLASSES, NULL, SIDE = 10, 10, 32
WARM_UP = 8  # steps that the speed does not include
MARKS = (0.25, 0.5, 1.0)  # of the training: where the EMA weights are saved


class Diffusers(nn.Module):
    """UNet2DModel with a class embedding, and the defaults of its training example train_unconditional.py.

    Linear noise schedule, eps-prediction, AdamW at 1e-4 with betas 0.95 and 0.999 and weight decay 1e-6, 500 warm-up steps,
    then a cosine; EMA by (1 + step)^-0.75, at most 0.9999; batches of 16. A tenth of the labels is replaced by a null class.
    """

    batch = 16

    def __init__(self, documented: bool = False):
        super().__init__()
        from diffusers import DDPMScheduler, UNet2DModel

        down, up = ["DownBlock2D"] * 3, ["UpBlock2D"] * 3
        widths, layers, attention = (32, 64, 64), 1, 2
        if documented:  # of train_unconditional.py
            down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
            widths, layers, attention = (128, 128, 256, 256, 512, 512), 2, 4
        down[attention], up[-1 - attention] = "AttnDownBlock2D", "AttnUpBlock2D"
        self.network = UNet2DModel(
            sample_size=SIDE, block_out_channels=widths, layers_per_block=layers, down_block_types=down, up_block_types=up,
            num_class_embeds=CLASSES + 1,
        )  # fmt: skip
        self.scheduler = DDPMScheduler()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)

    def rate(self, step: int, steps: int) -> float:
        from math import cos, pi

        return step / 500 if step < 500 else 0.5 * (1 + cos(pi * (step - 500) / max(1, steps - 500)))

    def ema_decay(self, step: int) -> float:
        return min(0.9999, 1 - (1 + step) ** -0.75)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        y = torch.where(torch.rand(len(y)) < 0.1, NULL, y)
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        return F.mse_loss(self.network(self.scheduler.add_noise(x, noise, t), t, y).sample, noise)

    @torch.inference_mode()
    def sample(self, y: Tensor, scale: float, calls: int) -> Tensor:
        """Images in [-1, 1] by its DPMSolverMultistepScheduler, in `calls` steps. x0 is clipped, as in all others."""
        from diffusers import DPMSolverMultistepScheduler

        clipped = {"thresholding": True, "sample_max_value": 1.0}  # a dynamic threshold of at most 1
        # 13.8 by Frechet distance at scale 2; linspace and trailing 13.9, DDIM 14.7
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config, **clipped, use_karras_sigmas=True)
        scheduler.set_timesteps(calls)
        x = torch.randn(len(y), 3, SIDE, SIDE)
        for t in scheduler.timesteps:
            eps = self.network(x, t, y).sample
            if scale != 1:
                null = self.network(x, t, torch.full_like(y, NULL)).sample
                eps = null + scale * (eps - null)
            x = scheduler.step(eps, t, x).prev_sample
        return x.clamp(-1, 1)


class Lucidrains(nn.Module):
    """Unet and GaussianDiffusion of denoising_diffusion_pytorch.classifier_free_guidance, and the defaults of its Trainer.

    Cosine noise schedule, eps-prediction, half of the labels dropped, Adam at 1e-4 with betas 0.9 and 0.99, batches of 16, EMA of
    0.995 at every tenth step after a warm-up. Its sampler is DDIM; eta is 0 here (its default, 1, is noisy at few steps).
    """

    batch = 16

    def __init__(self, documented: bool = False):
        super().__init__()
        module = lucidrains_module()
        shape = {"dim": 64, "dim_mults": (1, 2, 4, 8)} if documented else {"dim": 26, "dim_mults": (1, 2, 2)}
        self.network = module.Unet(num_classes=CLASSES, **shape)
        self.process = [module.GaussianDiffusion(self.network, image_size=SIDE, ddim_sampling_eta=0.0)]  # no submodule
        self.module = [module]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def rate(self, step: int, steps: int) -> float:
        return 1.0

    def ema_decay(self, step: int) -> float:
        """ema_pytorch's: a copy in the first 100 steps, then 1 - n^(-2/3) up to 0.995, at every tenth step."""
        return min(0.995, 1 - max(1, step - 100) ** (-2 / 3)) if step % 10 == 1 else 1.0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.process[0]((x + 1) / 2, classes=y)

    @torch.inference_mode()
    def sample(self, y: Tensor, scale: float, calls: int) -> Tensor:
        """Images in [-1, 1] by its own sampler and guidance, with its default rescaling."""
        process = self.module[0].GaussianDiffusion(
            self.network, image_size=SIDE, ddim_sampling_eta=0.0, sampling_timesteps=calls
        )
        self.module[0].tqdm = lambda steps, **_: steps
        if scale == 1:  # its own function returns one value here, and its caller unpacks two

            def conditional(x: Tensor, t: Tensor, classes: Tensor, **_) -> tuple[Tensor, Tensor]:
                return (self.network(x, t, classes, cond_drop_prob=0.0),) * 2

            with patch.object(self.network, "forward_with_cond_scale", conditional):
                return process.sample(y) * 2 - 1
        return process.sample(y, cond_scale=scale) * 2 - 1


PEERS = {DIFFUSERS: Diffusers, LUCIDRAINS: Lucidrains}


def gflops(peer: str, documented: bool = False) -> float:
    """Of one forward pass of one image. documented: of the network in the peer's own documentation."""
    net = PEERS[peer](documented).network
    x, t, y = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, y, return_dict=False):
            return self.net(x, t, y) if peer == DIFFUSERS else self.net(x, t, y, cond_drop_prob=0.0)

    return flops(Call(), x, t, y) / 1e9


def batches(data: str, size: int, start: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images float [N, 3, H, W] in [-1, 1], mirrored at random, and labels; the same for each step of each call."""
    dataset = open_dataset({"source": data, "image_size": SIDE})
    for step in range(start, steps):
        generator = np.random.default_rng((0, step))
        epoch = np.random.default_rng((1, step * size // len(dataset))).permutation(len(dataset))
        pixels, labels = dataset.gather(epoch[np.arange(step * size, (step + 1) * size) % len(dataset)])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        mirrored = torch.from_numpy(generator.random(size) < 0.5)
        yield torch.where(mirrored[:, None, None, None], x.flip(3), x), torch.from_numpy(labels)


def train(peer: str, data: str, images: int, out: Path, precision: str, documented: bool = False) -> float:
    """Train on so many images, with the EMA weights saved at MARKS. Returns the images per second of this call."""
    torch.manual_seed(0)
    model = PEERS[peer](documented)
    steps, optimizer = max(1, images // model.batch), model.optimizer()
    ema = {name: value.clone() for name, value in model.network.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    first, state = 0, out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, first = saved["ema"], saved["step"]
        torch.set_rng_state(saved["rng"])
    counted_from, start = first, time.process_time()  # other processes do not change it
    for step, (x, y) in enumerate(
        tqdm(batches(data, model.batch, first, steps), total=steps, initial=first), first + 1
    ):
        if step == first + WARM_UP + 1:
            counted_from, start = first + WARM_UP, time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * model.rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.loss(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        optimizer.step()
        decay = model.ema_decay(step)
        with torch.no_grad():
            for name, value in model.network.state_dict().items():
                ema[name].lerp_(value, 1 - decay) if value.is_floating_point() else ema[name].copy_(value)
        for mark in MARKS:
            if step == round(mark * steps):
                atomic_write(out / f"ema-{mark:g}.pt", lambda f: torch.save(ema, f))
        if step % 200 == 0 or step == steps:
            content = {"network": model.network.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema,
                       "step": step, "rng": torch.get_rng_state()}  # fmt: skip
            atomic_write(state, lambda f, content=content: torch.save(content, f))
    return (steps - counted_from) * model.batch / (time.process_time() - start)


def sample(peer: str, out: Path, mark: float, scales: Sequence[float], count: int, calls: int) -> None:
    """OUT/MARK/gSCALE.npz, as the ADM evaluator writes it: images of all classes in turn. Existing files are skipped."""
    model = PEERS[peer]().eval().to(memory_format=torch.channels_last)  # the same images, up to 1.3 times as fast
    model.network.load_state_dict(torch.load(out / f"ema-{mark:g}.pt", weights_only=True))
    (out / f"{mark:g}").mkdir(exist_ok=True)
    for scale in scales:
        file = out / f"{mark:g}" / f"g{scale:g}.npz"
        if file.exists():
            continue
        torch.manual_seed(0)
        labels = torch.arange(count) % CLASSES
        parts = [model.sample(part, scale, calls) for part in tqdm(labels.split(50), desc=f"{peer}, scale {scale:g}")]
        pixels = ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        atomic_write(file, lambda f, pixels=pixels, labels=labels: np.savez(f, pixels, labels.numpy()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.quality_peers", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "sample", "cost"))
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--images", type=int, default=67_000, help="training images seen (default: 67000)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of training (default: fp32)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality/peer"))
    parser.add_argument(
        "--documented", action="store_true", help="the network of the peer's documentation (train, cost)"
    )
    parser.add_argument("--mark", type=float, default=1.0, choices=MARKS, help="sample the weights at this fraction")
    parser.add_argument("--scales", default="1,1.5,2,3", help="guidance scales (default: 1,1.5,2,3)")
    parser.add_argument("--count", type=int, default=1000, help="images per scale (default: 1000)")
    parser.add_argument("--calls", type=int, default=12, help="network calls per image and pass (default: 12)")
    args = parser.parse_args(argv)
    if args.what == "cost":
        print(f"{gflops(args.peer, args.documented):.4f} GFLOP per image and forward pass")
    elif args.what == "train":
        speed = train(args.peer, args.data, args.images, args.out, args.precision, args.documented)
        print(f"{speed:.2f} images/s")
    else:
        sample(args.peer, args.out, args.mark, [float(s) for s in args.scales.split(",")], args.count, args.calls)
    return 0


if __name__ == "__main__":
    sys.exit(main())
