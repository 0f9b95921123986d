"""Golden numbers: what training, sampling, the atlas and a sweep compute, for comparing two checkouts or two machines.

python tests/golden.py --against OLD_CHECKOUT    both trees on this machine, one thread, compared bit for bit
python tests/golden.py --record                  write tests/golden.npz, which the suite compares (tests/test_golden.py)
python tests/golden.py --write FILE              the numbers of the tree that is imported

Numbers only, no report text. A checkout is compared by its own tests/golden.py, so that names may change between the two; the keys
of the numbers may not.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import unittest.mock
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECORD = HERE / "golden.npz"
WHOLE = 16  # numbers of an array that the record holds as they are, images aside; of larger ones it holds a summary

DIGITS = {
    "data.source": "digits", "model.model_channels": "16", "model.channel_mult": "1,2", "model.num_res_blocks": "1",
    "model.attention_resolutions": "4", "model.num_head_channels": "16", "model.norm_groups": "4",
    "diffusion.schedule": "cosine", "training.batch_size": "32", "training.lr": "2e-3", "training.warmup_steps": "2",
    "training.ema_decay": "0.9", "training.log_every": "1", "training.preview_every": "0", "training.signals_every": "0",
    "speed.precision": "fp32", "training.max_steps": "12",
}  # fmt: skip
RUNS = {
    "digits": {},
    "variant": {
        "model.dropout": "0.2", "diffusion.learned_variance": "true", "model.modulate_both_norms": "true",
        "diffusion.prediction": "v", "training.gradient_accumulation": "2", "data.flip": "true", "training.max_steps": "6",
    },
}  # fmt: skip
SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc", "euler", "heun")
SWEEP = ["--guidance", "1,3", "--steps", "4", "--count", "40", "--extractor", "sklearn", "--judge", "none"]
LATER = {"sigmas"}  # of a sweep's row: numbers that older versions do not write
TIMES = {"seconds", "images_per_s", "data_wait", "date", "versions"}  # of a sweep's row: not computed from the model


def compute(folder: Path) -> dict:
    """The golden numbers of the package that is imported.

    Args:
        folder: an empty folder for runs and sweeps.

    Returns:
        Arrays by key, "run/digits/losses", "images/ddim" and the like: losses float64 [steps]; weights float32; images uint8
        [N, H, W, C]; atlas values; numbers of a sweep's rows float64.
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file

    import diffusion_adagn
    from diffusion_adagn import Atlas, ClassConditionalPipeline, Guidance, read_config, train
    from diffusion_adagn.cli.main import main
    from diffusion_adagn.experiments import sweep

    tree = Path(os.environ.get("GOLDEN_TREE", str(HERE.parent))).resolve()
    if Path(diffusion_adagn.__file__).resolve().parent.parent != tree:
        raise RuntimeError(f"{diffusion_adagn.__file__} was imported, and is not of {tree}")
    torch.set_num_threads(1)
    numbers = {}
    for name, changes in RUNS.items():
        out = folder / name
        assert train(read_config(None, DIGITS | changes | {"output_dir": str(out)})) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        numbers[f"run/{name}/losses"] = np.array([line["loss"] for line in lines if "loss" in line])
        newest = sorted((out / "checkpoints").glob("step-*"))[-1]
        for file in ("model", "ema"):
            weights = load_file(newest / f"{file}.safetensors")
            numbers |= {f"run/{name}/{file}/{key}": tensor.numpy() for key, tensor in weights.items()}

    def sample(pipe, **settings):
        pipe.set_progress_bar_config(disable=True)
        images = pipe(["3", "7", "null"], seeds=[0, 1, 2], num_inference_steps=6, output_type="np", **settings).images
        return (images * 255).round().astype("uint8")

    pipe = ClassConditionalPipeline.from_pretrained(str(folder / "digits"))
    for sampler in SAMPLERS:
        pipe.use_sampler(sampler)
        numbers[f"images/{sampler}"] = sample(pipe, guidance_scale=[2.0, 1.0, 3.0])
    pipe.use_sampler("ddim")
    numbers["images/unguided"] = sample(pipe)
    shaped = Guidance(3.0, interval="0.2-0.8", schedule="cosine", rescale=0.5, threshold=0.9)
    numbers["images/guidance"] = sample(pipe, guidance=shaped)
    numbers["images/eta"] = sample(pipe, eta=1.0)
    variant = ClassConditionalPipeline.from_pretrained(str(folder / "variant"))
    numbers["images/variance"] = sample(variant.use_sampler("ddpm"), guidance_scale=2.0)
    for name, one in (("digits", pipe), ("variant", variant)):
        atlas = Atlas.of(one.unet, one.labels, timesteps=3)
        with np.load(atlas.save(folder / f"{name}.npz"), allow_pickle=False) as arrays:
            numbers |= {f"atlas/{name}/{key}": arrays[key] for key in arrays.files if arrays[key].dtype.kind == "f"}

    # plots would take longer than all the rest
    with unittest.mock.patch.object(sweep, "write_report", _measured), contextlib.suppress(_Measured):
        main(["sweep", str(folder / "digits"), "--out", str(folder / "sweep"), "--debug", *SWEEP])
    for file in sorted((folder / "sweep" / "points").glob("*/row.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        numbers |= {f"sweep/{file.parent.name}/{key}": np.array(v) for key, v in _leaves(row)}
    return numbers


class _Measured(Exception):
    """All points of the sweep are measured."""


def _measured(*_):
    raise _Measured


def _leaves(value, key: str = ""):
    """(key, number) of every number in nested dicts and lists of a row."""
    if isinstance(value, dict):
        for k, v in value.items():
            if k not in TIMES | LATER:
                yield from _leaves(v, f"{key}/{k}" if key else k)
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _leaves(v, f"{key}/{i}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, float(value)


def machine() -> dict:
    """What decides the last bit: processor, compiler, and the versions of the libraries that compute."""
    import numpy
    import scipy
    import sklearn
    import torch

    from diffusion_adagn.ops.cpu import compiler

    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = sorted({line for line in cpuinfo if line.startswith(("flags", "model", "cpu family", "Features"))})
    except OSError:
        cpu = [platform.processor(), platform.machine()]
    try:
        version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    except RuntimeError:
        version = "none"
    versions = {library.__name__: library.__version__ for library in (numpy, scipy, sklearn, torch)}
    own = {name: os.environ.get(name, "") for name in ("OPENBLAS_CORETYPE", "MKL_CBWR", "ATEN_CPU_CAPABILITY")}
    return versions | own | {"cpu": hashlib.sha256("\n".join([*cpu, version]).encode()).hexdigest()[:16]}


def reduced(array):
    """What the record holds of an array: the array, or of a large one its mean, its root mean square and a few of its values."""
    import numpy as np

    if array.size <= WHOLE or array.dtype == np.uint8:
        return array
    flat = array.astype(np.float64).ravel()
    return np.array([flat.mean(), np.sqrt(np.square(flat).mean()), *flat[:: flat.size // (WHOLE - 2)][: WHOLE - 2]])


def recorded() -> tuple[dict, dict]:
    """The record: what is known about it (machine, digests), and its arrays by key, flat, as `reduced` gives them."""
    import numpy as np

    with np.load(RECORD, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))
        ends = np.cumsum(list(about["sizes"].values()))
        return about, dict(zip(about["sizes"], np.split(arrays["values"], ends[:-1])))


def digest(array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="OLD_CHECKOUT", type=Path)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--write", metavar="FILE", type=Path)
    args = parser.parse_args()
    if args.against is not None:
        return compare(args.against)
    if not (args.record or args.write):
        parser.error("give --against, --record or --write")
    sys.path.insert(0, os.environ.get("GOLDEN_TREE", str(HERE.parent)))
    import numpy as np

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        os.environ["DIFFUSION_ADAGN_CACHE"] = str(Path(folder) / "cache")
        numbers = compute(Path(folder))
    if args.write:
        np.savez(args.write, **numbers)
    if args.record:
        parts = {key: reduced(array) for key, array in numbers.items()}
        about = {
            "machine": machine(),
            "digests": {key: digest(array) for key, array in numbers.items()},
            "sizes": {key: part.size for key, part in parts.items()},
        }
        values = np.concatenate([part.ravel() for part in parts.values()]).astype(np.float32)
        np.savez_compressed(RECORD, about=np.array(json.dumps(about)), values=values)
        print(f"{len(numbers)} arrays in {RECORD}")
    return 0


def compare(old: Path) -> int:
    """Run both trees and compare bit for bit. Returns 0 if all is equal, 1 if not."""
    import numpy as np

    new, old = HERE.parent, old.resolve()
    if not (old / "diffusion_adagn").is_dir():
        sys.exit(f"golden.py: {old} is no checkout: expected a folder with diffusion_adagn/ in it.")
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for tree in (old, new):
            script = tree / "tests" / "golden.py"  # of its own names; a tree from before this file takes this one
            file = Path(folder) / f"{len(found)}.npz"
            env = os.environ | {
                "GOLDEN_TREE": str(tree), "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            }  # fmt: skip
            script = script if script.is_file() else Path(__file__)
            print(f"computing {tree} ...", flush=True)
            subprocess.run([sys.executable, str(script), "--write", str(file)], env=env, cwd=folder, check=True)
            with np.load(file, allow_pickle=False) as arrays:
                found.append({key: arrays[key] for key in arrays.files})
    before, after = found
    faults = [f"{key}: only in {old}" for key in before.keys() - after.keys()]
    faults += [f"{key}: only in {new}" for key in after.keys() - before.keys()]
    for key in sorted(before.keys() & after.keys()):
        a, b = before[key], after[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            faults.append(f"{key}: {a.dtype} {list(a.shape)} -> {b.dtype} {list(b.shape)}")
        elif a.tobytes() != b.tobytes():
            apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
            faults.append(f"{key}: {(apart > 0).sum()} of {a.size} numbers differ, by at most {apart.max():g}")
    print("\n".join(faults) or f"{len(after)} arrays, equal bit for bit")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
