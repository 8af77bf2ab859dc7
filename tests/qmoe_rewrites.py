"""Small models with QMoE nodes, rewritten into float."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import rewrite

from qmoe_rules.report import Report
from qmoe_rules.rules import qmoe_to_moe_rules

FLOAT = ("fc1_experts_weights", "fc2_experts_weights")


def back(model: ir.Model, source_layout: str | None = None, report: Report | None = None) -> Any:
    return rewrite(model, [*qmoe_to_moe_rules(source_layout=source_layout, report=report)])
