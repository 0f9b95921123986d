"""What does guidance against a random class gain, in a network without a null class that is often wrong?

    python -m benchmarks.random_class [--out DIR] [--scales 1.5,2,3]

Digits are trained without a null class and without label dropout. Of the checkpoints, the first is taken whose samples
are 80 to 95 % right at scale 1, judged by a classifier that knows nothing of the model. Then 1,000 images of it are
sampled at each scale from the same noise, guided against a random class for each image and step. May be stopped and run
again. Results: DIR/random_class.json and DIR/random_class.md.
"""

import argparse
import json
import math
from datetime import date
from pathlib import Path

import numpy as np
import torch

from diffusion_adagn import ClassConditionalPipeline, Guidance
from diffusion_adagn.atomic import atomic_write
from diffusion_adagn.config import read_config
from diffusion_adagn.training.train import train

from .digits_judge import DigitsJudge
from .machine import machine_info

COUNT, TRIAL, STEPS, EVERY = 1000, 300, 20, 20
OPEN = 0.80, 0.95  # what is right at scale 1
SETTINGS = {
    "model.null_class": "false", "training.label_dropout": "0", "training.max_steps": "200",
    "training.checkpoint_every": str(EVERY), "training.keep_every": str(EVERY), "training.preview_every": "0",
    "training.diagnostics_every": "0", "training.heldout_every": "0", "speed.device": "cpu",
}  # fmt: skip


def is_right(pipe: ClassConditionalPipeline, judge: DigitsJudge, count: int, guidance: Guidance) -> np.ndarray:
    """bool [count]: whether the judge sees the class that was asked for; image i has class i % 10 and seed i."""
    ids, right = np.arange(count) % 10, []
    for start in range(0, count, 100):
        part = slice(start, start + 100)
        images = pipe(
            ids[part].tolist(), guidance=guidance, num_inference_steps=STEPS, sampler="dpm++", output_type="np",
            seeds=list(range(start, start + len(ids[part]))),
        ).images  # fmt: skip
        right.append(judge.classes(images) == ids[part])
    return np.concatenate(right)


def open_model(folder: Path) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_open(run: Path, judge: DigitsJudge, done: dict) -> Path:
    """The first checkpoint that is right often, but not always; `done` has what was measured."""
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        if checkpoint.name not in done["trials"]:
            right = is_right(open_model(checkpoint), judge, TRIAL, Guidance())
            done["trials"][checkpoint.name] = float(right.mean())
            print(f"{checkpoint.name}: {100 * right.mean():.1f} % of {TRIAL} right at scale 1")
        if OPEN[0] <= done["trials"][checkpoint.name] <= OPEN[1]:
            return checkpoint
    raise SystemExit(
        f"no checkpoint is right in {OPEN[0]:.0%} to {OPEN[1]:.0%} of the images: train with other settings."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/random_class"))
    parser.add_argument("--scales", default="1.5,2,3")
    arguments = parser.parse_args()
    out, scales = arguments.out, [float(word) for word in arguments.scales.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    file = out / "random_class.json"
    done = json.loads(file.read_text()) if file.exists() else {"trials": {}, "scales": {}}

    def save() -> None:
        done["machine"], done["date"] = machine_info(torch.device("cpu")), str(date.today())
        atomic_write(file, lambda tmp: tmp.write_text(json.dumps(done, indent=1)))

    if status := train(read_config("digits", SETTINGS | {"output_dir": str(out / "run")}), resume=True):
        raise SystemExit(status)  # stopped by a signal
    judge = DigitsJudge()
    checkpoint = first_open(out / "run", judge, done)
    done["checkpoint"] = checkpoint.name
    save()
    pipe, right = open_model(checkpoint), {}
    for scale in [1.0, *scales]:
        key = f"{scale:g}"
        if key not in done["scales"]:
            guidance = Guidance() if scale == 1 else Guidance(scale, negative="random")
            done["scales"][key] = is_right(pipe, judge, COUNT, guidance).tolist()
            save()
        right[scale] = np.array(done["scales"][key], dtype=float)
    lines = ["| scale | right | gain over scale 1 (95 % interval, paired) |", "|---|---|---|"]
    for scale, values in right.items():
        gain = values - right[1.0]
        half = 1.96 * gain.std(ddof=1) / math.sqrt(COUNT)
        text = (
            ""
            if scale == 1
            else f"{100 * gain.mean():+.1f} ({100 * (gain.mean() - half):+.1f} to {100 * (gain.mean() + half):+.1f})"
        )
        lines.append(f"| {scale:g} | {100 * values.mean():.1f} % | {text} |")
    text = "\n".join([f"{checkpoint.name}, {COUNT} images, {STEPS} steps of dpm++, negative random", "", *lines])
    (out / "random_class.md").write_text(text + "\n")
    print(f"{text}\n\nLook at  {out / 'random_class.md'}")


if __name__ == "__main__":
    main()
