"""adagn doctor"""

from collections.abc import Sequence

from .options import Parser, add_device_option


def parser() -> Parser:
    p = Parser(
        prog="adagn doctor",
        description="Check this installation: versions, device, precision, the fused operator's self-check, memory, caches. Status 1 if "
        "there is a problem, with its remedy.",
    )
    add_device_option(p)
    return p


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)

    from ..runtime.doctor import examine

    problems = examine(args.device)
    for problem in problems:
        print(f"problem   {problem}")
    if not problems:
        print("no problems found")
    return 1 if problems else 0
