"""QMoE(x, router, q(fc1), q(fc2)) -> MoE(x, router, fc1, fc2), with constant weights.

The way back from `moe_to_qmoe`: for another quantization, for a provider without a QMoE kernel,
or to see what the codes mean. The rule only plans: experts are dequantized when the model is saved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet

from qmoe_rules import ops
from qmoe_rules.report import Report
from qmoe_rules.rules._stored import Projections, StoredRule

__all__ = ["qmoe_to_moe_rules"]

_RENORMALIZES = (
    "normalize_routing_weights=0 without router_weights: the CPU kernel of QMoE renormalizes all "
    "the same, and that of MoE does not"
)


def qmoe_to_moe_rules(
    *, source_layout: str | None = None, report: Report | None = None
) -> RewriteRuleSet:
    """Returns the rule that turns every QMoE with constant integer weights into a float MoE.

    The weights are what the codes mean, computed in float32 and rounded to the scales' type. A
    node that cannot be converted stays as it was, with a logged warning and a row in the report.

    Args:
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
        >>> rules = qmoe_to_moe_rules(source_layout="cutlass_sm80")
        >>> # in_float = rewriter.rewrite(model, rules)
    """
    report = Report.of(report)
    return RewriteRuleSet([QMoEToMoE.rule(source_layout, report)])  # type: ignore[no-untyped-call]


class QMoEToMoE(StoredRule):
    """The rule behind `qmoe_to_moe_rules`."""

    def refuse(self, node: ir.Node, projections: Projections) -> str | None:
        """Returns what the node computes that no MoE does, or None."""
        given = ops.inputs(node)
        for name in ops.QMOE_INPUTS:
            if "_act_" in name and given[name] is not None:
                return f"{name} is present, and MoE has no such input"
        return _refuse_types(node, projections) or _refuse_routing(node)

    def facts(self, node: ir.Node, projections: Projections) -> dict[str, Any]:
        """Returns the type and the bytes of the float weights."""
        given, dtype = ops.inputs(node), _dtype(node, projections)
        normalizes = ops.attributes(node)["normalize_routing_weights"]
        return {
            "stored": dtype.name,
            "bytes_after": sum(each.dequantized(dtype).nbytes for each in projections.values()),
            "warnings": () if normalizes or given["router_weights"] else (_RENORMALIZES,),
        }

    def replace(self, op: Any, node: ir.Node, projections: Projections) -> ir.Value:
        """Builds the MoE node and registers the dequantized weights."""
        given, values = ops.inputs(node), ops.attributes(node)
        inputs, dtype = dict(given), _dtype(node, projections)
        for name, projection in projections.items():
            sources = tuple(projection.sources.values())
            key = ("dequantized", dtype, projection.spec, projection.layout.name, *sources)
            inputs[f"{name}_experts_weights"] = self.register(
                sources[0], key, projection.dequantized(dtype), "dequantized"
            )
            self.discard(*sources)
        if given["router_weights"] is not None:
            self.discard(given["router_weights"])
        # Every attribute is written out, because defaults have differed between versions.
        attributes = {name: values[name] for name in ops.MOE_ATTRIBUTES if values[name] is not None}
        moe: ir.Value = op.MoE(
            *ops.slots("MoE", inputs), _domain=ops.DOMAIN, _name=node.name, **attributes
        )
        return moe


def _dtype(node: ir.Node, projections: Projections) -> np.dtype:
    """Returns the activation type of a node that `_refuse_types` does not refuse."""
    x = ops.inputs(node)["input"]
    of_x = x.dtype.numpy() if x is not None and x.dtype is not None else None
    dtype = projections["fc1"].dtype or of_x
    if dtype is None:
        raise AssertionError(f"the type of {ops.label(node)} is not known")
    return dtype


def _refuse_types(node: ir.Node, projections: Projections) -> str | None:
    """Returns which types disagree that are one in a MoE, or None."""
    x = ops.inputs(node)["input"]
    of_x = x.dtype.numpy() if x is not None and x.dtype is not None else None
    dtype = projections["fc1"].dtype
    if dtype is None:
        return None if of_x is not None else "the type of its input is not known"
    for name, projection in projections.items():
        if projection.dtype not in (None, dtype):
            return f"fc1_scales is {dtype.name}, {name}_scales is {projection.dtype.name}"
    if of_x not in (None, dtype):
        return f"fc1_scales is {dtype.name}, input is {of_x.name}"
    return None


def _refuse_routing(node: ir.Node) -> str | None:
    """Returns why the routing weights of the node are not those of a MoE, or None."""
    given, values = ops.inputs(node), ops.attributes(node)
    weights = given["router_weights"]
    if weights is None:
        return None
    if values["normalize_routing_weights"]:
        return "router_weights is present with normalize_routing_weights=1"
    softmax = weights.producer()
    if (
        softmax is None
        or (softmax.domain, softmax.op_type) != ("", "Softmax")
        or softmax.inputs[0] is not given["router_probs"]
        or softmax.attributes.get_int("axis", -1) not in (-1, 1)
    ):
        return "router_weights is not Softmax(router_probs), which is all that MoE mixes with"
    return None
