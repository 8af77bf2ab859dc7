"""`qmoe verify`: arguments, and the table of what was checked."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qmoe_rules.cli._options import DATA, add_data_options, add_html_option
from qmoe_rules.cli._printing import cell, print_json, show
from qmoe_rules.feeds import Feed, inputs_of, read_inputs
from qmoe_rules.loading import load, locate
from qmoe_rules.pages import verification_page, write_page
from qmoe_rules.stored import STORED_LAYOUTS

if TYPE_CHECKING:
    from qmoe_rules.verification import (
        NodeResult,
        OutputResult,
        ProjectionResult,
        VerificationReport,
    )

__all__ = ["add"]

_TEXT = "check a converted model against the float model, node by node and as a whole"
_MODEL = "an .onnx file, or a folder that holds one"
_OUTPUTS = 4  # that are told; those that differ most


def add(commands: Any) -> None:
    """Adds the command to the subparsers."""
    command: argparse.ArgumentParser = commands.add_parser("verify", help=_TEXT, description=_TEXT)
    command.set_defaults(run=_verify)
    command.add_argument("before", metavar="BEFORE", help=f"the float model: {_MODEL}")
    command.add_argument("after", metavar="AFTER", help=f"the converted model: {_MODEL}")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument(
        "--inputs", metavar="FILE", help=f"what to run both models on: {DATA} (default: random)"
    )
    add_data_options(command, "how many tokens of --inputs to run on")
    command.add_argument(
        "--provider",
        default="CPUExecutionProvider",
        metavar="NAME",
        help="ONNX Runtime's name of the provider to run on (default: CPUExecutionProvider)",
    )
    command.add_argument(
        "--source-layout",
        choices=STORED_LAYOUTS,
        help="the layout of bytes that do not state it (default: what the provider takes them for)",
    )
    command.add_argument(
        "--tokens",
        type=int,
        default=64,
        metavar="N",
        help="rows that each node is fed with, and length of random sequences (default: 64)",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of random inputs (default: 0)"
    )
    command.add_argument(
        "--nodes-only",
        action="store_true",
        help="do not compare the outputs of the whole models, which holds each in memory in turn",
    )
    add_html_option(
        command, "write what was found as a web page too, with the error of every expert"
    )


def _verify(arguments: argparse.Namespace) -> int:
    from qmoe_rules.verification import verify

    report = verify(
        arguments.before,
        arguments.after,
        inputs=None if arguments.inputs is None else _inputs(arguments),
        seed=arguments.seed,
        tokens=arguments.tokens,
        provider=arguments.provider,
        source_layout=arguments.source_layout,
        whole_model=not arguments.nodes_only,
    )
    if arguments.json:
        print_json(report.to_dict())
    else:
        show(*([_table(report.nodes)] if report.nodes else []), *_lines(report))
    if arguments.html is not None:
        page = verification_page(report, before=arguments.before, after=arguments.after)
        write_page(page, arguments.html)
    return int(not report.passed)


def _inputs(arguments: argparse.Namespace) -> Feed:
    needed = inputs_of(load(locate(arguments.before).model))
    return read_inputs(arguments.inputs, needed, dtype=arguments.dtype, window=arguments.window)


def _table(nodes: tuple[NodeResult, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("node", "stored", "weights", "output", "execution", "allowed", "result"):
        left = title in ("node", "stored", "result")
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    for node in nodes:
        figures = (node.output_error, node.execution_error, node.tolerance)
        checks = dict.fromkeys(failure.check for failure in node.failures)
        result = f"failed: {', '.join(checks)}" if checks else _passed(node)
        table.add_row(
            cell(node.node),
            cell(" and ".join(dict.fromkeys(each.stored for each in node.projections))),
            _figure(max((each.error for each in node.projections), default=None)),
            *map(_figure, figures),
            result,
            style="red" if checks else None,
        )
    return table


def _passed(node: NodeResult) -> str:
    if node.status != "converted":
        return node.status
    return "passed" if node.execution_error is not None else "passed, not run"


def _lines(report: VerificationReport) -> Iterator[str]:
    yield from (f"failed: {failure}" for failure in report.failed)
    notes: dict[str, list[str]] = {}
    for node in report.nodes:
        for note in node.notes:
            notes.setdefault(note, []).append(node.node)
    for note, names in notes.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"note: {names[0]}{more}: {note}"
    yield f"whole model: {report.whole_model}"
    outputs = sorted(report.outputs, key=lambda each: (each.divergence is None, -each.error))
    yield from map(_output, outputs[:_OUTPUTS])
    if len(outputs) > _OUTPUTS:
        yield f"    and {len(outputs) - _OUTPUTS} more, none further off"
    worst = list(_worst(report))
    if worst:
        yield f"weights closest to their bound: {worst[0]}"
    yield _summary(report)


def _output(output: OutputResult) -> str:
    line = f"    {output.name}: {_figure(output.error)} off"
    if output.divergence is None or output.agreement is None:
        return line
    return f"{line}, KL {_figure(output.divergence)}, same top class {output.agreement:.1%}"


def _worst(report: VerificationReport) -> Iterator[str]:
    found: list[tuple[NodeResult, ProjectionResult]] = [
        (node, each) for node in report.nodes for each in node.projections
    ]
    for node, each in sorted(found, key=lambda pair: -pair[1].error / pair[1].bound)[:1]:
        yield (
            f"{node.node} {each.projection} expert {each.expert}, {_figure(each.error)} of "
            f"{_figure(each.bound)}"
        )


def _summary(report: VerificationReport) -> str:
    if report.passed:
        return report.summary()
    count = len(report.failed)
    return f"{count} {'check' if count == 1 else 'checks'} failed"


def _figure(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"
