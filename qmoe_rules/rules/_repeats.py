"""Tokens and their experts in one long row: what flattening and repeating make of them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.rules._facts import axis_of, constant, producer, same_size, scalar

__all__ = [
    "column",
    "regrouped",
    "repeated_tokens",
    "sizes",
    "unflattened",
    "without_casts",
]


def sizes(value: ir.Value) -> tuple[int | None, ...] | None:
    """Returns the sizes of a value, from the Reshape that makes it or else from its shape."""
    known = ops.static_shape(value)
    node = producer(value, "Reshape")
    wanted = None if node is None else _asked(node)
    if wanted is None:
        return known
    asked = tuple(size if size > 0 else None for size in wanted)
    if known is None or len(known) != len(asked):
        return asked
    return tuple(a if a is not None else b for a, b in zip(asked, known, strict=True))


def _asked(reshape: ir.Node) -> list[int] | None:
    """Returns the constant shape that a Reshape asks for, or None.

    Before opset 5 it is an attribute, and no such model is fused.
    """
    return _integers(reshape.inputs[1]) if len(reshape.inputs) > 1 else None


def _integers(value: ir.Value | None) -> list[int] | None:
    """Returns the integers that a constant holds, or None."""
    tensor = None if value is None else constant(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().ravel()]


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def without_casts(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """Reads through casts to other floating-point types; returns what was cast, and the nodes."""
    nodes: list[ir.Node] = []
    while (node := producer(value, "Cast")) is not None:
        if ops.cast_type(node) not in _FLOATS:
            break
        nodes.append(node)
        value = node.inputs[0]
    return value, nodes


def unflattened(value: ir.Value | None) -> ir.Value | None:
    """Returns what a value is all elements of, in their order along one axis, or None."""
    node = producer(value, "Reshape")
    return node.inputs[0] if node is not None and _asked(node) == [-1] else None


def column(value: ir.Value | None) -> ir.Value | None:
    """Returns what a value is all elements of, in their order in one column, or None."""
    node = producer(value, "Unsqueeze")
    if node is not None and axis_of(node) in (-1, 1):
        return unflattened(node.inputs[0])
    node = producer(value, "Reshape")
    return node.inputs[0] if node is not None and _asked(node) == [-1, 1] else None


def regrouped(value: ir.Value) -> ir.Value:
    """Returns what only got other axes, with all its elements in their order."""
    while (node := producer(value, "Flatten", "Reshape", "Squeeze", "Unsqueeze")) is not None:
        if node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


def repeated_tokens(value: ir.Value, k: int) -> ir.Value | None:
    """Returns [T, H] where a value [T * k, H] is each of its rows k times in a row, or None."""
    source = _repeated(value, k, 2) or _picked(value, k)
    if source is None and k == 1:
        source = value
    return source if source is not None and len(sizes(source) or ()) == 2 else None


def _picked(value: ir.Value, k: int) -> ir.Value | None:
    """Returns [T, H] where its rows 0, 0, 1, 1, ... are gathered, each k times."""
    node = producer(value, "GatherND", "Gather")
    if node is None or node.inputs[0] is None:
        return None
    if node.attributes.get_int("batch_dims" if node.op_type == "GatherND" else "axis", 0):
        return None
    rows: ir.Value | None = node.inputs[1]
    if node.op_type == "GatherND":
        unsqueeze = producer(rows, "Unsqueeze")
        if unsqueeze is None or axis_of(unsqueeze) not in (-1, 1):
            return None
        rows = unsqueeze.inputs[0]
    numbers = None if rows is None else _repeated(rows, k, 1)
    count = producer(numbers, "Range")
    if numbers is None or count is None or scalar(count.inputs[0]) != 0:
        return None
    if scalar(count.inputs[2]) != 1 or not _same_length(numbers, node.inputs[0]):
        return None
    return node.inputs[0]


def _repeated(value: ir.Value, k: int, rank: int) -> ir.Value | None:
    """Returns a source of this rank where a value is each of its elements k times in a row.

    That is Unsqueeze along axis 1, Expand to k along it, and Reshape.
    """
    reshape = producer(value, "Reshape")
    expand = None if reshape is None else producer(reshape.inputs[0], "Expand")
    unsqueeze = None if expand is None else producer(expand.inputs[0], "Unsqueeze")
    if expand is None or unsqueeze is None or axis_of(unsqueeze) != 1:
        return None
    source = unsqueeze.inputs[0]
    shape = None if source is None else sizes(source)
    flat = sizes(value)
    if source is None or shape is None or flat is None or len(shape) != rank:
        return None
    if len(flat) != rank or flat[1:] != shape[1:] or None in shape[1:]:
        return None
    return source if _expands(expand, source, shape, k) else None


def _expands(node: ir.Node, source: ir.Value, shape: Sequence[int | None], k: int) -> bool:
    """Returns whether Expand makes [T, k, ...] of [T, 1, ...], T and the rest as in the source."""
    wanted = _integers(node.inputs[1])
    if wanted is not None:
        axes = zip(wanted, (shape[0], k, *shape[1:]), strict=True)
        return (
            len(wanted) == len(shape) + 1 and wanted[1] == k and all(a in (1, b) for a, b in axes)
        )
    made = node.outputs[0].shape
    if made is None or tuple(made[1:]) != (k, *shape[1:]):
        return False
    return _same_length(node.outputs[0], source)


def _same_length(first: ir.Value, second: ir.Value) -> bool:
    """Returns whether the first axes of two values are known to have the same size."""
    if first.shape is None or second.shape is None:
        return False
    return same_size(first.shape[0], second.shape[0])
