"""Find the class of images: the one under which the model denoises them best. No other classifier is needed.

With labelled images (the default: those held out of the run's own data) it prints the accuracy, which says how well the
model knows its classes. Writes classify.json and classify.png.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ..errors import UsageError
from ..experiments.settings import ClassifyRequest
from .options import Parser, config_overrides, labelled_data, request


def parser() -> Parser:
    p = Parser("classify", __doc__, "RUN [--images PATH | --against DATA] [--out DIR] [options]")
    p.add_model()
    p.add_out("the output folder [classify/RUN/step-STEP; if that exists, step-STEP-2, ...]")
    p.add_labelled_data()
    p.add_options(ClassifyRequest)
    p.add_config_sections("data")
    return p


def run(args: argparse.Namespace) -> None:
    what = request(args, ClassifyRequest)
    if what.images is not None and (config_overrides(args) or args.against is not None):
        raise UsageError(
            "--images are of unknown class: give either --images or labelled ones by --against and --data.*."
        )

    from ..runs.recorded import check_model

    check_model(args.run, None, what.ema, None)
    what = replace(what, data=labelled_data(args))

    from ..experiments.classify import classify_images

    classify_images(args.run, what, None if args.out is None else Path(args.out))
