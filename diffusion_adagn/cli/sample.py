"""adagn sample"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..commands import shell_line
from ..errors import UsageError
from .options import (
    Parser,
    add_guidance_options,
    add_model_options,
    add_sampler_options,
    add_speed_options,
    guidance_scales,
    number,
    speed_of,
)


def parser() -> Parser:
    p = Parser(
        prog="adagn sample",
        description="Sample images by class label, from a run folder, a pipeline folder or a hub id.",
    )
    add_model_options(p)
    p.add_argument("--classes", help="names, ids, 'all' or 'null', with commas between [all; none beside --mix]")
    p.add_argument(
        "--mix",
        action="append",
        default=[],
        metavar="PARTS",
        help='one image of several classes, such as "cat@coarse,dog@fine": rules CLASS@WHERE separated by commas; later '
        "ones override, and a class without @ is the default. WHERE: coarse or fine (sites of a resolution at most, or "
        "above, the geometric middle of the network's), a resolution (8, 8x8, <=8, >8), depth<10, down, middle, up, a "
        "pattern of site names (up.*.stages.0*), a timestep (t>600), or several joined by &. May be given again: each is "
        "a row, below those of --classes, and every row starts from the same noises",
    )
    p.add_argument(
        "--interpolate",
        metavar="CLASS,CLASS",
        help="from one class to another in place of --classes, a column a step; a row starts from one noise",
    )
    p.add_argument("--steps_between", type=int, metavar="INT", help="columns between the two of --interpolate [7]")
    p.add_argument("--count", type=int, default=8, metavar="INT", help="images per class and scale [8]")
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="INT",
        help="image i (class-major) starts from the noise of seed + i; with --mix and --interpolate image j of each "
        "class from that of seed + j [0]",
    )
    add_sampler_options(p)
    p.add_argument(
        "--batch_size",
        type=_batch_size,
        default=64,
        metavar="INT|auto",
        help="images per batch; auto: as many as fit in memory [64]",
    )
    add_speed_options(p).add_argument(
        "--graph", action="store_true", help="CUDA only: the network's calls as CUDA graphs; for small batches [no]"
    )
    add_guidance_options(p)
    p.add_argument(
        "--out", metavar="DIR", help="where the images go [samples/RUN/step-STEP; if that exists, step-STEP-2, ...]"
    )
    p.add_argument("--npz", action="store_true", help="also as samples.npz, which OpenAI's ADM evaluator reads")
    p.add_argument("--overwrite", action="store_true", help="replace the samples in DIR")
    return p


def _batch_size(text: str) -> int | None:
    if text.strip().lower() == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number or auto is expected, not {text!r}") from None


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    scales = guidance_scales(args)
    if args.interpolate is not None and (args.mix or args.classes is not None):
        raise UsageError("--interpolate names its two classes itself: leave out --classes and --mix, or sample twice.")
    if args.interpolate is None and args.steps_between is not None:
        raise UsageError("--steps_between belongs to --interpolate, such as --interpolate cat,dog --steps_between 7.")
    if args.steps_between is not None and args.steps_between < 0:
        raise UsageError(f"--steps_between must be at least 0, not {args.steps_between}.")
    for name in ("count", "steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    if args.seed < 0:
        raise UsageError(f"--seed must be at least 0, not {args.seed}.")

    rescale, threshold = number(args.rescale, "--rescale"), number(args.threshold, "--threshold", none=True)

    from ..runs.layout import check_model_path

    check_model_path(args.run)
    if args.guide is not None:
        check_model_path(args.guide)
    from ..runs.recorded import check_classes

    check_classes(args.run, args.weights, args.interpolate or args.classes, args.mix)
    from ..sampling.generate import SampleRequest, sample_to_folder
    from ..sampling.guidance import Guidance

    request = SampleRequest(
        classes=args.classes,
        scales=scales,
        guidance=Guidance(1.0, args.interval, args.guidance_schedule, rescale, threshold),
        guide=args.guide,
        count=args.count,
        seed=args.seed,
        steps=args.steps,
        sampler=args.sampler,
        eta=args.eta,
        spacing=args.spacing,
        batch_size=args.batch_size,
        speed=speed_of(args),
        graph=args.graph,
        mixes=tuple(args.mix),
        interpolate=args.interpolate,
        steps_between=7 if args.steps_between is None else args.steps_between,
        npz=args.npz,
    )
    out = None if args.out is None else Path(args.out)
    typed = shell_line(["adagn", "sample", *argv])
    sample_to_folder(args.run, request, out, weights=args.weights, overwrite=args.overwrite, command=typed)
    return 0
