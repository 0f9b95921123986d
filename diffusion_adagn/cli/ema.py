"""Compare EMA lengths by the loss on held-out images: a table, a curve as PNG, and the command that samples the best one."""

import argparse
from pathlib import Path

from ..experiments.settings import EmaRequest
from .options import Parser, request


def parser() -> Parser:
    p = Parser("ema", __doc__, "RUN [--lengths 0.02:0.2:0.02] [options]")
    p.add_argument("run", metavar="RUN", help="a run folder (runs/digits) or one of its checkpoints")
    p.add_options(EmaRequest)
    p.add_out("where the curve and the numbers go [ema/RUN/step-STEP; if that exists, step-STEP-2, ...]")
    return p


def run(args: argparse.Namespace) -> None:
    what = request(args, EmaRequest)

    from ..runs.layout import check_model_path

    check_model_path(args.run)
    from ..experiments.ema_lengths import compare_lengths

    compare_lengths(args.run, what, None if args.out is None else Path(args.out))
