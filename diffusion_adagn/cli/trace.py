"""adagn trace"""

from collections.abc import Sequence
from pathlib import Path

from ..commands import unused_path
from ..config import RunConfig, check
from ..errors import UsageError
from ..schema import apply
from .options import (
    Parser,
    add_config_options,
    add_device_option,
    add_model_options,
    config_overrides,
)


def parser() -> Parser:
    p = Parser(
        prog="adagn trace",
        usage="adagn trace RUN [--out DIR] [--label_check] [--against DATA] [--compare OTHER] [options]",
        description="Inspect the conditioning: the modulation of every site over timesteps and classes, how the output changes when "
        "it is edited, and whether the label is used. Writes report.html, its images and atlas.npz.",
    )
    add_model_options(p)
    p.add_argument(
        "--out", metavar="DIR", help="folder of the report [traces/RUN/step-STEP; if that exists, step-STEP-2, ...]"
    )
    p.add_argument(
        "--label_check",
        action="store_true",
        help="only print, in one line, whether the label is used: status 0, 3 if it is not measurably used, 4 if it cannot be "
        "decided",
    )
    p.add_argument(
        "--against",
        metavar="NAME_OR_PATH[:split]",
        help="labelled images that the model was not trained on [held-out ones of the run's own data]",
    )
    p.add_argument(
        "--compare", metavar="OTHER", help="an earlier checkpoint or another run: how far each site moved since"
    )
    p.add_argument(
        "--by",
        choices=["site", "resolution"],
        help="what the probes edit at a time [site if there are at most 60, else resolution]",
    )
    p.add_argument(
        "--timesteps", type=int, default=50, metavar="INT", help="timesteps of the atlas, evenly spaced [50]"
    )
    p.add_argument("--images", type=int, default=32, metavar="INT", help="images that the probes use [32]")
    add_device_option(p)
    add_config_options(p, sections=["data"])
    return p


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    for name in ("timesteps", "images"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    if args.label_check and args.out:
        raise UsageError("--label_check writes no files: remove --out, or for a report --label_check.")
    overrides = config_overrides(args)

    from ..runs.layout import check_model_path

    check_model_path(args.run)
    from ..runs.recorded import default_folder, recorded_data
    from ..trace.tracing import TraceRequest, trace
    from ..trace.tracing import check as check_label

    data = None
    if overrides or args.against is not None:
        config = RunConfig()
        if args.against is not None:
            overrides["data.source"] = args.against  # other data: none of the run's own data settings apply
        else:
            config.data = recorded_data(args.run) or config.data
        apply(config, overrides, where="on the command line", error=UsageError)
        check(config)
        data = config.data

    request = TraceRequest(args.timesteps, args.images, data, args.weights, args.compare, args.by, args.device)
    if args.label_check:
        return check_label(args.run, request)
    out = Path(args.out or unused_path(str(default_folder("traces", args.run, args.weights))))
    trace(args.run, out, request)
    return 0
