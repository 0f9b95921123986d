"""Make a model that ships with the package from a finished run.

Writes diffusion_adagn/pretrained/NAME: the run's config, its pipeline in half precision, and made.json, which has the
commands, the hash of the weights, the machine, the date and figures of a judge that knows nothing of the model: an SVC
for digits, else the classifier of `adagn sweep` with the scales and images of SWEEP. To make digits again (a few minutes):

    adagn train digits --diffusion.process flow --diffusion.schedule linear --training.max_steps 800 \\
        --training.preview_every 0 --training.diagnostics_every 0 --output_dir runs/digits_flow
    python -m benchmarks.shipped_model runs/digits_flow digits --sampler dpm++ --trained "adagn train digits ..."

And cifar10 (hours):

    adagn train cifar10_cpu --data.source PATH/TO/cifar10
    python -m benchmarks.shipped_model runs/cifar10_cpu cifar10 --ema 0.05 --sampler dpm++ --data PATH/TO/cifar10 \\
        --trained "adagn train cifar10_cpu"
"""

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from diffusion_adagn import ClassConditionalPipeline, read_config
from diffusion_adagn.config import to_yaml, with_overrides
from diffusion_adagn.runs.layout import RunFolder
from diffusion_adagn.runs.shipped import FOLDER
from diffusion_adagn.sampling.pretrained import WEIGHTS, model_hash

from .digits_judge import DigitsJudge
from .machine import machine_info

FIGURES = ((20, 1.0), (20, 2.0), (50, 1.0))  # steps, guidance scale
PER_CLASS = 30
SWEEP = ("--guidance", "1,1.5,1.75,1.9,2,2.5", "--steps", "12", "--count", "2000")
METRICS = ("frechet", "accuracy", "precision", "recall")


def make(run: Path, name: str, sampler: str, trained: str, ema: float | str = "run", data: str | None = None) -> Path:
    """Write the folder of a shipped model.

    Args:
        run: a finished run.
        name: of the shipped model.
        sampler: the model's default.
        trained: the command that trained the run.
        ema: the length of the EMA of the weights; run: those of the run's pipeline.
        data: the training data, for the classifier that judges; None for digits.

    Returns:
        The folder.
    """
    out = FOLDER / name
    shutil.rmtree(out, ignore_errors=True)
    pipeline, config = out / "pipeline", read_config(RunFolder(run).config_file)
    half = ClassConditionalPipeline.from_pretrained(run, torch_dtype=torch.float16, ema=ema)
    half.use_sampler(sampler).save_pretrained(pipeline)
    elsewhere = {"output_dir": f"runs/{run.name}", "speed.precision": "auto"} | ({"data.source": name} if data else {})
    config = with_overrides(config, elsewhere)  # neither paths nor the precision of this machine
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    pipe = ClassConditionalPipeline.from_pretrained(out)  # as users load it: fp16 file, fp32 network
    weights = pipeline / "unet" / f"{WEIGHTS}.safetensors"
    weights.chmod(0o644)
    options = f"--ema {ema} " * (ema != "run") + "--data ... " * bool(data) + f"--sampler {sampler} --trained '...'"
    made = {
        "trained": trained,
        "made": f"python -m benchmarks.shipped_model runs/{run.name} {name} {options}",
        "date": date.today().isoformat(),
        "machine": machine_info(torch.device("cpu")),
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "model_hash": model_hash(pipe.unet),
        "parameters": sum(p.numel() for p in pipe.unet.parameters()),
    }
    if data:
        made |= swept(name, data)
    else:
        made |= {
            "images_judged": PER_CLASS * pipe.labels.K,
            "figures": [figures(pipe, *settings) for settings in FIGURES],
        }
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return out


def figures(pipe: ClassConditionalPipeline, steps: int, scale: float) -> dict:
    """What the judge says of images of seeds 0, 1, ... at these settings."""
    ids = [c for c in range(pipe.labels.K) for _ in range(PER_CLASS)]
    images = pipe(ids, guidance_scale=scale, num_inference_steps=steps, seeds=0, output_type="np").images
    right, contrast, spread = DigitsJudge()(images, ids)
    return {
        "steps": steps,
        "guidance": scale,
        "requested_class": round(right, 4),
        "contrast": round(contrast, 3),
        "spread": round(spread, 3),
    }


def swept(name: str, data: str) -> dict:
    """Figures of the shipped model by the classifier of `adagn sweep`, and the classifier's own accuracy."""
    out = Path("sweeps/pretrained") / name
    command = [sys.executable, "-m", "diffusion_adagn", "sweep", name, *SWEEP, "--data.source", data, "--out", out]
    subprocess.run([str(word) for word in command], check=True)
    sweep = json.loads((out / "sweep.json").read_text())
    return {
        "judged": shlex.join(["adagn", "sweep", name, *SWEEP]),
        "judge_accuracy": sweep["sweep"]["classifier"]["heldout_accuracy"],
        "images_judged": sweep["sweep"]["count"],
        "figures": [
            {
                "steps": row["steps"],
                "guidance": row["scale"],
                **{metric: round(row["metrics"][metric]["value"], 4) for metric in METRICS},
                **{k: round(row["diagnostics"][f"{k}_ratio"], 3) for k in ("saturation", "contrast")},
            }
            for row in sweep["rows"]
        ],
    }


def main() -> None:
    """Read the arguments and make the model."""
    parser = argparse.ArgumentParser("python -m benchmarks.shipped_model", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("name", help="name of the shipped model")
    parser.add_argument("--sampler", required=True, help="the model's default sampler")
    parser.add_argument("--trained", required=True, help="the command that trained the run")
    parser.add_argument("--ema", help="length of the EMA of the weights (default: the run's own EMA)", default="run")
    parser.add_argument("--data", help="training data of the classifier that judges (digits: an SVC judges)")
    args = parser.parse_args()
    ema = args.ema if args.ema == "run" else float(args.ema)
    out = make(args.run, args.name, args.sampler, shlex.join(shlex.split(args.trained)), ema, args.data)
    print(f"{out}: {json.dumps(json.loads((out / 'made.json').read_text())['figures'], indent=1)}")
    print(f"Look at it: adagn sample {args.name} --guidance 1,2")


if __name__ == "__main__":
    main()
