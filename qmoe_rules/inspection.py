"""`inspect`: what MoE and QMoE nodes a model holds, whoever wrote it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.loading import load, locate
from qmoe_rules.report import row_of
from qmoe_rules.weights import resolve

__all__ = ["NodeSummary", "inspect"]

_LAYOUTS = {0: "raw", 1: "packed (weights_prepacked=1)", -1: "not stated (weights_prepacked=-1)"}


@dataclass(frozen=True)
class NodeSummary:
    """One MoE or QMoE node as the file says it.

    Attributes:
        node: The node's name.
        op: `"MoE"` or `"QMoE"`.
        dtype: Element type of the expert weights (MoE) or of the scales (QMoE), `"?"` if unknown.
        experts: E, 0 where it is not known.
        hidden: H.
        inter: I.
        k: Experts per token.
        activation: The `activation_type`.
        stored: Width, block and layout of a QMoE's weights, or where a MoE's weights come from.
        nbytes: Bytes of the constant expert weights, scales and zero points.
    """

    node: str
    op: str
    dtype: str
    experts: int
    hidden: int
    inter: int
    k: int
    activation: str
    stored: str
    nbytes: int


def inspect(source: str | os.PathLike[str]) -> list[NodeSummary]:
    """Lists the MoE and QMoE nodes of a model, in subgraphs and functions too.

    Args:
        source: An .onnx file, or a folder that holds one.

    Raises:
        SourceError: The model cannot be used.
    """
    return [_summary(node) for node in ops.nodes(load(locate(source).model), "MoE", "QMoE")]


def _summary(node: ir.Node) -> NodeSummary:
    row, values = row_of(node), ops.attributes(node)
    return NodeSummary(
        node=row.node,
        op=node.op_type,
        dtype=_dtype(node),
        experts=row.experts,
        hidden=row.hidden,
        inter=row.inter,
        k=values["k"],
        activation=values["activation_type"],
        stored=_stored(node),
        nbytes=row.bytes_before,
    )


def _dtype(node: ir.Node) -> str:
    given = ops.inputs(node)
    value = given["fc2_scales" if ops.is_op(node, "QMoE") else "fc2_experts_weights"]
    return value.dtype.name.lower() if value is not None and value.dtype is not None else "?"


def _stored(node: ir.Node) -> str:
    if ops.is_op(node, "MoE"):
        fc1 = ops.inputs(node)["fc1_experts_weights"]
        constant = fc1 is not None and not isinstance(resolve(fc1), str)
        return "float" if constant else "float, computed by other nodes"
    values = ops.attributes(node)
    widths = [
        values[f"{name}_expert_weight_bits"] or values["expert_weight_bits"]
        for name in ("fc1", "fc2")
    ]
    width = f"{widths[0]}" if widths[0] == widths[1] else f"{widths[0]}/{widths[1]}"
    block = values["block_size"]
    reach = f"block {block}" if block and block > 0 else "row"
    prepacked = values["weights_prepacked"]
    layout = _LAYOUTS.get(prepacked, f"unknown (weights_prepacked={prepacked})")
    return f"{values['quant_type']}{width} {reach}, {layout}"
