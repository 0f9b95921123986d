"""adagn train"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..config import RunConfig, read_config, to_yaml
from ..errors import InputError, UsageError
from ..run import RunFolder, runs_near
from .options import Parser, add_config_options, config_overrides


def parser() -> Parser:
    p = Parser(
        prog="adagn train",
        usage="adagn train --config FILE [--output_dir RUN] [--resume [RUN]] [--section.key VALUE ...]",
        description="Train a class-conditional diffusion model. Settings come from --config and from dotted options, which win.",
    )
    p.add_argument("--config", metavar="FILE", help="a YAML file, such as configs/digits.yaml")
    p.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="RUN",
        help="resume this run, or with auto the one in --output_dir, from its newest checkpoint; with --config a run that is not there "
        "is started. Of the settings that change the result, --training.lr alone may be changed",
    )
    p.add_argument(
        "--dry_run", action="store_true", help="print the resolved config, parameters, FLOPs, memory, epochs, and stop"
    )
    add_config_options(p)
    return p


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    overrides = config_overrides(args)
    if args.resume is not None:
        config = _resumed_config(args, overrides)
    elif args.config is None and not overrides:
        raise UsageError(
            "adagn train needs --config FILE (such as configs/digits.yaml), or settings. See adagn train --help."
        )
    else:
        config = read_config(args.config, overrides)

    from ..training.loop import describe, resolve, train

    if args.dry_run:
        config, dataset = resolve(config)
        told = describe(config, dataset)
        print(to_yaml(config), told, sep="\n")
        return 0
    return train(config, resume=args.resume is not None)


def _resumed_config(args: argparse.Namespace, overrides: dict[str, str]) -> RunConfig:
    """The settings of the run that --resume means: the recorded ones unless --config is given, and the overrides.

    Raises InputError if there is no run, and no --config to start one.
    """
    if args.resume != "auto" and Path(overrides.setdefault("output_dir", args.resume)) != Path(args.resume):
        raise UsageError(f"--resume {args.resume} and --output_dir {overrides['output_dir']} name two runs: give one.")
    config = read_config(args.config, overrides)
    if config.output_dir is None:
        raise UsageError(f"which run? Give --resume RUN, such as --resume runs/digits.{runs_near('runs/x')}")
    recorded = RunFolder(Path(config.output_dir)).config_file
    if not recorded.is_file():
        if args.config is not None:
            return config  # the run starts
        if (Path(config.output_dir) / "state.json").is_file():
            run = Path(config.output_dir).parent.parent
            raise InputError(
                f"{config.output_dir} is a checkpoint. A run is resumed from its newest one: --resume {run}."
            )
        raise InputError(
            f"there is no run to resume in {config.output_dir} (no config.yaml in it).{runs_near(config.output_dir)} "
            "To start a run, give --config."
        )
    if args.config is None:
        return read_config(recorded, overrides)
    lr = read_config(recorded).training.lr
    if "training.lr" not in overrides and config.training.lr != lr:
        # it may have been changed while the run was resumed: the same command must go on with the run, not change it back
        print(f"training.lr is {lr:g}, as recorded in {recorded} (not {config.training.lr:g} of {args.config})")
        config.training = dataclasses.replace(config.training, lr=lr)
    return config
