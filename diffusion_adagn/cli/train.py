"""adagn train"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from .. import recipes
from ..commands import command, resume_command, with_commands
from ..config import RunConfig, read_config
from ..errors import InputError, UsageError
from ..runs.layout import RunFolder, similar_runs
from .options import Parser, add_config_file, add_config_options, add_device_option, config_file, config_overrides


def parser() -> Parser:
    p = Parser(
        prog="adagn train",
        usage="adagn train CONFIG [--output_dir RUN] [--resume [RUN]] [--section.key VALUE ...]",
        description="Train a class-conditional diffusion model. Settings come from CONFIG and from dotted options, which win.",
    )
    add_config_file(p)
    p.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="RUN",
        help="resume this run, or with auto the one in --output_dir, from its newest checkpoint; with --config a run that is not there "
        "is started. Of the settings that change the result, --training.lr alone may be changed",
    )
    p.add_argument(
        "--dry_run",
        action="store_true",
        help="print what the run takes (two steps are measured): time, memory, epochs, images per class, and stop",
    )
    p.add_argument("--verbose", action="store_true", help="--dry_run prints every setting too, as YAML")
    add_device_option(p, config=True)
    add_config_options(p)
    return p


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    overrides = config_overrides(args)
    file = config_file(args)
    if args.resume is not None:
        config = _resumed_config(args.resume, file, overrides)
    elif file is None and not overrides:
        raise UsageError(
            with_commands(
                "what should be trained? Give a config, as an argument or as --config FILE, or settings. Recipes: "
                f"{', '.join(recipes.names())}. Train one:",
                command("train", recipes.name_in_command("digits")),
            )
        )
    else:
        config = read_config(file, overrides)

    if args.dry_run:
        from ..training.dry_run import dry_run

        dry_run(config, args.verbose)
        return 0

    from ..training.train import train

    return train(config, resume=args.resume is not None)


def _resumed_config(resume: str, file: str | None, overrides: dict[str, str]) -> RunConfig:
    """The settings of the run that --resume means: those of the config file if one is given, else the recorded ones; and the overrides.

    Raises InputError if there is no run, and no config file to start one.
    """
    if resume != "auto" and Path(overrides.setdefault("output_dir", resume)) != Path(resume):
        raise UsageError(f"--resume {resume} and --output_dir {overrides['output_dir']} name two runs: give one.")
    config = read_config(file, overrides)
    if config.output_dir is None:
        raise UsageError(f"which run? Give --resume RUN, such as --resume runs/digits.{similar_runs('runs/digits')}")
    run = RunFolder(Path(config.output_dir))
    if not run.config_file.is_file():
        if file is not None:
            return config  # the run starts
        whole = next((p for p in list(run.path.parents)[:2] if RunFolder(p).config_file.is_file()), None)
        if whole is not None:
            text = f"{run.path} is a part of the run {whole}, and a run is resumed from its newest checkpoint:"
            raise InputError(with_commands(text, resume_command(whole)))
        raise InputError(
            f"there is no run to resume in {run.path} (no config.yaml in it).{similar_runs(run.path)} To start a run, give --config."
        )
    if file is None:
        return read_config(run.config_file, overrides)
    lr = read_config(run.config_file).training.lr
    if "training.lr" not in overrides and config.training.lr != lr:
        # it may have been changed while the run was resumed: the same command must go on with the run, not change it back
        print(f"training.lr is {lr:g}, as recorded in {run.config_file} (not {config.training.lr:g} of {file})")
        config.training = dataclasses.replace(config.training, lr=lr)
    return config
