"""What can be proven about a value from how it is computed: sizes, signs, tokens, constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from qmoe_rules import ops

__all__ = [
    "axis_of",
    "both_ways",
    "constant",
    "is_last_axis",
    "is_op",
    "keeps_last_axis",
    "last_size",
    "not_negative",
    "number",
    "over_last_axis",
    "producer",
    "rank",
    "same_size",
    "same_tokens",
    "scalar",
    "top_k",
    "type_of",
]

# Elements of a constant that is looked at.
_SMALL = 1 << 16


def axis_of(node: ir.Node) -> float | None:
    """Returns the only one of a node's `axes`, or None.

    They are an input, or an attribute before opset 13.
    """
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is not None:
        return scalar(axes)
    given = node.attributes.get_ints("axes", ())
    return given[0] if len(given) == 1 else None


def over_last_axis(node: ir.Node, value: ir.Value | None) -> bool:
    """Returns whether a node's `axes` are just the last axis of a value."""
    return axis_of(node) in (-1, (rank(value) or 0) - 1)


_NEVER_NEGATIVE = {"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"}
# Operators that are not negative where all their inputs are not, or the first inputs.
_KEEP_SIGN = {
    "Add": None, "Cast": 1, "Concat": None, "Div": None, "Expand": 1, "Flatten": 1, "Gather": 1,
    "GatherElements": 1, "GatherND": 1, "Identity": 1, "Max": None, "Min": None, "Mul": None,
    "ReduceMax": 1, "ReduceMean": 1, "ReduceMin": 1, "ReduceSum": 1, "Reshape": 1, "Slice": 1,
    "Split": 1, "Squeeze": 1, "Sum": None, "TopK": 1, "Transpose": 1, "Unsqueeze": 1,
}  # fmt: skip


def not_negative(value: ir.Value) -> bool:
    """Returns whether a value is proven to have no negative element, from how it is computed."""
    pending: list[ir.Value | None] = [value]
    seen = set()
    while pending:
        current = pending.pop()
        if current is None:
            return False
        if current in seen or current.dtype == ir.DataType.BOOL:
            continue
        seen.add(current)
        tensor = constant(current)
        if tensor is not None:
            if tensor.size > _SMALL or not (tensor.numpy() >= 0).all():
                return False
            continue
        node = current.producer()
        if node is None or node.domain != "":
            return False
        if node.op_type in _NEVER_NEGATIVE:
            continue
        if node.op_type == "Where":
            pending += node.inputs[1:]
        elif node.op_type == "ScatterElements":
            pending += [node.inputs[0], node.inputs[2]]
        elif node.op_type in _KEEP_SIGN:
            pending += node.inputs[: _KEEP_SIGN[node.op_type]]
        else:
            return False
    return True


# Operators whose outputs have the leading axes of their inputs, which are broadcast.
_ROW_WISE = {
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min",
    "Mul", "Or", "Sub", "Where",
}  # fmt: skip
_FIRST_ROW_WISE = {
    "Abs", "Cast", "Clip", "Exp", "Gemm", "Identity", "LayerNormalization", "Log", "MatMul",
    "RMSNormalization", "ReduceMax", "ReduceSum", "Relu", "ScatterElements", "Sigmoid",
    "SimplifiedLayerNormalization", "Softmax", "Softplus", "Sqrt", "TopK",
}  # fmt: skip
# A router is small: a longer search has left it.
_SEARCHED = 100


def same_tokens(value: ir.Value, source: ir.Value) -> bool:
    """Returns whether values [..., a] and [..., b] are known to have the same leading axes."""
    return _has_rows_of(value, source, {})


def _has_rows_of(value: ir.Value | None, source: ir.Value, seen: dict[ir.Value, bool]) -> bool:
    """Returns whether a value is known to have the leading axes of a source."""
    if value is None or value is source:
        return value is source
    if value in seen or len(seen) == _SEARCHED:
        return seen.get(value, False)
    known = _same_leading(value, source)
    seen[value] = bool(known)
    node = value.producer()
    if known is None and node is not None:
        seen[value] = _rows_are_of(node, source, seen)
    return seen[value]


def _same_leading(value: ir.Value, source: ir.Value) -> bool | None:
    """Returns whether shapes say that leading axes are the same, None where they do not say."""
    if value.shape is None or source.shape is None:
        return None
    pairs = list(zip(value.shape[:-1], source.shape[:-1], strict=False))
    if len(value.shape) != len(source.shape):
        return False
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        return False
    return True if all(same_size(a, b) for a, b in pairs) else None


def _rows_are_of(node: ir.Node, source: ir.Value, seen: dict[ir.Value, bool]) -> bool:
    """Returns whether the outputs of an operator have the leading axes of a source."""
    if is_op(node, "GatherElements"):
        return _has_rows_of(node.inputs[1], source, seen)
    if is_op(node, "ReduceMax", "ReduceSum") and not keeps_last_axis(node):
        return False
    if is_op(node, "Concat", "TopK") and not _is_along_last_axis(node):
        return False
    if is_op(node, "Concat"):
        return all(_has_rows_of(each, source, seen) for each in node.inputs)
    if is_op(node, "MatMul") and rank(node.inputs[1]) != 2:
        return False
    if is_op(node, "Gemm") and node.attributes.get_int("transA", 0) != 0:
        return False
    if is_op(node, *_FIRST_ROW_WISE) or ops.is_op(node, "MatMulNBits"):
        return _has_rows_of(node.inputs[0], source, seen)
    if not is_op(node, *_ROW_WISE):
        return False
    many = [each for each in node.inputs if not _is_one_row(each, source)]
    return bool(many) and all(_has_rows_of(each, source, seen) for each in many)


def _is_one_row(value: ir.Value | None, source: ir.Value) -> bool:
    """Returns whether broadcasting a value to the rows of a source gives no more rows, nor axes."""
    shape = ops.static_shape(value)
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is not None:
        shape = tuple(tensor.shape.numpy())
    return (
        shape is not None
        and all(size == 1 for size in shape[:-1])
        and len(shape) <= max(rank(source) or 1, 1)
    )


def same_size(first: Any, second: Any) -> bool:
    """Returns whether two sizes of shapes are known to be the same."""
    return first == second and not (isinstance(first, ir.SymbolicDim) and first.value is None)


_SAME_SHAPE = {
    "Abs", "Cast", "Clip", "Exp", "Identity", "Log", "Neg", "Relu", "ScatterElements", "Sigmoid",
    "Softmax", "Softplus", "Sqrt",
}  # fmt: skip


def last_size(value: ir.Value | None, depth: int = 8) -> int | None:
    """Returns the size of a value's last axis, from its shape or from what computes it.

    Args:
        value: The value.
        depth: How many nodes back to look.
    """
    shape = ops.static_shape(value)
    if shape and shape[-1] is not None:
        return shape[-1]
    node = None if value is None else value.producer()
    if node is not None and ops.is_op(node, "MatMulNBits"):
        return node.attributes.get_int("N")
    if node is None or node.domain != "" or not depth:
        return None
    if node.op_type == "Gemm":
        weight = ops.static_shape(node.inputs[1])
        return weight[0 if node.attributes.get_int("transB") else 1] if weight else None
    if node.op_type == "TopK":
        return top_k(node) if _is_along_last_axis(node) else None
    if node.op_type == "MatMul" and rank(node.inputs[1]) in (None, 1):
        return None  # a vector takes the axis away
    if node.op_type in ("MatMul", "GatherElements"):
        return last_size(node.inputs[1], depth - 1)
    if node.op_type == "ReduceSum":
        return 1 if keeps_last_axis(node) else None
    sizes = [last_size(source, depth - 1) for source in node.inputs]
    if node.op_type in _SAME_SHAPE:
        return sizes[0]
    if node.op_type == "Concat" and _is_along_last_axis(node) and None not in sizes:
        return sum(size for size in sizes if size is not None)
    if node.op_type in ("Add", "Mul", "Sub", "Div", "Where"):
        wide = set(sizes) - {None, 1}
        if not wide and None not in sizes:
            return 1
        return wide.pop() if len(wide) == 1 else None
    return None


def is_op(node: ir.Node, *op_types: str) -> bool:
    """Returns whether a node is one of these operators of the standard domain."""
    return node.domain == "" and node.op_type in op_types


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Returns the node of one of these operators that computes a value, or None."""
    node = None if value is None else value.producer()
    return node if node is not None and is_op(node, *op_types) else None


def both_ways(node: ir.Node | None) -> tuple[Sequence[Any], ...]:
    """Returns the two operands of a node in both orders, nothing where there is no node."""
    return () if node is None else (tuple(node.inputs), tuple(node.inputs)[::-1])


def rank(value: ir.Value | None) -> int | None:
    """Returns how many axes a value has, None where that is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def is_last_axis(node: ir.Node, value: ir.Value | None, default: int = -1) -> bool:
    """Returns whether a node's `axis`, `default` where it is left out, is a value's last one."""
    axis = node.attributes.get_int("axis", default)
    return axis == -1 or axis == (rank(value) or 0) - 1


def _is_along_last_axis(node: ir.Node) -> bool:
    """Returns whether a node's `axis` is the last one of what it reads and makes."""
    return any(is_last_axis(node, value) for value in (node.inputs[0], node.outputs[0]))


def keeps_last_axis(node: ir.Node) -> bool:
    """Returns whether a node reduces the last axis, and only that, to size 1."""
    return over_last_axis(node, node.inputs[0]) and node.attributes.get_int("keepdims", 1) == 1


def scalar(value: ir.Value | None) -> float | None:
    """Returns the one number that a constant holds, or None."""
    tensor = None if value is None else constant(value)
    # Broadcasting more axes could give the result more, too.
    if tensor is None or tensor.size != 1 or len(tensor.shape) > 1:
        return None
    number: float = tensor.numpy().item()
    return number


def top_k(node: ir.Node) -> int | None:
    """Returns how many a TopK chooses, or None.

    It is an input, or an attribute before opset 10.
    """
    if len(node.inputs) < 2:
        return node.attributes.get_int("k", None)
    k = scalar(node.inputs[1])
    return None if k is None else int(k)


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    """Returns the numbers that a value has in every run, or None."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or value.is_graph_input() or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor


# Operators whose type is that of all inputs, or of the first input.
_SAME_TYPE = ("Add", "Div", "Gemm", "MatMul", "Mul", "Sub")
_FIRST_TYPE = (
    "GatherElements", "Identity", "ReduceSum", "Reshape", "Sigmoid", "Softmax", "Squeeze", "TopK",
    "Unsqueeze",
)  # fmt: skip


def type_of(value: ir.Value | None, depth: int = 16) -> ir.DataType | None:
    """Returns the element type of a value, from its declaration or from what computes it."""
    if value is None or value.dtype is not None or not depth:
        return None if value is None else value.dtype
    node = value.producer()
    if node is None:
        return None
    if is_op(node, "Cast"):
        return ops.cast_type(node)
    if is_op(node, *_SAME_TYPE):
        found = (type_of(source, depth - 1) for source in node.inputs)
        return next((dtype for dtype in found if dtype is not None), None)
    if is_op(node, *_FIRST_TYPE) or ops.is_op(node, "MatMulNBits"):
        return type_of(node.inputs[0], depth - 1) if value.index() == 0 else ir.DataType.INT64
    return None


def number(value: ir.Value | None) -> float | None:
    """Returns the one number that a value is known to be: a constant, or a size that is known."""
    node = producer(value, "Shape")
    shape = None if node is None else ops.static_shape(node.inputs[0])
    if node is None or shape is None:
        return scalar(value)
    sizes = shape[node.attributes.get_int("start") : node.attributes.get_int("end")]
    return sizes[0] if len(sizes) == 1 else None
