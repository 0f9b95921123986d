"""Compare sampler settings: sample the same classes and noise at every combination, measure each, and report the best.

The report has curves and image grids. The same command resumes a stopped sweep; settings may be added later.
"""

import argparse
from pathlib import Path

from ..experiments.settings import AXES, SweepRequest, parse_axes
from ..sampling.settings import SamplerSettings
from .options import RUN_HELP, Parser, config_overrides, option_names, request


def parser() -> Parser:
    usage = """\
RUN ... --guidance 1:4:0.5 [--interval none,sigma:0.3-5] [--steps 10,25] [--count 1000] [options]
RUN --guidance 1:3:0.5 --interval auto --budget 30m [options]
RUN --guidance 1:3:0.5 --guide runs/small@*,runs/small:0.2 --ema 0.02:0.2:0.03 [options]"""
    p = Parser("sweep", __doc__, usage)
    help = f"{RUN_HELP}; RUN@* is every checkpoint; several are compared"
    p.add_argument("runs", metavar="RUN", nargs="+", help=help)
    p.add_options(SamplerSettings, several=True, defaults={"steps": SweepRequest.sampler.steps})
    p.add_options(SweepRequest, skip=["sampler"])
    p.add_out("folder of the report [sweeps/RUN/step-STEP]")
    p.add_config_sections("data")
    return p


def run(args: argparse.Namespace) -> int | None:
    texts = {key: getattr(args, key) for key in AXES if hasattr(args, key)}
    given = {"axes": parse_axes(texts, option_names(SamplerSettings)), "data": config_overrides(args)}
    what = request(args, SweepRequest, given)

    from ..experiments.points import grid_of
    from ..runs.recorded import check_model, default_folder

    grid = grid_of(args.runs, what.with_intervals(()))
    found = [settings.guidance.negative for settings in grid.samplers]
    negatives = [negative.text for negative in found if negative.is_class]
    for weights in grid.models:
        check_model(weights.path, None, weights.ema, what.classes, negatives=negatives)
        for guide in grid.guides_of(weights):
            check_model(guide.path, None, guide.ema, None)
    from ..experiments.sweep import sweep

    first = grid.models[0]
    out = default_folder("sweeps", first.run if grid.varied else first.path, "run" if grid.varied else first.ema)
    sweep(args.runs, what, Path(args.out or f"{out}{'-weights' if grid.varied else ''}"), args.typed)
