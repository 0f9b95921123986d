"""adagn ablate"""

from collections.abc import Sequence
from pathlib import Path

from .. import recipes
from ..commands import command, shell_line, with_commands
from ..config import read_config
from ..errors import UsageError
from .options import Parser, add_config_file, add_config_options, add_device_option, config_file, config_overrides


def parser() -> Parser:
    p = Parser(
        prog="adagn ablate",
        usage="adagn ablate CONFIG [--kinds KIND,...|all] [--seeds INT,...] [--output_dir DIR] [--section.key VALUE ...]",
        description="Train the same run with several kinds of conditioning and several seeds, measure how much each uses the label, and "
        "write one table and one image. The same command resumes a stopped ablation and skips finished runs.",
    )
    add_config_file(p)
    p.add_argument("--kinds", default="all", help="kinds of conditioning, separated by commas, or all [all]")
    p.add_argument("--seeds", default="0,1", help="whole numbers, separated by commas [0,1]")
    p.add_argument("--dry_run", action="store_true", help="print the runs and their costs, and exit")
    add_device_option(p, config=True)
    add_config_options(p)
    return p


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    overrides = config_overrides(args)
    for key, option in (("model.conditioning", "--kinds"), ("training.seed", "--seeds")):
        if key in overrides:
            raise UsageError(f"an ablation sets {key} itself: use {option}.")
    try:
        seeds = [int(s) for s in args.seeds.split(",") if s.strip()]
    except ValueError:
        raise UsageError(
            f"--seeds must be whole numbers separated by commas, such as 0,1, not '{args.seeds}'."
        ) from None
    if not seeds or min(seeds) < 0:
        raise UsageError(f"--seeds needs at least one whole number, none negative, such as 0,1, not '{args.seeds}'.")
    file = config_file(args)
    if file is None:
        example = command("ablate", recipes.name_in_command("digits"), kinds="adagn,additive")
        raise UsageError(
            with_commands(f"adagn ablate needs a config. Recipes: {', '.join(recipes.names())}. For example:", example)
        )
    config = read_config(file, overrides)
    out = Path(overrides.get("output_dir") or f"runs/ablation-{Path(file).stem}")

    from ..experiments.ablation import ablate
    from ..models.conditioning import CONDITIONING

    conditionings = (
        list(CONDITIONING) if args.kinds == "all" else [k.strip() for k in args.kinds.split(",") if k.strip()]
    )
    this_command = shell_line(["adagn", "ablate", *argv])
    train_command = command("train", file, **{key: value for key, value in overrides.items() if key != "output_dir"})
    return ablate(config, conditionings, seeds, out, args.dry_run, this_command, train_command)
