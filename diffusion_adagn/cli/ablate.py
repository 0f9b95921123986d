"""Train the same run with several kinds of conditioning and several seeds, and measure how much each uses the label.

Writes one table and one image. The same command resumes a stopped ablation and skips finished runs.
"""

import argparse
from pathlib import Path

from .. import recipes
from ..commands import command, with_commands
from ..config import read_config
from ..errors import UsageError
from ..experiments.settings import AblateRequest
from ..sampling.settings import split_words
from .options import Parser, config_file, config_overrides, request


def parser() -> Parser:
    usage = "CONFIG [--kinds KIND,...|all] [--seeds INT,...] [--output_dir DIR] [--section.key VALUE ...]"
    p = Parser("ablate", __doc__, usage)
    p.add_options(AblateRequest)
    p.add_config()
    folder = next(action for action in p._actions if action.dest == "output_dir")
    folder.help = "The folder of all members [runs/ablation-NAME]"
    return p


def run(args: argparse.Namespace) -> int | None:
    overrides, what, file = config_overrides(args), request(args, AblateRequest), config_file(args)
    for key, option in (("model.conditioning", "--kinds"), ("training.seed", "--seeds")):
        if key in overrides:
            raise UsageError(f"an ablation sets {key} itself: use {option}.")
    if file is None:
        example = command("ablate", recipes.name_in_command("digits"), kinds="adagn,additive")
        text = f"adagn ablate needs a config. Recipes: {', '.join(recipes.names())}. For example:"
        raise UsageError(with_commands(text, example))
    config = read_config(file, overrides)
    out = Path(overrides.get("output_dir") or f"runs/ablation-{Path(file).stem}")

    from ..experiments.ablation import ablate
    from ..models.conditioning import CONDITIONING

    conditionings = list(CONDITIONING) if what.kinds == "all" else split_words(what.kinds, "--kinds")
    train_command = command("train", file, **{key: value for key, value in overrides.items() if key != "output_dir"})
    return ablate(config, conditionings, list(what.seeds), out, what.dry_run, args.typed, train_command)
