"""Small models with QMoE nodes, rewritten into float or into another layout."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import rewrite

from qmoe_rules.report import Report
from qmoe_rules.rules import qmoe_to_moe_rules, relayout_qmoe_rules

RAW, SM80 = "raw", "cutlass_sm80"
PREPACKED = {RAW: 0, SM80: 1}
WEIGHTS = ("fc1_experts_weights", "fc2_experts_weights", "fc3_experts_weights")
FLOAT = WEIGHTS[:2]


def back(model: ir.Model, source_layout: str | None = None, report: Report | None = None) -> Any:
    return rewrite(model, [*qmoe_to_moe_rules(source_layout=source_layout, report=report)])


def relayout(
    model: ir.Model, layout: str, source_layout: str | None = None, report: Report | None = None
) -> Any:
    rules = relayout_qmoe_rules(layout, source_layout=source_layout, report=report)
    return rewrite(model, [*rules])


def attributes_of(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
