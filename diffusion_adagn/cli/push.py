"""Upload a model to the Hugging Face hub, with a card that shows an image and what adagn evaluate measured."""

import argparse

from ..commands import command, with_commands
from ..errors import InputError, UsageError
from ..runs.weights import parse_ema
from ..sampling.settings import EMA_HELP
from .options import Parser


def parser() -> Parser:
    p = Parser("push", __doc__, "RUN OWNER/NAME [--evaluation FOLDER] [--private]")
    p.add_model()
    p.add_argument("repo", metavar="OWNER/NAME", help="the repository; made if it is not there")
    p.add_argument("--ema", default="run", metavar="LENGTH|raw|run", help=f"{EMA_HELP} [run]")
    help = "folder of adagn evaluate for these weights: its numbers are shown in the card"
    p.add_argument("--evaluation", metavar="DIR", help=help)
    p.add_argument("--image", metavar="FILE.png", help="an image for the card [the run's newest preview]")
    p.add_argument("--license", metavar="NAME", help="such as mit or cc-by-4.0 [none is named]")
    p.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    p.add_argument("--create_pr", action="store_true", help="open a pull request instead of a commit")
    return p


def run(args: argparse.Namespace) -> int | None:
    try:
        ema = parse_ema(args.ema)
    except ValueError as error:
        raise UsageError(f"--ema: {error}.") from None
    if args.repo.count("/") != 1 or not all(args.repo.split("/")):
        raise UsageError(f"expected OWNER/NAME for the repository, got '{args.repo}'.")

    from ..runs.layout import check_model_path

    check_model_path(args.run)
    from huggingface_hub.errors import HfHubHTTPError

    from ..interop.hub import push

    try:
        address = push(
            args.run, args.repo, ema=ema, evaluation=args.evaluation, image=args.image, license=args.license,
            private=args.private, create_pr=args.create_pr,
        )  # fmt: skip
    except (HfHubHTTPError, OSError) as error:
        text = f"the hub cannot be reached or rejects the upload ({' '.join(str(error).split())[:300]}). Log in with"
        raise InputError(with_commands(f"{text} `hf auth login`, and repeat the command.")) from None
    print(with_commands(f"{address}\nSample it anywhere:", command("sample", args.repo, classes="all")))
