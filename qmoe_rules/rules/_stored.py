"""What the rules on existing QMoE nodes share: examine, report, register, tidy up."""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError
from qmoe_rules.lazy import register_beside
from qmoe_rules.report import CONVERTED, KEPT, SKIPPED, Report, Row, row_of
from qmoe_rules.rules._leftovers import Leftovers, carry_notes
from qmoe_rules.slices import SlicedTensor, Slices
from qmoe_rules.stored import STORED_LAYOUTS, StoredProjection, stored_projections

__all__ = ["Projections", "StoredRule", "check_layout"]

logger = logging.getLogger(__name__)

Projections = dict[str, StoredProjection]
"""The projections of a node by name: fc1, fc2 and, where the node has it, fc3."""


def check_layout(field: str, layout: str | None) -> None:
    """Raises ConfigError unless QMoE reads the layout."""
    if layout not in STORED_LAYOUTS:
        choices = " or ".join(map(repr, STORED_LAYOUTS))
        raise ConfigError(f"{field}={layout!r}; it may be {choices}")


class StoredRule(RewriteRuleClassBase):
    """A rule that replaces QMoE nodes by reading back what their constants hold.

    Args:
        source_layout: The layout of nodes that do not state theirs, None where it is not known.
        report: Collects one row per QMoE node.
    """

    def __init__(self, source_layout: str | None, report: Report) -> None:
        super().__init__(type(self).__name__)
        if source_layout is not None:
            check_layout("source_layout", source_layout)
        self._source_layout = source_layout
        self._report = report
        self._projections: Projections = {}
        self._done: set[tuple[object, str | None]] = set()
        self._leftovers = Leftovers()

    @abstractmethod
    def refuse(self, node: ir.Node, projections: Projections) -> str | None:
        """Returns why a node that can be read stays as it is all the same, or None."""

    @abstractmethod
    def facts(self, node: ir.Node, projections: Projections) -> dict[str, Any]:
        """Returns the fields of the row of a node that will be replaced."""

    @abstractmethod
    def replace(self, op: Any, node: ir.Node, projections: Projections) -> ir.Value:
        """Builds the new node and returns its output."""

    def keep(self, node: ir.Node, projections: Projections) -> str | None:
        """Returns why there is nothing to do for a node, or None."""
        return None

    def pattern(self, op: Any, x: Any) -> Any:
        """Matches any QMoE: missing and extra inputs are sorted out in `check`."""
        return op.QMoE(x, _allow_other_inputs=True, _domain=ops.DOMAIN, _outputs=["qmoe"])

    def check(self, op: Any, *args: Any, **bindings: Any) -> MatchResult:
        """Accepts the node, or says why it stays; `op` is the match context here."""
        qmoe: ir.Value = bindings["qmoe"]
        node = ops.producer(qmoe)
        result = MatchResult()
        # The rewriter visits replacements too. What has become of a node, also by other rules,
        # still computes the value of that name.
        if (node.graph, qmoe.name) in self._done:
            return result.fail("it is what this rule made, or what was made of that", node)
        found = self._read(node, ops.in_function(op.model, node))
        row = self._row(node, found)
        self._report.record(node, row)
        for warning in row.warnings:
            logger.warning("%s: %s", row.node, warning)
        if row.status == SKIPPED:
            logger.warning("%s stays as it is: %s", row.node, row.reason)
        if isinstance(found, str) or row.status != CONVERTED:
            return result.fail(row.reason, node)
        self._projections = found
        return result

    def rewrite(self, op: Any, *args: Any, **bindings: Any) -> ir.Value:
        """Replaces the node and keeps what is said about it."""
        old: ir.Value = bindings["qmoe"]
        self._done.add((ops.producer(old).graph, old.name))
        new = self.replace(op, ops.producer(old), self._projections)
        carry_notes(old, new)
        return new

    def cleanup(self) -> None:
        """Removes the constants that no node uses any more."""
        self._leftovers.sweep()
        self._done.clear()

    def register(self, source: ir.Value, key: Hashable, slices: Slices, suffix: str) -> ir.Value:
        """Returns the initializer that holds `slices`, beside the constant it is made of."""
        tensor = SlicedTensor(slices, f"{source.name}_{suffix}")
        value = register_beside(source, key, {suffix: tensor})[suffix]
        self._leftovers.made(value)
        return value

    def discard(self, *values: ir.Value) -> None:
        """Lets go of inputs that the new node does not use, at the next clean-up."""
        self._leftovers.replaced(*values)

    def _read(self, node: ir.Node, in_function: bool) -> Projections | str:
        if in_function:
            return "it is inside a function, which holds no initializers; inline it (see prepare)"
        if unknown := ops.refuse_unknown(node):
            return unknown
        return stored_projections(node, self._source_layout)

    def _row(self, node: ir.Node, found: Projections | str) -> Row:
        row = row_of(node)
        if isinstance(found, str):
            return dataclasses.replace(row, status=SKIPPED, reason=found)
        if kept := self.keep(node, found):
            return dataclasses.replace(row, status=KEPT, reason=kept)
        if refused := self.refuse(node, found):
            return dataclasses.replace(row, status=SKIPPED, reason=refused)
        facts = {"projections": (), **self.facts(node, found)}
        return dataclasses.replace(row, status=CONVERTED, reason="", **facts)
