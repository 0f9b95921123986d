"""How well does a network that reads the guidance scale replace two passes, with a teacher and without?

    python -m benchmarks.guidance_input [--out DIR]

Trains three runs on digits: `plain` (the recipe), `taught` (its student) and `untaught` (from the images alone). Measures
at scales 2 and 4:

- the share of the guidance term explained on noisy held-out images, 1 - |one pass - guided|^2 / |guided - cond|^2, where
  guided and cond are the teacher's (without a teacher the network's own, at scale 1);
- of 1,000 samples from the same noise, how many a judge sees as the requested class, their contrast, and the least
  spread within a class, against those of two passes;
- the time of sampling, against two passes.

May be stopped and run again. Results: DIR/guidance_input.json and DIR/guidance_input.md.
"""

import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from diffusion_adagn import ClassConditionalPipeline, open_dataset
from diffusion_adagn.atomic import atomic_write
from diffusion_adagn.config import DataConfig, read_config
from diffusion_adagn.data.rng import normal
from diffusion_adagn.diffusion.loss import normalize_images
from diffusion_adagn.sampling.fixed_scale import fix_scale
from diffusion_adagn.training.train import train

from .digits_judge import DigitsJudge
from .machine import machine_info

SCALES, COUNT, STEPS, ROUNDS = (2.0, 4.0), 1000, 20, 5
GOLDEN = 0.6180339887  # of the noise levels of a round over the images, against those of the round before
QUIET = {
    "training.preview_every": "0", "training.diagnostics_every": "0", "training.heldout_every": "0", "speed.device": "cpu",
}  # fmt: skip
READS = {"model.max_guidance_scale": "4"}
STUDENT = {"training.max_steps": "4000", "training.batch_size": "64"}


def trained(out: Path) -> dict[str, Path]:
    """The three runs, by name; a finished one is not trained again."""
    plain = str(out / "plain")
    settings = {"plain": {}, "taught": READS | STUDENT | {"init_from": plain}, "untaught": READS}
    for name, own in settings.items():
        if status := train(read_config("digits", QUIET | own | {"output_dir": str(out / name)}), resume=True):
            raise SystemExit(status)  # stopped by a signal
    return {name: out / name for name in settings}


@torch.no_grad()
def share_explained(pipe: ClassConditionalPipeline, reference: ClassConditionalPipeline, scale: float) -> float:
    """1 - |one pass - guided|^2 / |guided - cond|^2 over the held-out digits, 16 noise levels each."""
    dataset, error, term = open_dataset(DataConfig(), "heldout", progress=False), 0.0, 0.0
    count = len(dataset)
    pixels, labels = dataset.gather(np.arange(count))
    x0, y = normalize_images(torch.from_numpy(pixels)), torch.from_numpy(labels)
    for number in range(16):
        places = torch.arange(count) + number * count
        level = pipe.process.draw((torch.arange(count).double() / count + number * GOLDEN) % 1, cell=1 / count)[0].to(
            "cpu"
        )
        x = pipe.process.add_noise(x0, normal(0, "heldout", places, tuple(x0.shape[1:])), level)
        cond, null = (
            reference.unet(x, level.time, ids).sample for ids in (y, torch.full_like(y, dataset.label_space.K))
        )
        guided = null + scale * (cond - null)
        error += (pipe.unet(x, level.time, y, guidance_scale=scale).sample - guided).square().sum().item()
        term += (guided - cond).square().sum().item()
    return 1 - error / term


def sampled(pipe: ClassConditionalPipeline, scale: float, judge: DigitsJudge) -> tuple[float, float, float]:
    """What the judge sees in COUNT images: image i has class i % 10 and seed i."""
    ids, parts = np.arange(COUNT) % 10, []
    for start in range(0, COUNT, 100):
        seeds = list(range(start, start + 100))
        parts.append(sample(pipe, ids[seeds].tolist(), scale, seeds))
    return judge(np.concatenate(parts), ids.tolist())


def sample(pipe: ClassConditionalPipeline, ids: list[int], scale: float, seeds: list[int]) -> np.ndarray:
    return pipe(ids, scale, STEPS, seeds=seeds, sampler="dpm++", output_type="np").images


def time_ratio(pipe: ClassConditionalPipeline, reference: ClassConditionalPipeline) -> float:
    """The time of 100 images in one pass over that in two: the median of alternating calls."""
    ratios, ids, seeds = [], [i % 10 for i in range(100)], list(range(100))
    for _ in range(ROUNDS + 1):
        seconds = []
        for one in (pipe, reference):
            start = time.process_time()
            sample(one, ids, 2.0, seeds)
            seconds.append(time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


def measured(pipe: ClassConditionalPipeline, reference: ClassConditionalPipeline, judge: DigitsJudge) -> dict:
    """By scale: the share, and (right, contrast, spread) in one pass and in two; and the ratio of the times."""
    result = {"time": time_ratio(pipe, reference)}
    for scale in SCALES:
        one, two = (sampled(model, scale, judge) for model in (pipe, reference))
        result[f"{scale:g}"] = {"share": share_explained(pipe, reference, scale), "one": one, "two": two}
    return result


def table(done: dict) -> str:
    lines = ["| run | scale | share explained | right | contrast | spread | time |", "|---|---|---|---|---|---|---|"]
    for name in ("taught", "untaught"):
        for scale in (f"{scale:g}" for scale in SCALES):
            values = done[name][scale]
            pairs = [f"{one:.3f} / {two:.3f}" for one, two in zip(values["one"], values["two"])]
            lines.append(
                f"| {name} | {scale} | {values['share']:.3f} | {' | '.join(pairs)} | {done[name]['time']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/guidance_input"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    runs, file = trained(out), out / "guidance_input.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    pipes = {name: ClassConditionalPipeline.from_pretrained(run) for name, run in runs.items()}
    references = {"taught": pipes["plain"], "untaught": fix_scale(pipes["untaught"], 1)}
    for name, reference in references.items():
        if name not in done:
            for pipe in (pipes[name], reference):
                pipe.set_progress_bar_config(disable=True)
            done[name] = measured(pipes[name], reference, DigitsJudge())
            done = done | {"machine": machine_info(torch.device("cpu")), "date": str(date.today())}
            text = json.dumps(done, indent=1)
            atomic_write(file, lambda tmp, text=text: tmp.write_text(text))
    text = f"One pass / two passes, {COUNT} images, {STEPS} steps of dpm++.\n\n{table(done)}\n"
    (out / "guidance_input.md").write_text(text)
    print(f"{text}\nLook at  {out / 'guidance_input.md'}")


if __name__ == "__main__":
    main()
