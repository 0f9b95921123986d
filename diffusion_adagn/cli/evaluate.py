"""adagn evaluate"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..commands import command, shell_line, with_commands
from ..errors import UsageError
from .options import (
    Parser,
    add_config_options,
    add_guidance_options,
    add_measure_options,
    add_sampler_options,
    config_overrides,
    guidance_scales,
    number,
)

# options that mean something for a model alone
SAMPLING = (
    "w", "interval", "guidance_schedule", "rescale", "threshold", "guide", "sampler", "steps", "eta", "spacing", "classes", "count",
    "seed", "weights", "precision", "keep",
)  # fmt: skip


def parser() -> Parser:
    p = Parser(
        prog="adagn evaluate",
        usage="adagn evaluate RUN [--count 1000] [--guidance 2] [--against DATA] [options]\n"
        "       adagn evaluate IMAGES --against DATA_OR_IMAGES_OR_REFERENCE.npz [options]\n"
        "       adagn evaluate reference DATA --out FILE.npz [options]",
        description="Measure the images of a model, or existing images, against real ones: distances, precision and recall, "
        "class accuracy, the real images nearest to a sampled one. reference: save the features of real images in a file.",
    )
    p.add_argument(
        "what",
        metavar="RUN_OR_PICTURES",
        help="a run, a checkpoint, a pipeline folder or owner/name on the hub; a folder of adagn sample, of images or of class "
        "folders; an .npz of the ADM evaluator; a data set, NAME_OR_PATH:split; or the word reference",
    )
    p.add_argument("real", nargs="?", metavar="DATA", help="after reference: the data or images")
    add_guidance_options(p)
    p.add_argument(
        "--weights", choices=["ema", "raw"], default="ema", help="raw: the unaveraged weights of a checkpoint [ema]"
    )
    add_sampler_options(p)
    p.add_argument("--classes", help="names, ids or 'all', with commas between [all]")
    p.add_argument("--count", type=int, default=1000, metavar="INT", help="images, over all classes together [1000]")
    p.add_argument("--seed", type=int, default=0, metavar="INT", help="image i starts from the noise of seed + i [0]")
    add_measure_options(p)
    p.add_argument(
        "--neighbours",
        type=int,
        default=8,
        metavar="INT",
        help="rows of the sheet of real images that lie nearest to sampled ones; 0: do not look for them [8]",
    )
    p.add_argument("--keep", action="store_true", help="save the sampled images as samples.npz, for the ADM evaluator")
    p.add_argument(
        "--out", metavar="DIR", help="where the numbers go [evaluations/RUN/step-STEP]; of reference: FILE.npz"
    )
    p.add_argument("--overwrite", action="store_true", help="replace the evaluation in DIR, or FILE.npz")
    add_config_options(p, sections=["data"])
    return p


def run(argv: Sequence[str]) -> int:
    p = parser()
    args = p.parse(argv)
    for name in ("count", "steps", "batch_size", "reference_count", "k"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    for name in ("seed", "neighbours"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} must be at least 0, not {getattr(args, name)}.")
    if args.extractor == "none":
        raise UsageError(
            "without an extractor there is nothing to evaluate; adagn sweep --extractor none gives the looks alone."
        )
    if args.what == "reference":
        return _reference(p, args, argv)
    if args.real is not None:
        raise UsageError(
            f"adagn evaluate takes one model or one set of images; '{args.real}' is one too many: type --against {args.real}."
        )
    scales = guidance_scales(args)
    if len(scales) > 1:
        raise UsageError("--guidance takes one scale here; adagn sweep measures several, side by side.")
    return _model(args, argv, scales[0]) if _is_model(args.what) else _images(p, args, argv)


def _is_model(what: str) -> bool:
    """Whether it is a model rather than images; of a path that is not there, whether it looks like one on the hub."""
    from ..evaluation.image_set import is_data

    path = Path(what).expanduser()
    if path.suffix == ".npz" or path.is_file() or is_data(what):
        return False
    marks = ("config.yaml", "state.json", "model_index.json", "pipeline/model_index.json")
    return not path.is_dir() or any((path / mark).is_file() for mark in marks)


def _model(args: argparse.Namespace, argv: Sequence[str], scale: float) -> int:
    rescale, threshold = number(args.rescale, "--rescale"), number(args.threshold, "--threshold", none=True)

    from ..runs.layout import check_model_path

    check_model_path(args.what)
    if args.guide is not None:
        check_model_path(args.guide)
    from ..runs.recorded import check_classes, default_folder

    check_classes(args.what, args.weights, args.classes)
    from ..evaluation.evaluate import Sampling, evaluate_model

    sampling = Sampling(
        scale=scale,
        interval=args.interval,
        schedule=args.guidance_schedule,
        rescale=rescale,
        threshold=threshold,
        guide=args.guide,
        sampler=args.sampler,
        steps=args.steps,
        eta=args.eta,
        spacing=args.spacing,
        classes=args.classes,
        count=args.count,
        seed=args.seed,
        precision=args.precision,
        weights=args.weights,
    )
    out = Path(args.out or default_folder("evaluations", args.what, args.weights))
    evaluate_model(args.what, sampling, _request(args, argv), out)
    return 0


def _images(p: Parser, args: argparse.Namespace, argv: Sequence[str]) -> int:
    _reject(p, args, SAMPLING, "is an option of sampling a model, and these images exist already")
    guidance = None if args.guidance is None else guidance_scales(args)[0]

    from ..evaluation.evaluate import evaluate_images
    from ..evaluation.image_set import is_data
    from ..runs.recorded import run_name_parts

    path = Path(args.what).expanduser()
    if not path.exists() and not is_data(args.what):
        raise UsageError(f"there is no file {path}.")
    if guidance is not None and is_data(args.what):
        raise UsageError("--guidance chooses among the scales of adagn sample's folders: leave it out.")
    name = (
        [path.resolve().stem.replace(":", "-")]
        if is_data(args.what)
        else run_name_parts(path.resolve().with_suffix(""))
    )
    evaluate_images(args.what, guidance, _request(args, argv), Path(args.out or Path("evaluations", *name)))
    return 0


def _reference(p: Parser, args: argparse.Namespace, argv: Sequence[str]) -> int:
    _reject(p, args, ("guidance", *SAMPLING, "against", "neighbours"), "has no meaning for adagn evaluate reference")
    if args.real is None or args.out is None:
        example = command("evaluate", "reference", "digits", out="references/digits.npz")
        raise UsageError(with_commands("which data, and which file of --out (.npz)? Such as:", example))

    from ..evaluation.evaluate import store_reference

    args.against = args.real
    store_reference(_request(args, argv), Path(args.out))
    return 0


def _reject(p: Parser, args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(args, name) != p.get_default(name):
            raise UsageError(f"--{name} {why}: leave it out.")


def _request(args: argparse.Namespace, argv: Sequence[str]):
    from ..evaluation.evaluate import EvaluateRequest

    return EvaluateRequest(
        against=args.against,
        data=config_overrides(args),
        extractor=args.extractor,
        classifier=args.classifier == "auto",
        reference_count=args.reference_count,
        k=args.k,
        batch_size=args.batch_size,
        device=args.device,
        neighbours=args.neighbours,
        keep=args.keep,
        overwrite=args.overwrite,
        command=shell_line(["adagn", "evaluate", *argv]),
    )
