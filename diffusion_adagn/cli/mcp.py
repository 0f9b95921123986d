"""Give an agent tools that generate images: an MCP server over stdin and stdout, which the agent starts."""

import argparse

from ..serving.settings import ModelSettings
from .options import Parser, request
from .serving_models import add_models, check_models


def parser() -> Parser:
    p = Parser("mcp", __doc__, "RUN [RUN ...] [options]")
    add_models(p)
    p.add_options(ModelSettings, skip=["speed.compile"])  # batches differ in size
    return p


def run(args: argparse.Namespace) -> None:
    what = request(args, ModelSettings)
    check_models(args, what, "mcp")

    from ..serving.server import serve_stdio

    serve_stdio(args.runs, what)
