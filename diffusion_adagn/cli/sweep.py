"""adagn sweep"""

from collections.abc import Sequence
from pathlib import Path

from ..commands import shell_line
from ..config import SPACINGS
from ..errors import UsageError
from .options import (
    SAMPLERS,
    Parser,
    add_config_options,
    add_guidance_options,
    add_measure_options,
    add_model_options,
    config_overrides,
    guidance_scales,
    numbers,
    split_words,
    unknown_choice,
)


def parser() -> Parser:
    p = Parser(
        prog="adagn sweep",
        usage="adagn sweep RUN --guidance 1:4:0.5 [--interval none,t:200-800] [--steps 10,25] [--count 1000] [options]",
        description="Sample the same classes and noise at every combination of these settings, measure each, and report the best "
        "settings by each metric, with curves and image grids. The same command resumes a stopped sweep; settings may be added later.",
    )
    add_model_options(p)
    add_guidance_options(p, several=True)
    p.add_argument("--sampler", default="own", metavar="NAME,...", help=f"{', '.join(SAMPLERS)} [the model's own]")
    p.add_argument("--steps", "--num_inference_steps", default="25", metavar="INT,...", help="sampler steps [25]")
    p.add_argument("--eta", default="0", metavar="NUMBER,...", help="ddim's noise: 0 none, 1 as in ddpm [0]")
    p.add_argument(
        "--spacing",
        choices=SPACINGS,
        help="timestep spacing; karras, exponential and lu (the same) need dpm++, unipc, euler or heun [the model's own]",
    )
    p.add_argument("--classes", help="names or ids, separated by commas, or 'all' [all]")
    p.add_argument("--count", type=int, default=1000, metavar="INT", help="images per point, over all classes [1000]")
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="INT",
        help="image i starts from the noise of seed + i at every point [0]",
    )
    p.add_argument("--confirm", action="store_true", help="measure the best settings again with fresh seeds")
    p.add_argument(
        "--keep",
        action="store_true",
        help="save each new point's images in its folder, as samples.npz in the ADM evaluator's format",
    )
    add_measure_options(p)
    p.add_argument("--out", metavar="DIR", help="folder of the report [sweeps/RUN/step-STEP]")
    add_config_options(p, sections=["data"])
    return p


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    for name in ("count", "batch_size", "reference_count", "k"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    if args.seed < 0:
        raise UsageError(f"--seed must be at least 0, not {args.seed}.")
    settings = {
        "scales": guidance_scales(args),
        "intervals": split_words(args.interval, "--interval"),
        "schedules": split_words(args.guidance_schedule, "--guidance_schedule"),
        "rescales": numbers(args.rescale, "--rescale"),
        "thresholds": [
            None if w == "none" else numbers(w, "--threshold")[0] for w in split_words(args.threshold, "--threshold")
        ],
        "samplers": [None if w == "own" else w for w in split_words(args.sampler, "--sampler")],
        "steps": numbers(args.steps, "--steps", int),
        "etas": numbers(args.eta, "--eta"),
    }
    for sampler in settings["samplers"]:
        if sampler not in (None, *SAMPLERS):
            raise UsageError(f"--sampler: {unknown_choice(sampler, SAMPLERS)}.")

    from ..runs.layout import check_model_path

    check_model_path(args.run)
    if args.guide is not None:
        check_model_path(args.guide)
    from ..runs.recorded import check_classes, default_folder

    check_classes(args.run, args.weights, args.classes)
    from ..experiments.sweep import EvalConfig, SweepRequest, sweep

    eval_config = EvalConfig(
        args.against, config_overrides(args), args.extractor, args.classifier == "auto", args.reference_count, args.k
    )
    request = SweepRequest(
        **settings,
        spacing=args.spacing,
        guide=args.guide,
        classes=args.classes,
        count=args.count,
        seed=args.seed,
        batch_size=args.batch_size,
        precision=args.precision,
        device=args.device,
        weights=args.weights,
        eval_config=eval_config,
        save_images=args.keep,
        confirm=args.confirm,
    )
    out = Path(args.out or default_folder("sweeps", args.run, args.weights))
    sweep(args.run, request, out, command=shell_line(["adagn", "sweep", *argv]))
    return 0
