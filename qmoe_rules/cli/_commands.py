"""The commands: what each one's arguments are, and what it calls."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from qmoe_rules.cli import _calibrate, _verify
from qmoe_rules.cli._options import (
    add_html_option,
    add_recipe_options,
    add_save_options,
    recipe_of,
    save_options_of,
)
from qmoe_rules.cli._parser import Parser
from qmoe_rules.cli._printing import (
    inspection_table,
    print_json,
    print_report,
    progress_bar,
    show,
    tell,
    verdicts,
)
from qmoe_rules.inspection import inspect
from qmoe_rules.kernels import GARBAGE
from qmoe_rules.pages import report_page, write_page
from qmoe_rules.pipeline import plan, quantize
from qmoe_rules.providers import TARGETS
from qmoe_rules.report import CONVERTED, SKIPPED, Report

__all__ = ["parser"]


def parser() -> argparse.ArgumentParser:
    """Returns the parser; the parsed arguments have the command's function as `run`."""
    command_line = Parser(
        prog="qmoe",
        description="Quantize the experts of Mixture-of-Experts ONNX models.",
        epilog="exit status: 0 done, 1 a check failed, 2 bad input or usage",
    )
    command_line.add_argument(
        "--version", action="version", version=f"%(prog)s {version('qmoe-rules')}"
    )
    commands = command_line.add_subparsers(required=True, metavar="COMMAND")
    _add_command(commands, "plan", _plan, "say what quantize would do; computes nothing")
    command = _add_command(commands, "quantize", _quantize, "write a model with quantized experts")
    command.add_argument("destination", metavar="OUT", help="an .onnx file, or a folder")
    add_save_options(command)
    for name in ("plan", "quantize"):
        add_recipe_options(commands.choices[name])
    add_html_option(commands.choices["plan"], "write the report as a web page too")
    add_html_option(
        commands.choices["quantize"],
        "write the report as a web page too, with the error of every expert: both models are read "
        "once more for it",
    )
    command = _add_command(commands, "inspect", _inspect, "list a model's MoE and QMoE nodes")
    command.add_argument(
        "--target",
        choices=tuple(TARGETS),
        help="say what would become of every node there; exit 1 if one would compute garbage",
    )
    _calibrate.add(commands)
    _verify.add(commands)
    return command_line


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("model", metavar="MODEL", help="an .onnx file, or a folder that holds one")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    return command


def _plan(arguments: argparse.Namespace) -> int:
    report = plan(arguments.model, recipe_of(arguments))
    print_report(report, arguments.json)
    _save_page(report, arguments)
    if arguments.fail_if_skipped:
        report.raise_if_skipped()
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    with save_options_of(arguments) as options, progress_bar() as bar:
        task = bar.add_task("writing", total=None) if bar else None

        def advance(done: int, total: int) -> None:
            if bar is not None and task is not None:
                bar.update(task, completed=done, total=total)

        report = quantize(
            arguments.model,
            arguments.destination,
            recipe_of(arguments),
            progress=advance,
            strict=arguments.fail_if_skipped,
            measured=arguments.html is not None,
            **options,
        )
    print_report(report, arguments.json)
    _save_page(report, arguments, destination=arguments.destination)
    if not report.count(CONVERTED):
        tell(
            f"nothing was converted; {arguments.destination} computes what {arguments.model} does: "
            f"{_why_nothing(report)}"
        )
    return 0


def _why_nothing(report: Report) -> str:
    """Returns the reason of most nodes, which says what would mend it where anything would."""
    skipped = Counter(row.reason for row in report.rows if row.status == SKIPPED)
    reasons = skipped or Counter(row.reason for row in report.rows)
    found = "there is no com.microsoft::MoE node, nor experts that can be fused to one"
    if reasons:
        ((reason, count),) = reasons.most_common(1)
        found = f"{reason} ({count} of {len(report.rows)} nodes)"
    fails = skipped or not reasons
    return f"{found}; --fail-if-skipped makes that an error" if fails else found


def _save_page(report: Report, arguments: argparse.Namespace, destination: str = "") -> None:
    if arguments.html is not None:
        page = report_page(
            report, recipe_of(arguments), source=arguments.model, destination=destination
        )
        write_page(page, arguments.html)


def _inspect(arguments: argparse.Namespace) -> int:
    summaries = inspect(arguments.model, arguments.target)
    if arguments.json:
        print_json([dataclasses.asdict(summary) for summary in summaries])
    elif summaries:
        show(inspection_table(summaries), *verdicts(summaries))
    else:
        show("no com.microsoft::MoE or QMoE node found; qmoe plan fuses experts of small nodes")
    return int(any(summary.verdict == GARBAGE for summary in summaries))
