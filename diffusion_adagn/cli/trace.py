"""Inspect the conditioning, and whether the label is used.

Shows the modulation of every site over noise levels and classes, and how the output changes when it is edited. Writes report.html,
its images and atlas.npz.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ..commands import unused_path
from ..errors import UsageError
from ..trace.settings import TraceRequest
from .options import Parser, labelled_data, request


def parser() -> Parser:
    p = Parser("trace", __doc__, "RUN [--out DIR] [--label_check] [--against DATA] [--compare OTHER] [options]")
    p.add_model()
    p.add_out("folder of the report [traces/RUN/step-STEP; if that exists, step-STEP-2, ...]")
    help = "only print, in one line, whether the label is used: status 0, 3 if it is not measurably used, 4 if it cannot be decided"
    p.add_argument("--label_check", action="store_true", help=help)
    p.add_labelled_data()
    p.add_options(TraceRequest)
    p.add_config_sections("data")
    return p


def run(args: argparse.Namespace) -> int:
    if args.label_check and args.out:
        raise UsageError("--label_check writes no files: remove --out, or for a report --label_check.")
    if args.label_check and hasattr(args, "compare"):
        print("note: --compare has no effect with --label_check")
    what = request(args, TraceRequest)

    from ..runs.recorded import check_model, default_folder

    check_model(args.run, None, what.ema, what.classes)
    what = replace(what, data=labelled_data(args))

    from ..trace.tracing import check, trace

    if args.label_check:
        return check(args.run, what)
    trace(args.run, Path(args.out or unused_path(str(default_folder("traces", args.run, what.ema)))), what)
    return 0
