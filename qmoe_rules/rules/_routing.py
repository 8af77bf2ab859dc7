"""What decides which experts a token goes to: analysed, and encoded for the MoE operators.

MoE computes softmax over `router_probs`, takes the top k and optionally renormalizes. A router
that does just that hands over its logits. Any other router, as long as its weights are not
negative, is encoded: experts that are chosen get the logarithm of their weight, all others -1e4,
and the output is scaled by the sum of the weights. With renormalization softmax over the chosen
gives back the weights over their sum, on every execution provider.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.rules._facts import (
    constant,
    is_last_axis,
    is_op,
    keeps_last_axis,
    last_size,
    not_negative,
    same_tokens,
    top_k,
    type_of,
)

__all__ = [
    "Routing",
    "emit_routing",
    "refuse_routing",
    "routing_of",
    "settled",
]

_UNCHOSEN = -1e4
# ScatterElements can add from this opset on.
_MIN_OPSET = 16
# What a router does to the products that it ranks without making any of them equal, as far as
# numbers go. MoE prefers the last of equal logits, and TopK the first.
_KEEP_APART = (
    "Add", "Div", "Flatten", "Identity", "Mul", "Reshape", "Squeeze", "Sub", "Unsqueeze",
)  # fmt: skip
# Softmax is along one axis, and the axes of ReduceSum are an input, from this opset on.
_MIN_OPSET_DIRECT = 13


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


def routing_of(
    indices: ir.Value, weights: ir.Value, experts: int, source: ir.Value | None = None
) -> Routing | str:
    """Returns the routing that ends in these values, or why it cannot be expressed.

    Args:
        indices: The chosen experts, int64 [..., k].
        weights: Their weights, [..., k].
        experts: E.
        source: The hidden states [..., H] whose tokens are routed, where the weights are said to
            have the same leading axes; None where that is known.
    """
    count = _chosen(indices)
    if count is None:
        return f"{indices.name} does not come from TopK with a constant k"
    k, width = count
    if k < 1:
        return f"{indices.name} chooses no expert"
    if width is None:
        return f"how many experts {indices.name} ranks is not known"
    if width != experts:
        return f"the router ranks {width} experts, and there are {experts}"
    if last_size(weights) != k:
        return f"{weights.name} is not known to have {k} weights per token"
    if source is not None:
        for value in (indices, weights):
            if not same_tokens(value, source):
                return f"{value.name} is not known to have one row per token of {source.name}"
    direct = _direct(indices, weights, k, experts)
    if direct is not None:
        return direct
    if not not_negative(weights):
        return f"the weights {weights.name} may be negative"
    return Routing(indices, weights, k, experts)


def settled(routing: Routing, dtype: ir.DataType) -> Routing:
    """Returns the routing as it is emitted: logits of another type are not handed over.

    Rounding them could choose other experts, and MoE takes one type only.
    """
    logits = routing.logits
    if logits is None or type_of(logits) == dtype:
        return routing
    return dataclasses.replace(routing, logits=None, normalize=True)


def refuse_routing(routing: Routing, opset: int) -> str | None:
    """Returns why a model with this opset of the standard domain cannot express it, or None."""
    needed = _MIN_OPSET if routing.logits is None else _MIN_OPSET_DIRECT
    if opset < needed:
        return f"its routing needs opset {needed}, and the model imports {opset}"
    return None


def emit_routing(op: Any, routing: Routing, dtype: ir.DataType) -> tuple[ir.Value, ir.Value | None]:
    """Builds the inputs that make MoE route the same way.

    Args:
        op: The rewriter's builder.
        routing: From `routing_of`, `settled`.
        dtype: The activation type.

    Returns:
        `router_probs` [tokens, E], and what to multiply the output [..., H] with, [..., 1], or
        None. `normalize_routing_weights` is `routing.normalize`.
    """
    if routing.logits is not None:
        return op.Reshape(routing.logits, _ints(op, [-1, routing.experts])), None
    flat = _ints(op, [-1, routing.k])
    indices = op.Reshape(routing.indices, flat)
    wide = op.Cast(routing.weights, to=ir.DataType.FLOAT)
    scale = op.ReduceSum(wide, _ints(op, [-1]), keepdims=1)
    largest, _ = op.TopK(wide, _ints(op, [1]), axis=-1, _outputs=2)
    # Relative to the largest, logarithms are near 0, where narrow types are most exact.
    weights = op.Reshape(op.Div(wide, largest), flat)
    tokens = op.Shape(weights, start=0, end=1)
    nothing = ir.Tensor(np.zeros(1, np.float32))
    empty = op.ConstantOfShape(
        op.Concat(tokens, _ints(op, [routing.experts]), axis=0), value=nothing
    )
    # Adding makes an expert that was chosen twice count twice, as it does in the original.
    dense = op.ScatterElements(empty, indices, weights, axis=1, reduction="add")
    chosen = op.Greater(dense, _floats(op, 0.0))
    router = op.Where(chosen, op.Log(dense), _floats(op, _UNCHOSEN))
    return op.Cast(router, to=dtype), op.Cast(scale, to=dtype)


def _ints(op: Any, values: list[int]) -> ir.Value:
    made: ir.Value = op.Constant(value=ir.Tensor(np.array(values, np.int64)))
    return made


def _floats(op: Any, value: float) -> ir.Value:
    made: ir.Value = op.Constant(value=ir.Tensor(np.array(value, np.float32)))
    return made


def _chosen(indices: ir.Value) -> tuple[int, int | None] | None:
    """Returns (k, how many are ranked) of indices that TopK or ArgMax made.

    The second is None where it is not known.
    """
    node = _producer(indices)
    if node is None:
        return None
    if is_op(node, "TopK") and indices.index() == 1 and node.attributes.get_int("largest", 1) == 1:
        k = top_k(node)
        if k is None or not (is_last_axis(node, indices) or is_last_axis(node, node.inputs[0])):
            return None
        return k, last_size(node.inputs[0])
    if is_op(node, "Concat") and is_last_axis(node, indices):
        parts = [_chosen(value) if value is not None else None for value in node.inputs]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        widths = {width for _, width in known}
        return sum(k for k, _ in known), widths.pop() if len(widths) == 1 else None
    if is_op(node, "ArgMax") and node.attributes.get_int("keepdims", 1) == 1:
        is_last = is_last_axis(node, indices, default=0)
        return (1, last_size(node.inputs[0])) if is_last else None
    integer = is_op(node, "Cast") and ops.cast_type(node) in _INDEX_TYPES
    if (integer or is_op(node, "Identity")) and node.inputs[0] is not None:
        return _chosen(node.inputs[0])
    return None


# What indices may be cast to: types that hold every expert and that ScatterElements takes.
_INDEX_TYPES = (ir.DataType.INT32, ir.DataType.INT64)


def _direct(indices: ir.Value, weights: ir.Value, k: int, experts: int) -> Routing | None:
    """Recognizes softmax and top-k in either order, the routing that MoE itself computes."""
    top = _producer(indices)
    if top is None or not is_op(top, "TopK") or top.inputs[0] is None:
        return None
    values, ranked = top.outputs[0], _uncast(top.inputs[0])
    node = _producer(_uncast(weights, rounded=True))
    if _softmaxed(node) is not None and _softmaxed(node) is values:
        if not _are_apart(ranked):
            return None
        return Routing(indices, weights, k, experts, ranked, normalize=True)
    logits = _softmaxed(_producer(ranked))
    if logits is None or not _are_apart(logits):
        return None
    if _is_part(weights, values, ranked, indices):
        return Routing(indices, weights, k, experts, logits, normalize=False)
    if node is not None and is_op(node, "Div"):
        part, total = node.inputs
        if _is_part(part, values, ranked, indices) and _is_sum_over_last(total, part):
            return Routing(indices, weights, k, experts, logits, normalize=True)
    return None


def _are_apart(logits: ir.Value) -> bool:
    """Returns whether logits are products of the tokens, or inputs, that nothing makes equal."""
    value = _uncast(logits)
    node = value.producer()
    while node is not None and is_op(node, *_KEEP_APART):
        scales = is_op(node, "Div", "Mul")
        computed = [each for each in node.inputs if each and not _is_known(each, scales)]
        if len(computed) != 1:
            return False
        value = _uncast(computed[0])
        node = value.producer()
    return node is None or is_op(node, "MatMul", "Gemm") or ops.is_op(node, "MatMulNBits")


def _is_known(value: ir.Value, scales: bool) -> bool:
    """Returns whether a value is a constant without infinities and, where it scales, without 0."""
    tensor = constant(value)
    if tensor is None:
        return False
    numbers = tensor.numpy()
    return bool(np.isfinite(numbers).all() and (numbers.all() or not scales))


def _uncast(value: ir.Value, *, rounded: bool = False) -> ir.Value:
    """Returns what a value was before it was cast from one floating-point type to another.

    Args:
        value: The value.
        rounded: Whether casts count too that make values equal which were not.
    """
    node = value.producer()
    while node is not None and is_op(node, "Cast", "Identity") and node.inputs[0] is not None:
        if is_op(node, "Cast"):
            before, after = type_of(node.inputs[0]), ops.cast_type(node)
            if before is None or after is None:
                break
            if not (before.is_floating_point() and after.is_floating_point()):
                break
            if after != before and after.bitwidth <= before.bitwidth and not rounded:
                break
        value = node.inputs[0]
        node = value.producer()
    return value


def _softmaxed(node: ir.Node | None) -> ir.Value | None:
    """Returns what a node computes the softmax of along the last axis, or None."""
    if node is None or not is_op(node, "Softmax") or node.inputs[0] is None:
        return None
    return _uncast(node.inputs[0]) if is_last_axis(node, node.outputs[0]) else None


def _is_part(value: ir.Value | None, values: ir.Value, ranked: ir.Value, indices: ir.Value) -> bool:
    """Returns whether a value is the chosen part of what was ranked."""
    if value is None:
        return False
    value = _uncast(value, rounded=True)
    node = value.producer()
    gathered = (
        node is not None
        and is_op(node, "GatherElements")
        and node.inputs[0] is not None
        and _uncast(node.inputs[0]) is ranked
        and node.inputs[1] is indices
        and is_last_axis(node, indices, default=0)
    )
    return value is values or gathered


def _is_sum_over_last(total: ir.Value | None, part: ir.Value | None) -> bool:
    node = _producer(total)
    return (
        node is not None
        and is_op(node, "ReduceSum")
        and node.inputs[0] is part
        and keeps_last_axis(node)
    )


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
