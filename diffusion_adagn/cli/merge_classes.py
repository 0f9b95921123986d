"""Write a pipeline folder with learned classes of depth vector in its class table; adagn export then exports them too.

Classes of depth sites and layers stay files. The null label moves from K to K + n.
"""

import argparse
from pathlib import Path

from ..errors import UsageError
from ..runs.weights import parse_ema
from ..sampling.settings import EMA_HELP
from .options import Parser


def parser() -> Parser:
    p = Parser("merge-classes", __doc__, "RUN FILE [FILE ...] --out DIR [--ema LENGTH|raw|run] [--overwrite]")
    p.add_model()
    p.add_argument("files", metavar="FILE", nargs="+", help="a learned class (adagn learn-class --depth vector)")
    p.add_out("the pipeline folder to write")
    p.add_argument("--ema", default="run", metavar="LENGTH|raw|run", help=f"{EMA_HELP} [run]")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier pipeline in DIR")
    return p


def run(args: argparse.Namespace) -> None:
    if args.out is None:
        raise UsageError("give the folder to write: --out DIR.")
    try:
        ema = parse_ema(args.ema)
    except ValueError as error:
        raise UsageError(f"--ema: {error}.") from None

    from ..runs.recorded import check_model

    check_model(args.run, None, ema, ",".join(args.files))
    from ..personal.merge import merge_classes

    merge_classes(args.run, args.files, Path(args.out), ema, args.overwrite, args.typed)
