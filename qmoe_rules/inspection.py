"""`inspect`: what MoE and QMoE nodes a model holds, and what a provider would make of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.audit import audit
from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import format_of
from qmoe_rules.installed import installed
from qmoe_rules.loading import load, locate
from qmoe_rules.providers import TARGETS
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
        verdict: What a target would make of the node: `"right"`, `"computes garbage"`,
            `"refuses to run"` or `"cannot be known from the file"`; None where none was asked for.
        reason: Why it is not right, empty where it is; None without a target.
        remedy: What would mend it, empty where nothing is known to; None without a target.
        notes: What else its owner should know, of the ONNX Runtime that is installed too; None
            without a target.
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
    verdict: str | None = None
    reason: str | None = None
    remedy: str | None = None
    notes: tuple[str, ...] | None = None


def inspect(source: str | os.PathLike[str], target: str | None = None) -> list[NodeSummary]:
    """Lists the MoE and QMoE nodes of a model, in subgraphs and functions too.

    Args:
        source: An .onnx file, or a folder that holds one.
        target: Where the model shall run, a value of the recipe's `target`: every node is judged
            by what was measured of its providers. Nothing is judged where it is left out.

    Raises:
        ConfigError: The target is unknown.
        SourceError: The model cannot be used.
        TypeError: `source` is no path.

    Example:
        >>> # wrong = [n for n in inspect("model.onnx", "cuda") if n.verdict != "right"]
    """
    if target is not None and target not in TARGETS:
        raise ConfigError(f"target={target!r}; it may be {', '.join(map(repr, TARGETS))}")
    nodes = ops.nodes(load(locate(source).model), "MoE", "QMoE")
    return [_summary(node) if target is None else _judged(node, target) for node in nodes]


def _judged(node: ir.Node, target: str) -> NodeSummary:
    found, runtime = audit(node, target), installed()
    remarks = runtime.remarks([node], TARGETS[target]) if runtime else []
    return replace(
        _summary(node),
        verdict=found.verdict,
        reason=found.reason,
        remedy=found.remedy,
        notes=(*found.notes, *remarks),
    )


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
    codes = f"{values['quant_type']}{width}"
    block = values["block_size"]
    if values["quant_type"] != "int" and (format := format_of(values["quant_type"], widths[0])):
        codes, block = format.name, format.block_size or block
    reach = f"block {block}" if block and block > 0 else "row"
    prepacked = values["weights_prepacked"]
    layout = _LAYOUTS.get(prepacked, f"unknown (weights_prepacked={prepacked})")
    return f"{codes} {reach}, {layout}"
