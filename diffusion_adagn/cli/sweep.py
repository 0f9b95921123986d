"""Compare sampler settings: sample the same classes and noise at every combination, measure each, and report the best.

The report has curves and image grids. The same command resumes a stopped sweep; settings may be added later.
"""

import argparse
from pathlib import Path

from ..experiments.settings import AXES, SweepRequest, parse_axes
from ..sampling.settings import SamplerSettings
from .options import Parser, config_overrides, option_names, request


def parser() -> Parser:
    usage = "RUN --guidance 1:4:0.5 [--interval none,t:200-800] [--steps 10,25] [--count 1000] [options]"
    p = Parser("sweep", __doc__, usage)
    p.add_model()
    p.add_options(SamplerSettings, several=True, defaults={"steps": SweepRequest.sampler.steps})
    p.add_options(SweepRequest, skip=["sampler"])
    p.add_out("folder of the report [sweeps/RUN/step-STEP]")
    p.add_config_sections("data")
    return p


def run(args: argparse.Namespace) -> int | None:
    texts = {key: getattr(args, key) for key in AXES if hasattr(args, key)}
    given = {"axes": parse_axes(texts, option_names(SamplerSettings)), "data": config_overrides(args)}
    given["sampler"] = SweepRequest.sampler.with_values({"guide": getattr(args, "guide", None)})
    what = request(args, SweepRequest, given)

    from ..runs.recorded import check_model, default_folder

    check_model(args.run, what.sampler.guide, what.weights, what.classes)
    from ..experiments.sweep import sweep

    out = Path(args.out or default_folder("sweeps", args.run, what.weights))
    sweep(args.run, what, out, args.typed)
