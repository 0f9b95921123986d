"""Train a class-conditional diffusion model. Settings come from CONFIG and from dotted options, which take precedence."""

import argparse

from .. import recipes
from ..commands import command, with_commands
from ..config import read_config
from ..errors import UsageError
from ..runs.recorded import resumed_config
from .options import Parser, config_file, config_overrides


def parser() -> Parser:
    p = Parser("train", __doc__, "CONFIG [--output_dir RUN] [--resume [RUN]] [--section.key VALUE ...]")
    help = "resume this run, or with auto the one in --output_dir, from its newest checkpoint; with --config a run that does not "
    help += "exist is started. Of the settings that change the result, --training.lr alone may be changed"
    p.add_argument("--resume", nargs="?", const="auto", metavar="RUN", help=help)
    help = "print the cost of the run (two steps are measured): time, memory, epochs, images per class, and stop"
    p.add_argument("--dry_run", action="store_true", help=help)
    p.add_argument("--verbose", action="store_true", help="--dry_run prints every setting too, as YAML")
    p.add_config()
    return p


def run(args: argparse.Namespace) -> int | None:
    overrides, file = config_overrides(args), config_file(args)
    if args.resume is not None:
        config = resumed_config(args.resume, file, overrides)
    elif file is None and not overrides:
        text = "what should be trained? Give a config, as an argument or as --config FILE, or settings. Recipes: "
        text += f"{', '.join(recipes.names())}. Train one:"
        raise UsageError(with_commands(text, command("train", recipes.name_in_command("digits"))))
    else:
        config = read_config(file, overrides)

    if args.dry_run:
        from ..training.dry_run import dry_run

        dry_run(config, args.verbose)
        return 0

    from ..training.train import train

    return train(config, resume=args.resume is not None)
