"""Runs the command, and turns what goes wrong into a line and a status."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from qmoe_rules.cli._commands import parser
from qmoe_rules.cli._printing import message_line, tell
from qmoe_rules.errors import QMoEError, UnsupportedNodeError

__all__ = ["run"]


def run(argv: Sequence[str] | None) -> int:
    """Runs the command and returns its exit status; see `cli.main`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names need not fit the encoding
    try:
        arguments = parser().parse_args(argv)
        with _logging(), _interrupting_on_sigterm():
            status: int = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UnsupportedNodeError as error:
        return _fail(error, 1)
    except QMoEError as error:
        return _fail(error, 2)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}", 2)
    except KeyboardInterrupt as interrupt:  # a command may say what it leaves behind
        return _fail(str(interrupt) or "interrupted; nothing was written", 130)
    except OSError as error:  # of standard output: whatever happens to files is a QMoEError
        _abandon_stdout()
        # A pipe whose reader has seen enough is no failure.
        return 0 if isinstance(error, BrokenPipeError) else _fail(error.strerror or error, 2)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Shows what the pipeline warns of, and of side files.

    The table says what the rules would log; what other libraries would log, such as onnx-ir, is
    told by our own errors.
    """
    everybody = logging.getLogger()
    told = [logging.getLogger(f"qmoe_rules.{room}") for room in ("pipeline", "side_files")]
    quiet, shown = logging.NullHandler(), logging.StreamHandler()
    shown.setFormatter(_OneLine())
    everybody.addHandler(quiet)
    for logger in told:
        logger.addHandler(shown)
    try:
        yield
    finally:
        everybody.removeHandler(quiet)
        for logger in told:
            logger.removeHandler(shown)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return message_line(record.getMessage())


def _abandon_stdout() -> None:
    """Keeps the interpreter from trying, and failing, to flush standard output at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: object, status: int) -> int:
    tell(error)
    return status


@contextlib.contextmanager
def _interrupting_on_sigterm() -> Iterator[None]:
    """Lets a request to stop clean up like Ctrl-C; only the main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
