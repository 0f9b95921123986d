"""Find the class of images: the one under which the model denoises them best. No other classifier is needed.

With labelled images (the default: those held out of the run's own data) it prints the accuracy, which says how well the
model knows its classes. Writes classify.json and classify.png.
"""

import argparse
from pathlib import Path

from ..config import DataConfig, RunConfig, with_overrides
from ..errors import UsageError
from ..experiments.settings import ClassifyRequest
from .options import Parser, config_overrides, request


def parser() -> Parser:
    p = Parser("classify", __doc__, "RUN [--images PATH | --against DATA] [--out DIR] [options]")
    p.add_model()
    p.add_out("the output folder [classify/RUN/step-STEP; if that exists, step-STEP-2, ...]")
    help = "labelled images that the model was not trained on [held-out ones of the run's own data]"
    p.add_argument("--against", metavar="NAME_OR_PATH[:split]", help=help)
    p.add_options(ClassifyRequest)
    p.add_config_sections("data")
    return p


def run(args: argparse.Namespace) -> None:
    what, overrides = request(args, ClassifyRequest), config_overrides(args)
    if what.images is not None and (overrides or args.against is not None):
        raise UsageError(
            "--images are of unknown class: give either --images or labelled ones by --against and --data.*."
        )

    from ..runs.recorded import check_model, recorded_data

    check_model(args.run, None, what.ema, None)
    if overrides or args.against is not None:
        recorded = None if args.against is not None else recorded_data(args.run)
        overrides |= {} if args.against is None else {"data.source": args.against}
        what = request(
            args, ClassifyRequest, {"data": with_overrides(RunConfig(data=recorded or DataConfig()), overrides).data}
        )

    from ..experiments.classify import classify_images

    classify_images(args.run, what, None if args.out is None else Path(args.out))
