"""Check this installation: versions, device, precision, the fused operator's self-check, memory, caches.

The exit status is 1 if there is a problem; its remedy is printed.
"""

import argparse

from ..config import SpeedConfig
from .options import Parser, request


def parser() -> Parser:
    p = Parser("doctor", __doc__)
    p.add_options(SpeedConfig, skip=["precision", "memory_format", "operator", "compile"])
    return p


def run(args: argparse.Namespace) -> int:
    device = request(args, SpeedConfig).device

    from ..runtime.doctor import examine

    problems = examine(device)
    for problem in problems:
        print(f"problem   {problem}")
    if not problems:
        print("no problems found")
    return 1 if problems else 0
