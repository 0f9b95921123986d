"""What `adagn serve` and `adagn mcp` have in common: the models, and the extra that they need."""

import argparse
import importlib.util

from ..errors import InputError, UsageError
from ..serving.settings import ModelSettings
from .options import Parser

REQUIRED = ("fastapi", "uvicorn", "mcp", "prometheus_client")


def add_models(p: Parser) -> None:
    """The arguments RUN ..."""
    help = "runs, checkpoints, pipeline folders, owner/name on the hub, or digits or cifar10, models that ship with the package"
    p.add_argument("runs", metavar="RUN", nargs="+", help=help)


def check_models(args: argparse.Namespace, settings: ModelSettings, command: str) -> None:
    """Raises InputError if a model or a learned class does not exist, or the extra is not installed, before torch is imported."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        text = f"adagn {command} needs {', '.join(missing)}, which the extra serve installs:"
        raise InputError(f"{text}\n  pip install 'diffusion-adagn[serve]'")
    from ..runs.class_file import read_record
    from ..runs.recorded import check_model

    for run in args.runs:
        if not run.strip():
            raise UsageError(
                "a model has no name: expected a run, such as runs/digits, or digits or cifar10, which ship with the package."
            )
        check_model(run, None, settings.ema, None)
    for file in settings.learned:
        read_record(file)
