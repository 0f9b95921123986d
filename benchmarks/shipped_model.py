"""Make a model that ships with the package from a finished run.

Writes diffusion_adagn/pretrained/NAME: the run's config, its pipeline in half precision, and made.json, which has the
commands, the hash of the weights, the machine, the date and figures of a judge that knows nothing of the model. To make
digits again (a few minutes):

    adagn train digits --diffusion.process flow --diffusion.schedule linear --training.max_steps 800 \\
        --training.preview_every 0 --training.diagnostics_every 0 --output_dir runs/digits_flow
    python -m benchmarks.shipped_model runs/digits_flow digits --sampler dpm++ --trained "adagn train digits ..."
"""

import argparse
import hashlib
import json
import shlex
import shutil
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


def make(run: Path, name: str, sampler: str, trained: str) -> Path:
    """Write the folder of a shipped model.

    Args:
        run: a finished run.
        name: of the shipped model.
        sampler: the model's default.
        trained: the command that trained the run.

    Returns:
        The folder.
    """
    out = FOLDER / name
    shutil.rmtree(out, ignore_errors=True)
    pipeline, config = out / "pipeline", read_config(RunFolder(run).config_file)
    half = ClassConditionalPipeline.from_pretrained(run, torch_dtype=torch.float16)
    half.use_sampler(sampler).save_pretrained(pipeline)
    config = with_overrides(config, {"output_dir": f"runs/{run.name}"})  # not where it lay on this machine
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    pipe = ClassConditionalPipeline.from_pretrained(out)  # as users load it: fp16 file, fp32 network
    weights = pipeline / "unet" / f"{WEIGHTS}.safetensors"
    weights.chmod(0o644)
    made = {
        "trained": trained,
        "made": f"python -m benchmarks.shipped_model runs/{run.name} {name} --sampler {sampler} --trained '...'",
        "date": date.today().isoformat(),
        "machine": machine_info(torch.device("cpu")),
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "model_hash": model_hash(pipe.unet),
        "parameters": sum(p.numel() for p in pipe.unet.parameters()),
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


def main() -> None:
    """Read the arguments and make the model."""
    parser = argparse.ArgumentParser("python -m benchmarks.shipped_model", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("name", help="name of the shipped model")
    parser.add_argument("--sampler", required=True, help="the model's default sampler")
    parser.add_argument("--trained", required=True, help="the command that trained the run")
    args = parser.parse_args()
    out = make(args.run, args.name, args.sampler, shlex.join(shlex.split(args.trained)))
    print(f"{out}: {json.dumps(json.loads((out / 'made.json').read_text())['figures'], indent=1)}")
    print(f"Look at it: adagn sample {args.name} --guidance 1,2")


if __name__ == "__main__":
    main()
