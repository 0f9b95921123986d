"""How well a class is learned from a few images: held-out digits, and a held-out class of CIFAR-10.

    python -m benchmarks.personal digits                       # 27 classes, each learned in minutes
    python -m benchmarks.personal cifar10 --data PATH/TO/cifar10

Both are resumed where they stopped. Results go to benchmarks/results/personal: one JSON file and one sheet of images for
each learned class, and a table.
"""

import argparse
import csv
import itertools
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusion_adagn import ClassConditionalPipeline
from diffusion_adagn.personal.learn import learn_class
from diffusion_adagn.personal.settings import LearnRequest
from diffusion_adagn.render.grids import labelled_grid
from diffusion_adagn.runs.layout import RunFolder
from diffusion_adagn.sampling.load import open_pipeline
from diffusion_adagn.sampling.pipeline import to_pixels
from diffusion_adagn.trace.learned import how_far, rms_distances

from .digits_judge import DigitsJudge
from .machine import machine_info

RESULTS = Path(__file__).parent / "results" / "personal"
DIGITS, DRAWS, FEW = (0, 5, 8), (0, 1, 2), 16
DEPTHS = ("vector", "sites", "layers")
TRAINED = "trained"  # in place of a depth: the control
SCALES = (1.0, 2.0)
SAMPLES, STEPS, BATCH = 300, 25, 100
CIFAR_CLASS, CIFAR_FEW, CIFAR_SAMPLES, CIFAR_STEPS = "horse", 100, 1000, 12
SHOWN = 12  # images of a row of the sheet
CIFAR_TRAINING = 1040  # steps of 64 images: 40 minutes at 27.7 images/s, one core of an AMD EPYC (AVX2)


@dataclass(frozen=True)
class Figures:
    """What was measured of a class at a guidance scale.

    Attributes:
        accuracy: share of samples that the judge takes for the digit.
        spread: standard deviation of the samples within the class, in units of that of the real class.
        distance: median distance of a sample to the nearest of the images that the class was learned from, in units of
            that of the other real images of the digit.
    """

    accuracy: float
    spread: float
    distance: float


def train(folder: Path, *options: str) -> Path:
    """A finished run in the folder: trained, resumed or there already."""
    if not RunFolder(folder).pipeline.is_dir():
        command = [sys.executable, "-m", "diffusion_adagn", "train", *options]
        command += ["--output_dir", str(folder), "--resume", "auto"]
        subprocess.run(command, check=True)
    return folder


def digits(depths: tuple[str, ...], draws: tuple[int, ...]) -> list[dict]:
    """Learn held-out digits, and measure them; and, as a control, the same digits of a run that was trained on all ten."""
    judge, rows = DigitsJudge(), []
    for draw, digit, depth in itertools.product(draws, DIGITS, (*depths, TRAINED)):
        file = RESULTS / "digits" / f"{digit}-{draw}-{depth}.json"
        if not file.is_file():
            row = {"digit": digit, "draw": draw, "depth": depth} | one_digit(
                digit, draw, depth, judge, file.with_suffix("")
            )
            made = {"machine": machine_info(torch.device("cpu")), "date": date.today().isoformat()}
            file.write_text(json.dumps(row | made, indent=1) + "\n", encoding="utf-8")
        rows.append(json.loads(file.read_text(encoding="utf-8")))
        print(file.stem, json.dumps(rows[-1]["figures"]), flush=True)
    return rows


def one_digit(digit: int, draw: int, depth: str, judge: DigitsJudge, out: Path) -> dict:
    """Learn one digit from 16 images of a draw, at one depth, and judge its samples."""
    real = np.rint((judge.real[judge.labels == digit] + 1) * 127.5).astype(np.uint8)
    order = np.random.default_rng(draw).permutation(len(real))
    few, rest = real[order[:FEW]], real[order[FEW:]]
    if depth == TRAINED:
        pipe = ClassConditionalPipeline.from_pretrained(train(RESULTS / "all-ten", "--config", "digits"))
        pipe.set_progress_bar_config(disable=True)
        name, row = f"name:{digit}", {"bytes": 0, "learned": {"seconds": 0.0}}
    else:
        pipe, row = learned_digit(digit, few, depth, out)
        name = "new"
    figures, sheet = {}, {"learned from": [i[..., None] for i in few[:12]]}
    for scale in SCALES:
        sampled = sample(pipe, name, scale)
        figures[f"{scale:g}"] = asdict(measure(sampled, digit, few, rest, judge))
        sheet[f"scale {scale:g}"] = list(to_pixels(sampled[:12]))
    labelled_grid(list(sheet.values()), list(sheet), title=f"digit {digit}, {depth}").save(out.with_suffix(".png"))
    return row | {"figures": figures}


def learned_digit(digit: int, few: np.ndarray, depth: str, out: Path) -> tuple[ClassConditionalPipeline, dict]:
    """A model without the digit that has learned it from `few`, uint8 [N, 8, 8], as class "new"; and what it cost."""
    others = ",".join(f"name:{d}" for d in range(10) if d != digit)
    base = train(RESULTS / f"without-{digit}", "--config", "digits", "--data.classes", others)
    images, file = out.with_name(f"{out.name}-images"), out.with_suffix(".safetensors")
    images.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(few):
        Image.fromarray(image).save(images / f"{i:02d}.png")
    request = LearnRequest(images=str(images), name="new", depth=depth, overwrite=True, preview_every=0)
    found = learn_class(base, request, file).figures
    pipe = ClassConditionalPipeline.from_pretrained(base)
    before = old_images(pipe)
    pipe.load_class(file)
    assert np.array_equal(before, old_images(pipe)), "an image of an old class changed"
    learned = {key: found[key] for key in ("steps", "best_step", "loss_before", "loss", "parameters", "seconds")}
    return pipe, {"bytes": file.stat().st_size, "learned": learned, "copies": found["neighbours"]["copies"]}


def old_images(pipe: ClassConditionalPipeline) -> np.ndarray:
    """A few images of the classes of training, always from the same noises."""
    pipe.set_progress_bar_config(disable=True)
    return pipe("all", seeds=0, num_inference_steps=5, guidance_scale=2.0, output_type="np").images


def sample(
    pipe: ClassConditionalPipeline, name: str, scale: float, count: int = SAMPLES, steps: int = STEPS
) -> np.ndarray:
    """Images of a class, float32 [count, H, W, C] in 0..1; image i from seed i."""
    batches = [range(i, min(i + BATCH, count)) for i in range(0, count, BATCH)]
    settings = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "np"}
    return np.concatenate([pipe([name] * len(seeds), seeds=list(seeds), **settings).images for seeds in batches])


def measure(sampled: np.ndarray, digit: int, few: np.ndarray, rest: np.ndarray, judge: DigitsJudge) -> Figures:
    """sampled: [N, 8, 8, 1] in 0..1. few, rest: uint8 [M, 8, 8], real ones that it was and was not learned from."""
    accuracy, _, spread = judge(sampled, [digit] * len(sampled))
    few, rest = (images[..., None].astype(np.float32) / 255 for images in (few, rest))
    near, real = (float(np.median(rms_distances(images, few).min(1))) for images in (sampled, rest))
    return Figures(accuracy, spread, near / real)


def table(rows: list[dict]) -> str:
    """Means over digits and draws, with the worst and the range."""
    lines = [
        "| depth | scale | accuracy: mean | worst | spread: mean | least | distance: mean | least | bytes | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for depth in (*DEPTHS, TRAINED):
        for scale in SCALES:
            chosen = [row for row in rows if row["depth"] == depth]
            if not chosen:
                continue
            values = {
                key: [row["figures"][f"{scale:g}"][key] for row in chosen] for key in ("accuracy", "spread", "distance")
            }
            cells = [f"{np.mean(values['accuracy']):.1%}", f"{min(values['accuracy']):.1%}"]
            cells += [f"{f(values[key]):.2f}" for key in ("spread", "distance") for f in (np.mean, min)]
            cells += [f"{np.mean([row['bytes'] for row in chosen]):,.0f}"]
            cells += [f"{np.mean([row['learned']['seconds'] for row in chosen]):.0f}"]
            lines.append(f"| {depth} | {scale:g} | " + " | ".join(cells) + " |")
    by_digit = ["", "| digit | depth | scale | accuracy of each draw |", "|---|---|---|---|"]
    for digit in DIGITS:
        for depth in (*DEPTHS, TRAINED):
            for scale in SCALES:
                found = [
                    r["figures"][f"{scale:g}"]["accuracy"] for r in rows if (r["digit"], r["depth"]) == (digit, depth)
                ]
                if found:
                    by_digit.append(f"| {digit} | {depth} | {scale:g} | {', '.join(f'{a:.1%}' for a in found)} |")
    return "\n".join([*lines, *by_digit])


def cifar10(data: str, depths: tuple[str, ...]) -> None:
    """A model without one class and one with all ten; the class learned from 100 images, the nearest old class, and the
    ten-class model's own: each measured by `adagn evaluate` against the 1,000 test images of the class."""
    from diffusion_adagn.config import DataConfig
    from diffusion_adagn.data import open_dataset

    dataset = open_dataset(DataConfig(source=data), "train")
    names = dataset.label_space.names
    recipe = ("--config", "cifar10_cpu", "--data.source", data, "--training.max_steps", str(CIFAR_TRAINING))
    nine = train(RESULTS / "cifar-nine", *recipe, "--data.classes", ",".join(n for n in names if n != CIFAR_CLASS))
    ten = train(RESULTS / "cifar-ten", *recipe)
    few = RESULTS / "cifar-few"
    few.mkdir(parents=True, exist_ok=True)
    rows = np.flatnonzero(dataset.labels == names.index(CIFAR_CLASS))[:CIFAR_FEW]
    for i, pixels in enumerate(dataset.gather(rows)[0]):
        Image.fromarray(pixels).save(few / f"{i:04d}.png")
    files = {depth: RESULTS / f"cifar-{depth}.safetensors" for depth in depths}
    for depth, file in files.items():
        if not file.is_file():
            learn_class(nine, LearnRequest(images=str(few), name="new", depth=depth, flip=True), file)
    first = ClassConditionalPipeline.from_pretrained(nine)
    first.load_class(files[depths[0]])
    nearest = next(iter(how_far(first, first.labels.learned_ids[0]).classes))
    models = {"ten": (ten, CIFAR_CLASS), f"nearest-{nearest}": (nine, nearest)}
    for name, (run, selection) in (models | {depth: (nine, str(file)) for depth, file in files.items()}).items():
        images, out = RESULTS / "cifar-images" / name, RESULTS / "cifar-figures" / name
        if not (out / "evaluation.json").is_file():
            pipe, _ = open_pipeline(run, classes=[selection])
            pipe.set_progress_bar_config(disable=True)
            (images / CIFAR_CLASS).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(to_pixels(sample(pipe, selection, 2.0, CIFAR_SAMPLES, CIFAR_STEPS))):
                Image.fromarray(image).save(images / CIFAR_CLASS / f"{i:05d}.png")
            command = [sys.executable, "-m", "diffusion_adagn", "evaluate", str(images), "--against", f"{data}:test"]
            subprocess.run([*command, "--out", str(out)], check=True)
    few_shown = [np.asarray(Image.open(file)) for file in sorted(few.glob("*.png"))[:SHOWN]]
    cifar_report({"learned from": few_shown}, ["nearest-" + nearest, *depths, "ten"])


def cifar_report(sheet: dict[str, list[np.ndarray]], names: list[str]) -> None:
    """Print what `adagn evaluate` measured of the class in each of the sets, and write a sheet of their first images.

    sheet: the first rows, by name.
    """
    print("| horse | Frechet distance | accuracy |\n|---|---|---|")
    for name in names:
        with (RESULTS / "cifar-figures" / name / "per_class.csv").open(encoding="utf-8") as file:
            row = next(row for row in csv.DictReader(file) if row["class_name"] == CIFAR_CLASS)
        frechet, error, right = (float(row[key]) for key in ("frechet", "frechet_standard_error", "accuracy"))
        print(f"| {name} | {frechet:.2f} ± {error:.2f} | {right:.1%} |")
        files = sorted((RESULTS / "cifar-images" / name / CIFAR_CLASS).glob("*.png"))[:SHOWN]
        sheet[name] = [np.asarray(Image.open(file)) for file in files]
    labelled_grid(list(sheet.values()), list(sheet)).save(RESULTS / "cifar.png")
    print(f"Look at  {RESULTS / 'cifar.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "cifar10"])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10, as data.source takes it")
    parser.add_argument("--depths", default=",".join(DEPTHS))
    parser.add_argument("--draws", default=",".join(map(str, DRAWS)))
    args = parser.parse_args()
    depths = tuple(args.depths.split(","))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "digits").mkdir(exist_ok=True)
    if args.what == "cifar10":
        cifar10(args.data, depths)
        return
    rows = digits(depths, tuple(map(int, args.draws.split(","))))
    text = table(rows)
    (RESULTS / "digits.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
