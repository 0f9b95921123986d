"""Serve models to others: an HTTP API, tools for agents (MCP) and a page for a browser, in one process."""

import argparse
import os

from ..serving.listening import listen
from ..serving.settings import ServeRequest
from .options import Parser, request
from .serving_models import add_models, check_models

TOKEN = "ADAGN_TOKEN"  # in the environment


def parser() -> Parser:
    p = Parser("serve", __doc__, "RUN [RUN ...] [--host 127.0.0.1] [--port 7860] [options]")
    add_models(p)
    p.add_options(ServeRequest, skip=["speed.compile"])  # batches differ in size
    return p


def run(args: argparse.Namespace) -> None:
    token = os.environ.get(TOKEN)
    given = {} if token is None or hasattr(args, "token") else {"token": token}
    what = request(args, ServeRequest, given, dict.fromkeys(given, TOKEN))
    check_models(args, what, "serve")
    with listen(what) as listening:
        from ..serving.server import serve

        serve(args.runs, what, listening)
