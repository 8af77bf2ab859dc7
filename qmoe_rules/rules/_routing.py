"""What decides which experts a token goes to: analysed, and encoded for the MoE operators.

MoE computes softmax over `router_probs`, takes the top k and optionally renormalizes. A router
that does just that hands over its logits. Any other router, as long as its weights are not
negative, is encoded: experts that are chosen get the logarithm of their weight, all others -1e4,
and the output is scaled by the sum of the weights. With renormalization softmax over the chosen
gives back the weights over their sum, on every execution provider.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import ops

__all__ = ["Routing", "emit_routing", "routing_of", "scalar"]

_UNCHOSEN = -1e4
# ScatterElements can add from this opset on.
_MIN_OPSET = 16


@dataclass(frozen=True)
class Routing:
    """How tokens reach their experts.

    Attributes:
        indices: The chosen experts, int64 [..., k].
        weights: Their weights, [..., k], never negative.
        k: Experts per token.
        experts: E; every index is below it.
        logits: [..., E], where softmax over them and the top k give indices and weights.
        normalize: With `logits`: whether the weights are renormalized over the chosen.
    """

    indices: ir.Value
    weights: ir.Value
    k: int
    experts: int
    logits: ir.Value | None = None
    normalize: bool = True


def routing_of(indices: ir.Value, weights: ir.Value, experts: int) -> Routing | str:
    """Returns the routing that ends in these values, or why it cannot be expressed.

    Args:
        indices: The chosen experts, int64 [..., k].
        weights: Their weights, [..., k].
        experts: E.
    """
    count = _chosen(indices)
    if count is None:
        return f"{indices.name} does not come from TopK with a constant k"
    k, width = count
    if width is not None and width != experts:
        return f"the router ranks {width} experts, and there are {experts}"
    direct = _direct(indices, weights, k, experts)
    if direct is not None:
        return direct
    if width is None:
        return f"how many experts {indices.name} ranks is not known"
    if not _not_negative(weights):
        return f"the weights {weights.name} may be negative"
    return Routing(indices, weights, k, experts)


def emit_routing(
    op: Any, routing: Routing, dtype: ir.DataType, opset: int
) -> tuple[ir.Value, ir.Value | None] | str:
    """Builds the inputs that make MoE route the same way.

    Args:
        op: The rewriter's builder.
        routing: From `routing_of`.
        dtype: The activation type.
        opset: The model's opset of the standard domain.

    Returns:
        `router_probs` [tokens, E], and what to multiply the output [..., H] with, [..., 1], or
        None; or why the opset cannot express it. `normalize_routing_weights` is
        `routing.normalize`.
    """
    if routing.logits is not None:
        return op.Reshape(routing.logits, _ints(op, [-1, routing.experts])), None
    if opset < _MIN_OPSET:
        return f"its routing needs opset {_MIN_OPSET}, and the model imports {opset}"
    flat = _ints(op, [-1, routing.k])
    indices = op.Reshape(routing.indices, flat)
    weights = op.Cast(op.Reshape(routing.weights, flat), to=ir.DataType.FLOAT)
    tokens = op.Shape(weights, start=0, end=1)
    nothing = ir.Tensor(np.zeros(1, np.float32))
    empty = op.ConstantOfShape(
        op.Concat(tokens, _ints(op, [routing.experts]), axis=0), value=nothing
    )
    # Adding makes an expert that was chosen twice count twice, as it does in the original.
    dense = op.ScatterElements(empty, indices, weights, axis=1, reduction="add")
    chosen = op.Greater(dense, _floats(op, 0.0))
    router = op.Where(chosen, op.Log(dense), _floats(op, _UNCHOSEN))
    scale = op.ReduceSum(routing.weights, _ints(op, [-1]), keepdims=1)
    return op.Cast(router, to=dtype), op.Cast(scale, to=dtype)


def _ints(op: Any, values: list[int]) -> ir.Value:
    made: ir.Value = op.Constant(value=ir.Tensor(np.array(values, np.int64)))
    return made


def _floats(op: Any, value: float) -> ir.Value:
    made: ir.Value = op.Constant(value=ir.Tensor(np.array(value, np.float32)))
    return made


def _chosen(indices: ir.Value) -> tuple[int, int | None] | None:
    """Returns (k, how many are ranked) of indices that TopK made, the second None if unknown."""
    node = _producer(indices)
    if node is None:
        return None
    if (
        node.op_type == "TopK"
        and indices.index() == 1
        and node.attributes.get_int("largest", 1) == 1
    ):
        k = scalar(node.inputs[1])
        rank = _rank(indices) or _rank(node.inputs[0])
        axis = node.attributes.get_int("axis", -1)
        if k is None or not (axis == -1 or (rank is not None and axis == rank - 1)):
            return None
        return int(k), _last_size(node.inputs[0])
    if node.op_type == "Concat" and _is_last_axis(node, indices):
        parts = [_chosen(value) if value is not None else None for value in node.inputs]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        widths = {width for _, width in known}
        return sum(k for k, _ in known), widths.pop() if len(widths) == 1 else None
    if node.op_type in ("Cast", "Identity") and node.inputs[0] is not None:
        return _chosen(node.inputs[0])
    return None


def _direct(indices: ir.Value, weights: ir.Value, k: int, experts: int) -> Routing | None:
    """Recognizes softmax and top-k in either order, the routing that MoE itself computes."""
    top = _producer(indices)
    if top is None or top.op_type != "TopK" or top.inputs[0] is None:
        return None
    values, ranked = top.outputs[0], top.inputs[0]
    node = _producer(weights)
    if node is None:
        return None
    logits = _softmax_input(ranked)
    if _is(node, "Softmax") and node.inputs[0] is values and _is_last_axis(node, weights):
        return Routing(indices, weights, k, experts, ranked, normalize=True)
    if logits is None:
        return None
    if weights is values or _gathered_from(node, ranked, indices):
        return Routing(indices, weights, k, experts, logits, normalize=False)
    if _is(node, "Div") and node.inputs[0] is not None:
        part, total = node.inputs
        same = part is values or _gathered_from(_producer(part), ranked, indices)
        if same and _is_sum_over_last(total, part):
            return Routing(indices, weights, k, experts, logits, normalize=True)
    return None


def _softmax_input(value: ir.Value) -> ir.Value | None:
    node = _producer(value)
    if node is None or not _is(node, "Softmax") or not _is_last_axis(node, value):
        return None
    return node.inputs[0]


def _gathered_from(node: ir.Node | None, source: ir.Value, indices: ir.Value) -> bool:
    return (
        node is not None
        and _is(node, "GatherElements")
        and node.inputs[0] is source
        and node.inputs[1] is indices
        and _is_last_axis(node, indices)
    )


def _is_sum_over_last(total: ir.Value | None, part: ir.Value | None) -> bool:
    node = None if total is None else _producer(total)
    if node is None or not _is(node, "ReduceSum") or node.inputs[0] is not part:
        return False
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    given = [scalar(axes)] if axes is not None else list(node.attributes.get_ints("axes", ()))
    last = {-1, (_rank(part) or 0) - 1}
    return bool(node.attributes.get_int("keepdims", 1)) and len(given) == 1 and given[0] in last


_KEEP_SIGN = {
    "Cast", "Concat", "Div", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "Identity", "Max", "Mul", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Slice",
    "Split", "Squeeze", "Sum", "TopK", "Transpose", "Unsqueeze", "Add",
}  # fmt: skip
_DATA_ONLY = {
    "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "ReduceMax", "ReduceMean",
    "ReduceSum", "Reshape", "Slice", "Split", "Squeeze", "TopK", "Transpose", "Unsqueeze",
}  # fmt: skip


def _not_negative(value: ir.Value) -> bool:
    """Returns whether a value is proven to have no negative element, from how it is computed."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return bool((tensor.numpy() >= 0).all()) and not value.is_graph_input()
    node = _producer(value)
    if node is None or node.domain != "":
        return False
    if node.op_type in ("Softmax", "Sigmoid", "Relu", "Abs", "Exp", "Softplus"):
        return True
    if node.op_type not in _KEEP_SIGN:
        return False
    sources = node.inputs[:1] if node.op_type in _DATA_ONLY else node.inputs
    return all(source is not None and _not_negative(source) for source in sources)


def _last_size(value: ir.Value | None) -> int | None:
    """Returns the size of a value's last axis, from its shape or from what computes it."""
    shape = ops.static_shape(value)
    if shape and shape[-1] is not None:
        return shape[-1]
    node = _producer(value)
    if node is None or node.domain != "":
        return None
    if node.op_type == "MatMul":
        return _last_size(node.inputs[1])
    if node.op_type == "Gemm":
        weight = ops.static_shape(node.inputs[1])
        return weight[0 if node.attributes.get_int("transB", 0) else 1] if weight else None
    if node.op_type in ("Softmax", "Sigmoid", "Cast", "Identity", "ScatterElements"):
        return _last_size(node.inputs[0])
    if node.op_type in ("Add", "Mul", "Sub", "Div", "Where"):
        sizes = {_last_size(source) for source in node.inputs} - {None, 1}
        return sizes.pop() if len(sizes) == 1 else None
    return None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _is_last_axis(node: ir.Node, value: ir.Value) -> bool:
    axis = node.attributes.get_int("axis", -1)
    return axis == -1 or axis == (_rank(value) or 0) - 1


def scalar(value: ir.Value | None) -> float | None:
    """Returns the one number that a constant holds, or None."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1 or (value is not None and value.is_graph_input()):
        return None
    number: float = tensor.numpy().reshape(-1)[0].item()
    return number
