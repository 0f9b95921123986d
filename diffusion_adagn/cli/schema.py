"""Print the JSON schema of a run's config or of a command's settings, for editors and programs."""

import argparse
import importlib

from .options import Parser

SCHEMAS = {
    "run": ("..config", "RunConfig"),
    "sample": ("..sampling.settings", "SampleRequest"),
    "evaluate": ("..evaluation.settings", "EvaluateRequest"),
    "sweep": ("..experiments.settings", "SweepRequest"),
    "ema": ("..experiments.settings", "EmaRequest"),
    "trace": ("..trace.settings", "TraceRequest"),
    "serve": ("..serving.settings", "ServeRequest"),
}


def parser() -> Parser:
    p = Parser("schema", __doc__)
    p.add_argument("of", nargs="?", default="run", choices=list(SCHEMAS), metavar="|".join(SCHEMAS), help="[run]")
    return p


def run(args: argparse.Namespace) -> None:
    from ..schema import json_schema

    module, name = SCHEMAS[args.of]
    print(json_schema(getattr(importlib.import_module(module, __package__), name)))
