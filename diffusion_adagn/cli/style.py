"""Show what class vectors can do: principal directions of the classes, truncation towards the mean class, and sums of classes.

Writes a sheet of images for each, and style.json with the directions and where each class lies.
"""

import argparse
from pathlib import Path

from ..experiments.settings import StyleRequest
from .options import Parser, request

USAGE = """\
RUN [--direction 1,2,3] [--columns 7] [options]
RUN --psi 0 --psi 0.5 --psi 1 [options]
RUN --style "cat - dog + truck" [options]"""


def parser() -> Parser:
    p = Parser("style", __doc__, USAGE)
    p.add_model()
    p.add_out(
        "the output folder [styles/RUN/step-STEP; if that exists, step-STEP-2, ...]; sheets of the same name are replaced"
    )
    p.add_options(StyleRequest, skip=["sampler.guide", "sampler.guidance.scale"])
    return p


def run(args: argparse.Namespace) -> None:
    what = request(args, StyleRequest)

    from ..runs.recorded import check_model

    check_model(args.run, None, what.ema, what.classes)
    from ..experiments.style import show_styles

    show_styles(args.run, what, None if args.out is None else Path(args.out))
