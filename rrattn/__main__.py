"""The command `rrattn`, also `python -m rrattn`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import _HAS_PADDLE, calibrate, check, info, visualize_model

if _HAS_PADDLE:
    import paddle

_OF_A_MODEL = {
    "calibrate": (calibrate, "find a threshold for each head or layer of a model, for a bound on lost attention mass"),
    "visualize": (visualize_model, "draw the blocks that a model selects for a document"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, by default that of the command line, and returns its exit status."""
    parser = argparse.ArgumentParser(prog="rrattn", description="What there is of rrattn here, and what it does.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction sets and GPUs, as a report of a problem should have them")
    commands.add_parser("check", help="test the kernels of this machine against NumPy, which takes seconds")
    parsers = {}
    for name, (module, summary) in _OF_A_MODEL.items():
        parsers[name] = commands.add_parser(
            name,
            help=summary,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parsers[name])
    given = parser.parse_args(arguments)
    if given.command == "info":
        print(*info.lines(), sep="\n")
        return 0
    if given.command == "check":
        return check.run()
    of_command, (module, _) = parsers[given.command], _OF_A_MODEL[given.command]
    if not _HAS_PADDLE:
        of_command.error("needs Paddle, which is not installed (pip install paddlepaddle)")
    module.check_arguments(of_command, given)
    paddle.base.core.set_num_threads(os.cpu_count() or 1)  # or Paddle's own products run on one core
    status: int = module.run(given)
    return status


if __name__ == "__main__":
    sys.exit(main())
