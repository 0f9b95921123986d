"""A tiny run on digits, in this process or in others, and what it wrote."""

import json
import os
import sys
from pathlib import Path

import torch
from conftest import ROOT
from safetensors.torch import load_file

from diffusion_adagn.cli.main import main

TINY = {
    "model.model_channels": 16, "model.channel_mult": "1,2", "model.num_res_blocks": 1, "model.attention_resolutions": 4,
    "model.num_head_channels": 16, "model.norm_groups": 4, "diffusion.schedule": "cosine",
    "training.batch_size": 16, "training.lr": 1e-3, "training.log_every": 1, "training.preview_every": 0,
}  # fmt: skip


def words(settings):
    return [f"--{k}={v}" for k, v in settings.items()]


def arguments(out, *extra, **changes):
    settings = TINY | {"training.max_steps": 6} | {k.replace("__", "."): v for k, v in changes.items()}
    return ["train", "--output_dir", str(out), *words(settings), *extra]


def run(out, *extra, **changes):
    """adagn train in this process; the exit status."""
    return main([*arguments(out, *extra, **changes), "--debug"])


def losses(out):
    return {
        line["step"]: line["loss"]
        for line in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    }


def signals(out):
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "rms_gamma" in line]


def weights(out, which="model"):
    newest = sorted((Path(out) / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / f"{which}.safetensors")


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    for which in ("model", "ema", "optimizer", "power_ema"):
        one, other = weights(a, which), weights(b, which)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one), which
    assert snapshots(a) == snapshots(b)


def snapshots(out):
    """The bytes of each EMA snapshot."""
    return {file.name: file.read_bytes() for file in (Path(out) / "ema").iterdir()}


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def launch(out, *extra, processes=1, **changes):
    command = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    )
    return [*command, str(ROOT / "train.py"), *arguments(out, *extra, **changes)[1:]]
