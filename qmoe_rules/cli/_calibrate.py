"""`qmoe calibrate`: arguments, progress, and the table of what the experts saw."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from qmoe_rules.cli._options import DATA, add_data_options, positive_number
from qmoe_rules.cli._printing import cell, print_json, show
from qmoe_rules.feeds import inputs_of, read_feeds
from qmoe_rules.loading import load, locate
from qmoe_rules.statistics import PROJECTIONS, Calibration

__all__ = ["add"]

_TEXT = "run a float model on data and keep what its experts see, for the methods that lose less"


def add(commands: Any) -> None:
    """Adds the command to the subparsers."""
    command: argparse.ArgumentParser = commands.add_parser(
        "calibrate", help=_TEXT, description=_TEXT
    )
    command.set_defaults(run=_calibrate)
    command.add_argument("model", metavar="MODEL", help="an .onnx file, or a folder that holds one")
    command.add_argument("data", metavar="DATA", help=DATA)
    command.add_argument("destination", metavar="OUT", help="the file to write")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--hessian", action="store_true", help="collect Hessians too")
    add_data_options(command, "tokens per run")
    command.add_argument(
        "--windows",
        type=positive_number,
        default=128,
        metavar="M",
        help="how many runs at most, evenly spaced over the data (default: 128)",
    )
    command.add_argument(
        "--input",
        metavar="NAME",
        help="which input data without names are for (default: input_ids)",
    )
    command.add_argument(
        "--no-resume",
        action="store_true",
        help="begin anew, whatever an interrupted run has left beside OUT",
    )


def _calibrate(arguments: argparse.Namespace) -> int:
    from qmoe_rules.calibration import calibrate

    model = load(locate(arguments.model).model)
    feeds = read_feeds(
        arguments.data,
        inputs_of(model),
        name=arguments.input,
        dtype=arguments.dtype,
        window=arguments.window,
        windows=arguments.windows,
    )
    with _progress() as advance:
        try:
            calibration = calibrate(
                model,
                feeds,
                arguments.destination,
                hessian=arguments.hessian,
                progress=advance,
                resume=not arguments.no_resume,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "interrupted; the layers that are done are kept beside OUT, and the same command "
                "goes on from them"
            ) from None
    summary = _summary(calibration)
    if arguments.json:
        print_json(summary)
    else:
        show(_table(summary), _verdict(summary))
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(calibration: Calibration) -> dict[str, Any]:
    """Returns what the experts of every node saw, and which saw too little."""
    nodes = []
    for node in calibration.nodes:
        counts = calibration.counts(node, "fc1")
        few = {}
        for name in PROJECTIONS:
            enough = calibration.enough(node, name, calibration.hessian)
            experts = calibration.fallbacks(node, name, hessian=calibration.hessian)
            few[name] = {"enough": enough, "experts": experts}
        never = [expert for expert, count in enumerate(counts) if not count]
        nodes.append({"node": node, "tokens": counts.tolist(), "never": never, "few": few})
    return {
        "file": str(calibration.path),
        "tokens": calibration.tokens,
        "hessian": calibration.hessian,
        "nodes": nodes,
    }


def _table(summary: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("node", "E", "fewest", "median", "most", "never", "too few, fc1", "too few, fc2"):
        table.add_column(title, justify="left" if title == "node" else "right", overflow="fold")
    for node in summary["nodes"]:
        counts = sorted(node["tokens"])
        few = [
            f"{len(each['experts'])} (< {each['enough']})" if each["experts"] else "0"
            for each in node["few"].values()
        ]
        numbers = (len(counts), counts[0], counts[len(counts) // 2], counts[-1], len(node["never"]))
        style = "yellow" if any(each["experts"] for each in node["few"].values()) else None
        table.add_row(cell(node["node"]), *map(str, numbers), *few, style=style)
    return table


def _verdict(summary: dict[str, Any]) -> str:
    few = sum(
        len({expert for each in node["few"].values() for expert in each["experts"]})
        for node in summary["nodes"]
    )
    kind = "Hessians" if summary["hessian"] else "mean squares"
    line = f"{summary['file']}: {kind} of {summary['tokens']} tokens"
    if few:
        experts = "expert" if few == 1 else "experts"
        line += f"; {few} {experts} saw too few of them and will fall back: more data would help"
    return line
