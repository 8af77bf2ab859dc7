"""QMoE in one layout -> QMoE in another: the same codes in another order, and nothing else.

The rule only plans: experts are moved when the model is saved.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet

from qmoe_rules import ops
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import CUDA
from qmoe_rules.report import Report
from qmoe_rules.rules._stored import Projections, StoredRule, check_layout

__all__ = ["relayout_qmoe_rules"]


def relayout_qmoe_rules(
    layout: str, *, source_layout: str | None = None, report: Report | None = None
) -> RewriteRuleSet:
    """Returns the rule that stores the weights of every integer QMoE in `layout`, and says so.

    Codes, scales and zero points stay what they are, to the bit. A node that states this layout
    already is left alone. A node that cannot be converted stays as it was, with a logged warning
    and a row in the report.

    Args:
        layout: `"raw"`, which every provider reads, or `"cutlass_sm80"`, which CUDA reads without
            repacking at load time and other providers may misread.
        source_layout: The layout of nodes that do not state theirs in `weights_prepacked`:
            `"raw"` where a CPU build wrote them, `"cutlass_sm80"` where a CUDA build did.
        report: Collects one row per QMoE node.

    Returns:
        A rule set for `onnxscript.rewriter.rewrite`; it can be spliced into a list of rules.

    Raises:
        ConfigError: QMoE reads no such layout.
        TypeError: `report` is no report.

    Example:
        >>> from onnxscript import rewriter
        >>> rules = relayout_qmoe_rules("raw", source_layout="cutlass_sm80")
        >>> # portable = rewriter.rewrite(model, rules)
    """
    report = Report.of(report)
    return RewriteRuleSet([RelayoutQMoE.rule(layout, source_layout, report)])  # type: ignore[no-untyped-call]


class RelayoutQMoE(StoredRule):
    """The rule behind `relayout_qmoe_rules`."""

    def __init__(self, layout: str, source_layout: str | None, report: Report) -> None:
        super().__init__(source_layout, report)
        check_layout("layout", layout)
        self._layout = LAYOUTS[layout]

    def keep(self, node: ir.Node, projections: Projections) -> str | None:
        """Returns that the node states the layout already, or None."""
        stated = ops.attributes(node)["weights_prepacked"] == self._layout.prepacked
        if stated and projections["fc1"].layout is self._layout:
            return f"it is stored in layout {self._layout.name} already"
        return None

    def refuse(self, node: ir.Node, projections: Projections) -> str | None:
        """Returns which weight has no place in the layout, or why CUDA misreads it, or None."""
        for name, projection in projections.items():
            _, rows, columns = projection.shape
            if reason := self._layout.refuse(rows, columns, projection.spec.format):
                return f"{name}_experts_weights: {reason}"
        if not self._layout.prepacked:
            return None
        return CUDA.refuse_layout(self._layout.name, {n: p.spec for n, p in projections.items()})

    def facts(self, node: ir.Node, projections: Projections) -> dict[str, Any]:
        """Returns the new layout; the number of bytes is the same."""
        return {"stored": self._layout.name}

    def replace(self, op: Any, node: ir.Node, projections: Projections) -> ir.Value:
        """Builds the node with the moved weights; all its other inputs stay."""
        inputs = list(node.inputs)
        for name, projection in projections.items():
            if projection.layout is self._layout:  # only the attribute was missing
                continue
            source = projection.sources["weights"]
            key = ("relaid", projection.bits, projection.layout.name, self._layout.name)
            slot = ops.QMOE_INPUTS.index(f"{name}_experts_weights")
            inputs[slot] = self.register(
                source, key, projection.relaid(self._layout), self._layout.name
            )
            self.discard(source)
        attributes = {**node.attributes, "weights_prepacked": self._layout.prepacked}
        qmoe: ir.Value = op.QMoE(*inputs, _domain=ops.DOMAIN, _name=node.name, **attributes)
        return qmoe
