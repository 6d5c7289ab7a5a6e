"""The command `rrattn`, also `python -m rrattn`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import check, info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, by default that of the command line, and returns its exit status."""
    parser = argparse.ArgumentParser(prog="rrattn", description="What there is of rrattn here, and whether it works.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction sets and GPUs, as a report of a problem should have them")
    commands.add_parser("check", help="test the kernels of this machine against NumPy, which takes seconds")
    if parser.parse_args(arguments).command == "info":
        print(*info.lines(), sep="\n")
        return 0
    return check.run()


if __name__ == "__main__":
    sys.exit(main())
