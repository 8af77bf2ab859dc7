"""`Parser`: argparse whose errors are one line, with what may have been meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from qmoe_rules.cli._printing import message_line

__all__ = ["Parser"]

_CHOICE = re.compile(r"invalid choice: '?([^']*?)'? \(choose from (.*)\)$")


class Parser(argparse.ArgumentParser):
    """A parser that tells what is wrong, and not how everything is used."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses, and refuses what is unknown: a command knows its options, the whole does not."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = (word.partition("=")[0] for word in unknown if word.startswith("-"))
            meant = _close(next(options, ""), self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2 and one line."""
        if (choice := _CHOICE.search(message)) is not None:
            message += _close(choice[1], re.findall(r"[\w-]+", choice[2]))
        self.exit(2, f"{message_line(f'{message} (see {self.prog} --help)')}\n")


def _close(word: str, known: Iterable[str]) -> str:
    """Returns a question where a word is nearly one that is known."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
