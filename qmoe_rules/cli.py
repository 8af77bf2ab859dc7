"""The `qmoe` command: argument parsing and printing, nothing else.

Exit status: 0 done, 1 a check failed, 2 bad input or usage.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, NoReturn, cast

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qmoe_rules.errors import QMoEError, UnsupportedNodeError
from qmoe_rules.formats import FORMATS
from qmoe_rules.inspection import NodeSummary, inspect
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.pipeline import plan, quantize
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, Report, Row, human_bytes
from qmoe_rules.targets import TARGETS

__all__ = ["main"]

_PIPE_WIDTH = 1000  # columns of a table that no terminal limits


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        argv: The arguments; those of the process where it is left out.
    """
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names need not fit the encoding
    try:
        with _logging(), _interrupting_on_sigterm():
            status: int = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UnsupportedNodeError as error:
        return _fail(error, 1)
    except QMoEError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 130)
    except OSError as error:  # of standard output: whatever happens to files is a QMoEError
        _abandon_stdout()
        # A pipe whose reader has seen enough is no failure.
        return 0 if isinstance(error, BrokenPipeError) else _fail(error.strerror or error, 2)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Shows what the pipeline warns of; the table says what the rules would log."""
    package, pipeline = logging.getLogger("qmoe_rules"), logging.getLogger("qmoe_rules.pipeline")
    quiet, shown = logging.NullHandler(), logging.StreamHandler()
    shown.setFormatter(logging.Formatter("qmoe: %(message)s"))
    package.addHandler(quiet)
    pipeline.addHandler(shown)
    try:
        yield
    finally:
        package.removeHandler(quiet)
        pipeline.removeHandler(shown)


def _abandon_stdout() -> None:
    """Keeps the interpreter from trying, and failing, to flush standard output at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: object, status: int) -> int:
    line = " ".join(str(error).split())
    sys.stderr.write(f"qmoe: {line}\n")
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qmoe",
        description="Quantize the experts of Mixture-of-Experts ONNX models.",
        epilog="exit status: 0 done, 1 a check failed, 2 bad input or usage",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('qmoe-rules')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_command(commands, "plan", _plan, "say what quantize would do; computes nothing")
    command = _add_command(commands, "quantize", _quantize, "write a model with quantized experts")
    command.add_argument("destination", metavar="OUT", help="an .onnx file, or a folder")
    command.add_argument(
        "--workers", type=positive_number, metavar="N", help="threads (default: all)"
    )
    for name in ("plan", "quantize"):
        _add_recipe_options(commands.choices[name])
    _add_command(commands, "inspect", _inspect, "list a model's MoE and QMoE nodes")
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("model", metavar="MODEL", help="an .onnx file, or a folder that holds one")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    return command


def _add_recipe_options(command: argparse.ArgumentParser) -> None:
    default = Recipe()
    # A layout that no target reads is refused with the reason, and not offered.
    layouts = [name for name in LAYOUTS if not all(t.refuse_layout(name) for t in TARGETS.values())]
    options = command.add_argument_group("recipe")
    options.add_argument(
        "--bits",
        type=int,
        default=default.bits,
        metavar="{" + ",".join(str(format.bits) for format in FORMATS.values()) + "}",
        help="width of a code (default: %(default)s)",
    )
    options.add_argument(
        "--block-size",
        type=int,
        default=default.block_size,
        metavar="B",
        help="columns per scale, a power of two from 16; 0 for the whole row (default)",
    )
    for name, choices, text in (
        ("method", METHODS, "how codes are chosen"),
        ("layout", layouts, "order of the stored bytes"),
        ("target", TARGETS, "where the model must run right"),
    ):
        options.add_argument(
            f"--{name}",
            default=getattr(default, name),
            metavar="{" + ",".join(choices) + "}",
            help=f"{text} (default: %(default)s)",
        )
    options.add_argument(
        "--exclude",
        dest="nodes_to_exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave these nodes in float: a name, an fnmatch pattern or re:REGEX; repeatable",
    )
    options.add_argument(
        "--override",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATTERN:FIELD=VALUE,...",
        help="other settings for some nodes; repeatable, the first match wins",
    )
    command.add_argument(
        "--fail-if-skipped",
        action="store_true",
        help="exit 1, and write nothing, if a MoE is skipped (excluded ones too) or none is found",
    )


def positive_number(text: str) -> int:
    """Returns the number that a text spells."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _recipe(arguments: argparse.Namespace) -> Recipe:
    names = (field.name for field in dataclasses.fields(Recipe))
    return Recipe.of(**{name: getattr(arguments, name) for name in names})


def _plan(arguments: argparse.Namespace) -> int:
    report = plan(arguments.model, _recipe(arguments))
    _print_report(report, arguments.json)
    if arguments.fail_if_skipped:
        report.raise_if_skipped()
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    with _progress_bar() as bar:
        task = bar.add_task("writing", total=None) if bar else None

        def advance(done: int, total: int) -> None:
            if bar is not None and task is not None:
                bar.update(task, completed=done, total=total)

        report = quantize(
            arguments.model,
            arguments.destination,
            _recipe(arguments),
            workers=arguments.workers,
            progress=advance,
            strict=arguments.fail_if_skipped,
        )
    _print_report(report, arguments.json)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    summaries = inspect(arguments.model)
    if arguments.json:
        _print_json([dataclasses.asdict(summary) for summary in summaries])
        return 0
    _print(
        _inspection_table(summaries) if summaries else "no com.microsoft::MoE or QMoE node found"
    )
    return 0


def _progress_bar() -> AbstractContextManager[Progress | None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        return nullcontext()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def _print(*things: Table | str) -> None:
    """Prints tables and plain text; rich renders, but leaves errors of the output to us."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(
        file=io.StringIO(),
        width=shutil.get_terminal_size().columns if terminal else _PIPE_WIDTH,
        force_terminal=terminal,
        highlight=False,
    )
    for thing in things:
        console.print(thing, markup=False, emoji=False)
    _write(cast(io.StringIO, console.file).getvalue())


def _write(text: str) -> None:
    if sys.stdout is not None:  # it is None where the process was started without one
        sys.stdout.write(text)


def _print_json(data: object) -> None:
    _write(json.dumps(data, indent=2) + "\n")


def _print_report(report: Report, as_json: bool) -> None:
    if as_json:
        _print_json(report.to_dict())
        return
    if report.rows:
        _print(_report_table(report.rows))
    warnings = dict.fromkeys(text for row in report.rows for text in row.warnings)
    _print(*(f"note: {warning}" for warning in warnings), report.summary())


def _report_table(rows: Sequence[Row]) -> Table:
    table = _table("node", "E", "H", "I", "result", "before", "after", right=(1, 2, 3, 5, 6))
    for row in rows:
        result = row.stored if row.status == CONVERTED else f"{row.status}: {row.reason}"
        style = "yellow" if row.status == SKIPPED else None
        sizes = _sizes(row.experts, row.hidden, row.inter)
        before, after = human_bytes(row.bytes_before), human_bytes(row.bytes_after)
        table.add_row(Text(row.node), *sizes, Text(result), before, after, style=style)
    return table


def _inspection_table(summaries: Sequence[NodeSummary]) -> Table:
    table = _table(
        "node",
        "op",
        "type",
        "E",
        "H",
        "I",
        "k",
        "activation",
        "stored",
        "bytes",
        right=(3, 4, 5, 6, 9),
    )
    for summary in summaries:
        table.add_row(
            Text(summary.node),
            summary.op,
            summary.dtype,
            *_sizes(summary.experts, summary.hidden, summary.inter),
            str(summary.k),
            Text(summary.activation),
            Text(summary.stored),
            human_bytes(summary.nbytes),
        )
    return table


def _table(*titles: str, right: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index in right else "left", overflow="fold")
    return table


def _sizes(*sizes: int) -> tuple[str, ...]:
    return tuple(str(size) if size else "?" for size in sizes)


if __name__ == "__main__":
    sys.exit(main())
