"""Sample images by class label, from a run folder, a pipeline folder or a hub id."""

import argparse
from pathlib import Path

from ..sampling.settings import SampleRequest
from .options import Parser, request


def parser() -> Parser:
    p = Parser("sample", __doc__)
    p.add_model()
    p.add_options(SampleRequest, skip=["sampler.guidance.scale"])
    p.add_out("where the images go [samples/RUN/step-STEP; if that exists, step-STEP-2, ...]")
    return p


def run(args: argparse.Namespace) -> None:
    what = request(args, SampleRequest)

    from ..runs.recorded import check_model

    check_model(args.run, what.sampler.guide, what.ema, what.interpolate or what.classes, what.mixes)
    from ..sampling.generate import sample_to_folder

    sample_to_folder(args.run, what, None if args.out is None else Path(args.out), args.typed)
