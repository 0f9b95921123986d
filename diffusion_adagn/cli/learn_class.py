"""Learn a new class of a model from 1 to 200 images. The network does not change: the class is one file, which --classes takes.

Minutes on a CPU. With --depth vector a few kB; what is learned applies to images of the new class only.
"""

import argparse
from pathlib import Path

from ..errors import UsageError
from ..personal.settings import LearnRequest
from .options import Parser, request


def parser() -> Parser:
    p = Parser(
        "learn-class", __doc__, "RUN --images FOLDER --name NAME [--depth DEPTH] [--from CLASS] [--out FILE] [options]"
    )
    p.add_model()
    p.add_options(LearnRequest)
    p.add_out("the file [classes/NAME.safetensors]; previews go to the folder NAME-previews beside it", "FILE")
    return p


def run(args: argparse.Namespace) -> None:
    missing = [name for name in ("images", "name") if not hasattr(args, name)]
    if missing:
        raise UsageError(f"give --{missing[0]}: adagn learn-class RUN --images FOLDER --name NAME.")
    what = request(args, LearnRequest)

    from ..runs.recorded import check_model

    check_model(args.run, None, what.ema, None)
    from ..personal.learn import learn_class

    default = Path("classes", f"{'-'.join(what.name.replace('/', '-').split())}.safetensors")
    learn_class(args.run, what, Path(args.out or default), args.typed)
