"""The `qmoe` command: argument parsing and printing, nothing else.

Exit status: 0 done, 1 a check failed, 2 bad input or usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qmoe_rules.cli._later import import_later

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        argv: The arguments; those of the process where it is left out.
    """
    try:
        import_later()  # before anything imports onnx-ir

        from qmoe_rules.cli._running import run
    except KeyboardInterrupt:  # within the half second that this takes
        sys.stderr.write("qmoe: interrupted; nothing was written\n")
        return 130
    return run(argv)


def parser() -> argparse.ArgumentParser:
    """Returns what reads the arguments, for documents made of it."""
    from qmoe_rules.cli import _commands

    return _commands.parser()
