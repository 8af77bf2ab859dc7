"""Experts that are cut out of stacked weights one by one and all compute every token -> MoE.

The sum of the experts' outputs is a chain as `_chain` tells it, but for the weights: that of expert
e is the sum over the k columns of `weights[:, j] * (indices[:, j] == e)`. Both sums may start from
zeros. The stacked weights are what MoE wants already, up to the order of gate and up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qmoe_rules.rules._chain import ChainRule, Map, Term
from qmoe_rules.rules._experts import Parts, transposed
from qmoe_rules.rules._facts import axis_of, both_ways, last_size, producer, rank, scalar
from qmoe_rules.rules._fusing import Block
from qmoe_rules.rules._mlp import Linear
from qmoe_rules.rules._repeats import sizes, without_casts
from qmoe_rules.weights import resolve

__all__ = ["FuseUnrolledExperts"]


class FuseUnrolledExperts(ChainRule[Map]):
    """The rule; the attributes of a map are its index and whether it is stored [K, N]."""

    def claims(self, value: ir.Value) -> bool:
        """Takes what a matrix computes that is cut out of a stack."""
        return self.linear(value) is not None

    def term(self, value: ir.Value | None) -> Term | None:
        """Reads `expert(x) * weight`."""
        product = producer(value, "Mul")
        for output, column in both_ways(product):
            if product is None or producer(output, "MatMul") is None:
                continue
            weight, nodes = _without_column(column)
            found = None if weight is None else _weight(weight)
            if found is not None:
                slot, inner = found
                return Term(
                    slot.expert,
                    output,
                    slot.indices,
                    slot.weights,
                    nodes=(product, *nodes, *inner),
                    mask=slot.mask,
                )
        return None

    def linear(self, value: ir.Value) -> Linear[Map] | None:
        """Reads MatMul(x, W[e]) and MatMul(x, Transpose(W[e]))."""
        product = producer(value, "MatMul")
        if product is None or product.inputs[0] is None:
            return None
        matrix, nodes = product.inputs[1], [product]
        transpose = producer(matrix, "Transpose")
        if transpose is not None:
            if list(transpose.attributes.get_ints("perm", (1, 0))) != [1, 0]:
                return None
            matrix = transpose.inputs[0]
            nodes.append(transpose)
        squeeze = producer(matrix, "Squeeze")
        if squeeze is not None:
            if axis_of(squeeze) != 0:
                return None
            matrix = squeeze.inputs[0]
            nodes.append(squeeze)
        gather = producer(matrix, "Gather")
        if gather is None or gather.inputs[0] is None or gather.attributes.get_int("axis", 0) != 0:
            return None
        index = scalar(gather.inputs[1])
        if index is None or rank(gather.inputs[1]) != (0 if squeeze is None else 1):
            return None
        attributes = (int(index), transpose is None)
        return Linear(product.inputs[0], Map((gather.inputs[0],), attributes, (*nodes, gather)))

    def parts(self, maps: Sequence[Map]) -> Parts | str:
        """Returns the stack that the experts are cut out of."""
        (stack,) = maps[0].constants
        for index, found in enumerate(maps):
            if found.constants[0] is not stack:
                return f"expert {index} and expert 0 are cut out of different weights"
            if found.attributes != (index, maps[0].attributes[1]):
                return f"expert {index} has the weights of expert {found.attributes[0]}"
        if stack is None:
            raise AssertionError("a map has a weight")
        weights = resolve(stack)
        if isinstance(weights, str):
            return weights
        if len(weights.shape) != 3:
            return f"{stack.name} has shape {list(weights.shape)}, not [E, N, K]"
        return {"weights": transposed(weights) if maps[0].attributes[1] else weights}

    def find(self, node: ir.Node) -> Block | str | None:
        """Returns the experts of a chain, whose zeros add nothing where they are no larger."""
        block = super().find(node)
        if not isinstance(block, Block):
            return block
        zeros = _zeros(block.rest, end=None)
        if zeros is not None:
            block = dataclasses.replace(block, nodes=[*block.nodes, *zeros], rest=None)
        source = block.experts.source
        if rank(source) != 2:
            return f"the experts' input {source.name} is not 2-D"
        for each in block.nodes:
            shape = producer(each.inputs[0], "Shape") if each.op_type == "ConstantOfShape" else None
            if shape is not None and shape.inputs[0] is not source:
                return f"the zeros {each.outputs[0].name} are not known to be like {source.name}"
        return block


def _without_column(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """Reads through what makes [T, 1] of [T]; returns None where a value is not that."""
    value, nodes = without_casts(value)
    node = producer(value, "Reshape", "Unsqueeze")
    if node is None:
        return None, []
    if node.op_type == "Unsqueeze":
        is_column = axis_of(node) in (-1, 1)
    else:
        shape = sizes(node.outputs[0]) or ()
        is_column = len(shape) == 2 and shape[1] == 1
    return (node.inputs[0], [*nodes, node]) if is_column else (None, [])


@dataclass(frozen=True)
class _Slot:
    """What a column of the weights adds to the weight of an expert.

    Attributes:
        expert: The expert.
        indices: The chosen experts, [T, k].
        weights: Their weights, [T, k].
        column: Which column.
        mask: 1 where the column is about this expert and 0 elsewhere.
        nodes: The nodes that compute it.
    """

    expert: int
    indices: ir.Value
    weights: ir.Value
    column: int
    mask: ir.Node
    nodes: tuple[ir.Node, ...]

    def shares_routing(self, other: _Slot) -> bool:
        """Returns whether another slot belongs to the weight of the same expert."""
        mine, others = ((each.expert, each.indices, each.weights) for each in (self, other))
        return mine == others


def _weight(value: ir.Value) -> tuple[_Slot, list[ir.Node]] | None:
    """Reads the weight of one expert, a sum of slots; returns one of them, and all nodes."""
    nodes: list[ir.Node] = []
    slots: list[_Slot] = []
    pending: list[ir.Value | None] = [value]
    while pending:
        current = pending.pop()
        add, zeros = producer(current, "Add"), _zeros(current, end=1)
        if add is not None:
            nodes.append(add)
            pending += add.inputs
        elif zeros is not None:
            nodes += zeros
        else:
            slot = _slot(current)
            if slot is None or not slot.shares_routing(slots[0] if slots else slot):
                return None
            slots.append(slot)
            nodes += slot.nodes
    if not slots or rank(slots[0].indices) != 2 or rank(slots[0].weights) != 2:
        return None
    if sorted(slot.column for slot in slots) != list(range(last_size(slots[0].indices) or 0)):
        return None
    return slots[0], nodes


def _slot(value: ir.Value | None) -> _Slot | None:
    """Reads `weights[:, j] * (indices[:, j] == e)`."""
    product = producer(value, "Mul")
    for mask, weight in both_ways(product):
        cast = producer(mask, "Cast", "CastLike")
        equal = None if cast is None else producer(cast.inputs[0], "Equal")
        weights = _column_of(weight)
        if product is None or cast is None or equal is None or weights is None:
            continue
        for index, number in both_ways(equal):
            expert, indices = scalar(number), _column_of(index)
            if expert is None or expert % 1 or indices is None:
                continue
            if indices[1] == weights[1]:
                nodes = (product, cast, equal)
                return _Slot(int(expert), indices[0], *weights, cast, nodes)
    return None


def _column_of(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Returns (m, j) where a value is m[:, j], or None."""
    squeeze = producer(value, "Squeeze")
    cut = None if squeeze is None else producer(squeeze.inputs[0], "Slice")
    if squeeze is None or cut is None or cut.inputs[0] is None:
        return None
    if len(cut.inputs) < 4:
        return None
    start, end, axis = (scalar(bound) for bound in cut.inputs[1:4])
    axes = (axis, axis_of(squeeze))
    if start is None or start < 0 or end != start + 1 or any(each not in (-1, 1) for each in axes):
        return None
    return cut.inputs[0], int(start)


def _zeros(value: ir.Value | None, end: int | None) -> list[ir.Node] | None:
    """Returns the nodes that make zeros of the shape of another value, or None.

    Args:
        value: The value.
        end: How many axes of the other value it has, None for all.
    """
    value, nodes = without_casts(value)
    filled = producer(value, "ConstantOfShape")
    shape = None if filled is None else producer(filled.inputs[0], "Shape")
    if filled is None or shape is None or shape.attributes.get_int("start", 0) != 0:
        return None
    if shape.attributes.get_int("end", None) != end:
        return None
    number = filled.attributes.get_tensor("value", None)
    return [*nodes, filled] if number is None or not number.numpy().any() else None
