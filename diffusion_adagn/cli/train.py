"""adagn train"""

from collections.abc import Sequence
from pathlib import Path

from ..config import read_config, to_yaml
from ..errors import UsageError
from ..run import RunFolder
from .options import Parser, add_config_options, add_device_option, config_overrides


def parser() -> Parser:
    p = Parser(
        prog="adagn train",
        usage="adagn train --config FILE [--output_dir RUN] [--resume auto] [--section.key VALUE ...]",
        description="Train a class-conditional diffusion model. Settings come from --config and from dotted options, which win.",
    )
    p.add_argument("--config", metavar="FILE", help="a YAML file, such as configs/digits.yaml")
    p.add_argument(
        "--resume",
        choices=["auto"],
        help="auto: go on from the newest checkpoint in --output_dir, or start if there is none",
    )
    p.add_argument(
        "--dry_run", action="store_true", help="print the resolved config, parameters, FLOPs, memory, epochs, and stop"
    )
    add_device_option(p, config=True)
    add_config_options(p)
    return p


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    overrides = config_overrides(args)
    file = args.config
    if file is None and args.resume and overrides.get("output_dir"):
        recorded = RunFolder(Path(overrides["output_dir"])).config_file
        file = recorded if recorded.is_file() else None
    if file is None and not overrides:
        raise UsageError(
            "adagn train needs --config FILE (such as configs/digits.yaml), or settings. See adagn train --help."
        )
    config = read_config(file, overrides)

    from ..training.loop import describe, resolve, train

    if args.dry_run:
        config, dataset = resolve(config)
        told = describe(config, dataset)
        print(to_yaml(config), told, sep="\n")
        return 0
    return train(config, resume=args.resume is not None)
