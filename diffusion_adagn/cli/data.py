"""inspect: count the images per class, and save a labelled sheet of examples."""

import argparse
from pathlib import Path

from ..commands import with_commands
from ..config import read_config
from ..errors import UsageError
from .options import Parser, config_overrides


def parser() -> Parser:
    p = Parser("data", __doc__)
    p.add_argument("action", choices=["inspect"])
    help = "the data; or a YAML file or recipe with data settings (a data set of that name takes precedence)"
    p.add_argument("source", nargs="?", metavar="NAME_OR_PATH[:split]|CONFIG", help=help)
    p.add_argument("--config", metavar="CONFIG", help="a YAML file or a recipe")
    p.add_argument("--count", type=int, default=8, metavar="INT", help="examples per class [8]")
    p.add_out("where to save the sheet [samples/data-NAME.png]", "FILE.png")
    p.add_config_sections("data")
    return p


def run(args: argparse.Namespace) -> int | None:
    from ..data.find import is_config

    overrides = config_overrides(args)
    if args.source is not None and args.config is None and is_config(args.source):
        args.source, args.config = None, args.source
    if args.source is not None:
        overrides["data.source"] = args.source
    if not overrides and args.config is None:
        text = "a data set is required: its name or path, optionally with :split, such as:"
        raise UsageError(with_commands(text, "adagn data inspect digits"))
    if args.count < 1:
        raise UsageError(f"--count must be at least 1, not {args.count}.")
    if args.out and Path(args.out).suffix.lower() != ".png":
        raise UsageError(f"--out {args.out}: the sheet is a PNG image; give a name that ends in .png.")
    config = read_config(args.config, overrides).data

    from ..data.inspect import inspect_dataset, train_command

    name = "".join(c if c.isalnum() else "-" for c in config.source.rstrip("/").split("/")[-1])
    sheet = Path(args.out or f"samples/data-{name}.png")
    print(inspect_dataset(config, sheet, args.count, train_command(config, args.config, overrides)))
