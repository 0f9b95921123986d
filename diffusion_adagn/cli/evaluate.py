"""Measure the images of a model, or existing images, against real ones.

Distances, precision and recall, class accuracy, the real images nearest to a sampled one. reference: save the features of real
images in a file.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ..commands import command, with_commands
from ..errors import UsageError
from ..evaluation.settings import EvaluateRequest
from ..schema import fields_of
from .options import Parser, config_overrides, option_names, read_weights, request

# settings that apply to a model only
SAMPLING = {s.key for s in fields_of(EvaluateRequest) if s.key.startswith("sampler.")} | {
    "w", "classes", "count", "seed", "ema", "guide_ema", "precision", "keep",
}  # fmt: skip
USAGE = """\
RUN [--count 1000] [--guidance 2] [--against DATA] [options]
IMAGES --against DATA_OR_IMAGES_OR_REFERENCE.npz [options]
reference DATA --out FILE.npz [options]"""


def parser() -> Parser:
    p = Parser("evaluate", __doc__, USAGE)
    help = "a run, a checkpoint, a pipeline folder or owner/name on the hub; a folder of adagn sample, of images or of class "
    help += "folders; an .npz of the ADM evaluator; a data set, NAME_OR_PATH:split; or the word reference"
    p.add_argument("what", metavar="RUN_OR_IMAGES", help=help)
    p.add_argument("real", nargs="?", metavar="DATA", help="after reference: the data or images")
    p.add_options(EvaluateRequest, skip=["sampler.guidance.scale"])
    p.add_out("where the numbers go [evaluations/RUN/step-STEP]; of reference: FILE.npz")
    p.add_config_sections("data")
    return p


def run(args: argparse.Namespace) -> None:
    given = {"data": config_overrides(args), "command": args.typed}
    what = request(args, EvaluateRequest, given)
    from ..evaluation.image_set import is_model

    if args.what == "reference":
        _reference(args, what)
    elif args.real is not None:
        text = f"adagn evaluate takes one model or one set of images; '{args.real}' is one too many"
        raise UsageError(f"{text}: type --against {args.real}.")
    elif is_model(args.what):
        read_weights(args, "what")
        _model(args, request(args, EvaluateRequest, given))
    else:
        _images(args, what)


def _model(args: argparse.Namespace, what: EvaluateRequest) -> None:
    from ..runs.recorded import check_model, default_folder

    check_model(args.what, what.sampler.guide, what.ema, what.classes)
    from ..evaluation.evaluate import evaluate_model

    evaluate_model(args.what, what, Path(args.out or default_folder("evaluations", args.what, what.ema)))


def _images(args: argparse.Namespace, what: EvaluateRequest) -> None:
    _reject(args, SAMPLING, "is an option of sampling a model, and these images exist already")

    from ..evaluation.evaluate import evaluate_images
    from ..evaluation.image_set import is_data
    from ..runs.recorded import run_name_parts

    path, data = Path(args.what).expanduser(), is_data(args.what)
    if not path.exists() and not data:
        raise UsageError(f"there is no file {path}.")
    if what.scale is not None and data:
        raise UsageError("--guidance chooses among the scales of adagn sample's folders: leave it out.")
    name = [path.resolve().stem.replace(":", "-")] if data else run_name_parts(path.resolve().with_suffix(""))
    evaluate_images(args.what, what, Path(args.out or Path("evaluations", *name)))


def _reference(args: argparse.Namespace, what: EvaluateRequest) -> None:
    _reject(args, SAMPLING | {"scales", "against", "neighbours"}, "has no meaning for adagn evaluate reference")
    if args.real is None or args.out is None:
        example = command("evaluate", "reference", "digits", out="references/digits.npz")
        raise UsageError(with_commands("which data, and which file of --out (.npz)? Such as:", example))

    from ..evaluation.evaluate import store_reference

    store_reference(replace(what, against=args.real), Path(args.out))


def _reject(args: argparse.Namespace, keys: set[str], why: str) -> None:
    for key, option in option_names(EvaluateRequest).items():
        if key in keys and hasattr(args, key):
            raise UsageError(f"{option} {why}: leave it out.")
