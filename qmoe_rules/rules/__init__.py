"""Rewrite rules, one file per transformation; the only room that imports onnxscript."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript.rewriter import RewritePass, RewriteRule, RewriteRuleSet

from qmoe_rules.rules.fuse_experts import fuse_experts_rules
from qmoe_rules.rules.moe_to_qmoe import moe_to_qmoe_rules
from qmoe_rules.rules.normalize_moe import normalize_moe_rules
from qmoe_rules.rules.qmoe_to_moe import qmoe_to_moe_rules
from qmoe_rules.rules.relayout_qmoe import relayout_qmoe_rules

__all__ = [
    "apply_rules",
    "fuse_experts_rules",
    "moe_to_qmoe_rules",
    "normalize_moe_rules",
    "qmoe_to_moe_rules",
    "relayout_qmoe_rules",
]


def apply_rules(model: ir.Model, rules: Sequence[RewriteRule] | RewriteRuleSet) -> bool:
    """Applies rules to a model in place and returns whether anything changed.

    Unlike `onnxscript.rewriter.rewrite`, it leaves the nodes, functions and opset imports alone
    that no rule touched.
    """
    return bool(RewritePass(rules)(model).modified)
