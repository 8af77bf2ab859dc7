"""What the command prints: tables, JSON, progress."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qmoe_rules.inspection import NodeSummary
from qmoe_rules.kernels import RIGHT
from qmoe_rules.report import CONVERTED, SKIPPED, Report, Row, human_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "cell",
    "inspection_table",
    "message_line",
    "plain",
    "print_json",
    "print_report",
    "progress_bar",
    "show",
    "tell",
    "verdicts",
]

_PIPE_WIDTH = 1000  # columns of a table that no terminal limits
_LONGEST = 2000  # characters of a line or a cell


def plain(text: str) -> str:
    """Returns a text as a terminal may have it, whatever names a model has.

    Control characters, which a terminal would obey, are spelled out, and so is whatever has no
    width or turns the direction of writing; what is very long is cut.
    """
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def message_line(message: object) -> str:
    """Returns a message as one line that says who it is from."""
    return f"qmoe: {plain(' '.join(str(message).split()))}"


def tell(message: object) -> None:
    """Writes a message to standard error."""
    sys.stderr.write(f"{message_line(message)}\n")


def cell(text: str) -> Text:
    """Returns the same as a cell of a table."""
    return Text(plain(text))


def progress_bar() -> AbstractContextManager[Progress | None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        return nullcontext()
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def show(*things: Table | str) -> None:
    """Prints tables and plain text; rich renders, but leaves errors of the output to us."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(
        file=io.StringIO(),
        width=shutil.get_terminal_size().columns if terminal else _PIPE_WIDTH,
        force_terminal=terminal,
        highlight=False,
    )
    for thing in things:
        shown = plain(thing) if isinstance(thing, str) else thing
        console.print(shown, markup=False, emoji=False)
    _write(cast(io.StringIO, console.file).getvalue())


def _write(text: str) -> None:
    if sys.stdout is not None:  # it is None where the process was started without one
        sys.stdout.write(text)


def print_json(data: object) -> None:
    text = json.dumps(data, indent=2).replace("\x7f", r"\u007f")  # the one that JSON lets pass
    _write(text + "\n")


def print_report(report: Report, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
        return
    if report.rows:
        show(_report_table(report.rows))
    warnings = dict.fromkeys(text for row in report.rows for text in row.warnings)
    show(*(f"note: {warning}" for warning in warnings), report.summary())


def _report_table(rows: Sequence[Row]) -> Table:
    table = _table("node", "E", "H", "I", "result", "before", "after", right=(1, 2, 3, 5, 6))
    for row in rows:
        result = row.stored if row.status == CONVERTED else f"{row.status}: {row.reason}"
        style = "yellow" if row.status == SKIPPED else None
        sizes = _sizes(row.experts, row.hidden, row.inter)
        before, after = human_bytes(row.bytes_before), human_bytes(row.bytes_after)
        table.add_row(cell(row.node), *sizes, cell(result), before, after, style=style)
    return table


def inspection_table(summaries: Sequence[NodeSummary]) -> Table:
    judged = any(summary.verdict is not None for summary in summaries)
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
        *(["verdict"] if judged else []),
        right=(3, 4, 5, 6, 9),
    )
    for summary in summaries:
        table.add_row(
            cell(summary.node),
            summary.op,
            summary.dtype,
            *_sizes(summary.experts, summary.hidden, summary.inter),
            str(summary.k),
            cell(summary.activation),
            cell(summary.stored),
            human_bytes(summary.nbytes),
            *([summary.verdict] if judged else []),
            style="yellow" if summary.verdict not in (None, RIGHT) else None,
        )
    return table


def verdicts(summaries: Sequence[NodeSummary]) -> Iterator[str]:
    """Yields why nodes are not right and what mends them, each thing once, then the notes."""
    alike: dict[tuple[str | None, ...], list[str]] = {}
    for summary in summaries:
        if summary.reason:
            key = (summary.verdict, summary.reason, summary.remedy)
            alike.setdefault(key, []).append(summary.node)
    for (verdict, reason, remedy), nodes in alike.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        yield f"{nodes[0]}{more} {verdict}: {reason}"
        if remedy:
            yield f"    to mend it: {remedy}"
    notes = dict.fromkeys(note for summary in summaries for note in summary.notes or ())
    yield from (f"note: {note}" for note in notes)


def _table(*titles: str, right: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index in right else "left", overflow="fold")
    return table


def _sizes(*sizes: int) -> tuple[str, ...]:
    return tuple(str(size) if size else "?" for size in sizes)
