"""An expert's feed-forward block: which linear maps it has, and what it computes between them.

The families of expert graphs differ in how a linear map looks (one MatMul per expert, a gathered
batch of matrices, MatMulNBits), and agree in what lies between the maps. So the family says what a
linear map is, and `match_mlp` reads the rest: `down(activation(gate(x)) * (up(x) + beta))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.rules._facts import is_last_axis, last_size, number, producer, rank, scalar

__all__ = ["ALL", "EVEN", "FIRST_HALF", "MLP", "ODD", "SECOND_HALF", "Linear", "match_mlp"]

# Which output columns of a linear map are read.
ALL, FIRST_HALF, SECOND_HALF, EVEN, ODD = "all", "first half", "second half", "even", "odd"

# Of float16.
_LOWEST = -65504.0

T = TypeVar("T")


@dataclass(frozen=True)
class Linear(Generic[T]):
    """A linear map in the graph.

    Attributes:
        source: What it is applied to.
        weight: What the family knows about its weight and bias.
    """

    source: ir.Value
    weight: T


@dataclass(frozen=True)
class MLP(Generic[T]):
    """An expert.

    Attributes:
        source: The hidden states that the expert is applied to.
        gate: The map under the activation, and which of its columns.
        up: The map that the activation multiplies, or None where there is none.
        down: The map back.
        activation: What MoE calls the activation.
        alpha: swiglu's factor inside the sigmoid.
        beta: What swiglu adds to the linear half.
        limit: swiglu's clamp, or None.
        nodes: The nodes between the maps.
    """

    source: ir.Value
    gate: tuple[T, str]
    up: tuple[T, str] | None
    down: T
    activation: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    nodes: tuple[ir.Node, ...] = field(default=())


Recognizer = Callable[[ir.Value], Linear[T] | None]


def match_mlp(output: ir.Value, linear: Recognizer[T]) -> MLP[T] | str:
    """Reads an expert backwards from its output.

    Args:
        output: What the expert computes, before it is weighted.
        linear: Returns the linear map that computes a value, or None.

    Returns:
        The expert, or why it is none that MoE can compute.
    """
    return _Reader(linear).read(output)


class _Reader(Generic[T]):
    """One reading: collects the nodes that it went through."""

    def __init__(self, linear: Recognizer[T]) -> None:
        self._linear = linear
        self._nodes: list[ir.Node] = []

    def read(self, output: ir.Value) -> MLP[T] | str:
        down = self._linear(output)
        if down is None:
            return f"{output.name} is not computed by a linear map with constant weights"
        hidden = self._node(down.source)
        if hidden is None:
            return f"{down.source.name} is not computed by an activation"
        if hidden.op_type == "Mul":
            for gate_side, up_side in (hidden.inputs, hidden.inputs[::-1]):
                found = self._gated(gate_side, up_side, down)
                if found is not None:
                    return found
        return self._plain(down)

    def _gated(
        self, gate_side: ir.Value | None, up_side: ir.Value | None, down: Linear[T]
    ) -> MLP[T] | str | None:
        """Reads activation(gate) * (up + beta), or returns None where it is not that."""
        kept = len(self._nodes)
        gate = self._activation(gate_side)
        up = self._shifted(up_side)
        if gate is None or up is None:
            del self._nodes[kept:]
            return None
        activation, alpha, gate_value, gate_limit = gate
        up_value, beta, up_limit = up
        gate_map, up_map = self._part(gate_value), self._part(up_value)
        if gate_map is None or up_map is None:
            del self._nodes[kept:]
            return None
        (first, gate_columns), (second, up_columns) = gate_map, up_map
        if first.source is not second.source:
            return "gate and up are not applied to the same hidden states"
        if gate_limit != up_limit:
            return f"the gate is clamped at {gate_limit}, and the linear half at {up_limit}"
        if activation != "swiglu" and (beta or gate_limit is not None):
            return f"{activation} with a clamp or a shift has no equal among MoE's activations"
        return MLP(
            first.source,
            (first.weight, gate_columns),
            (second.weight, up_columns),
            down.weight,
            activation,
            alpha,
            beta,
            gate_limit,
            tuple(self._nodes),
        )

    def _plain(self, down: Linear[T]) -> MLP[T] | str:
        """Reads activation(gate) with nothing to multiply."""
        gate = self._activation(down.source)
        kind = {"swiglu": "silu", "geglu": "gelu"}
        if gate is not None:
            activation, alpha, value, limit = gate
            inner = self._linear(value)
            if inner is not None and alpha == 1.0 and limit is None:
                name = kind.get(activation, activation)
                nodes = tuple(self._nodes)
                return MLP(inner.source, (inner.weight, ALL), None, down.weight, name, nodes=nodes)
        return f"what {down.source.name} computes is no activation of MoE"

    def _activation(
        self, value: ir.Value | None
    ) -> tuple[str, float, ir.Value, float | None] | None:
        """Returns (activation, alpha, its argument before the clamp, the clamp)."""
        node = self._node(value)
        if node is None:
            return None
        argument = node.inputs[0]
        if argument is not None and _is_tanh_gelu(node):
            return "geglu", 1.0, argument, None
        if argument is not None and node.op_type == "Relu":
            return "relu", 1.0, argument, None
        if node.op_type in ("Swish", "QuickGelu"):
            alpha = node.attributes.get_float(
                "alpha", 1.702 if node.op_type == "QuickGelu" else 1.0
            )
            return self._clamped("swiglu", alpha, argument)
        if node.op_type != "Mul":
            return None
        for argument, gate in (node.inputs, node.inputs[::-1]):
            alpha_of_sigmoid = self._sigmoid_of(gate, argument)
            if alpha_of_sigmoid is not None:
                return self._clamped("swiglu", alpha_of_sigmoid, argument)
        return None

    def _sigmoid_of(self, value: ir.Value | None, argument: ir.Value | None) -> float | None:
        """Returns alpha where a value is Sigmoid(alpha * argument)."""
        sigmoid = self._node(value, "Sigmoid")
        if sigmoid is None:
            return None
        inner = sigmoid.inputs[0]
        if inner is argument:
            return 1.0
        product = self._node(inner, "Mul")
        for source, factor in () if product is None else (product.inputs, product.inputs[::-1]):
            alpha = scalar(factor)
            if source is argument and alpha is not None:
                return alpha
        return None

    def _clamped(
        self, activation: str, alpha: float, value: ir.Value | None
    ) -> tuple[str, float, ir.Value, float | None] | None:
        """Reads through min(value, limit), written as Min or as Clip without a lower bound."""
        if value is None:
            return None
        node = self._node(value)
        if node is not None and node.op_type == "Min" and len(node.inputs) == 2:
            for source, bound in (node.inputs, node.inputs[::-1]):
                limit = scalar(bound)
                if limit is not None and source is not None:
                    return activation, alpha, source, limit
        if node is not None and node.op_type == "Clip" and node.inputs[0] is not None:
            low, limit = _bounds(node)
            if low == -math.inf and limit != math.inf:
                return activation, alpha, node.inputs[0], limit
        return activation, alpha, value, None

    def _shifted(self, value: ir.Value | None) -> tuple[ir.Value, float, float | None] | None:
        """Reads clip(up, -limit, limit) + beta; returns (up, beta, limit)."""
        node = self._node(value)
        beta = 0.0
        if node is not None and node.op_type == "Add":
            for source, shift in (node.inputs, node.inputs[::-1]):
                number = scalar(shift)
                if number is not None:
                    value, beta = source, number
                    break
        node = self._node(value)
        if node is not None and node.op_type == "Clip" and node.inputs[0] is not None:
            low, limit = _bounds(node)
            if low == -limit:
                return node.inputs[0], beta, limit
        return None if value is None else (value, beta, None)

    def _part(self, value: ir.Value) -> tuple[Linear[T], str] | None:
        """Returns the map that computes a value, and which of its columns the value is."""
        whole = self._linear(value)
        if whole is not None:
            return whole, ALL
        node = self._node(value)
        if node is None or node.inputs[0] is None:
            return None
        inner = self._linear(node.inputs[0])
        columns = _columns(node, value)
        # Bounds may be sizes of values that go with the expert.
        self._nodes += filter(None, (producer(bound, "Shape") for bound in node.inputs[1:]))
        return None if inner is None or columns is None else (inner, columns)

    def _node(self, value: ir.Value | None, op_type: str | None = None) -> ir.Node | None:
        """Returns the producer of a value and remembers it as a part of the expert."""
        node = None if value is None else value.producer()
        if node is None or node.domain not in ("", ops.DOMAIN) or not node.inputs:
            return None
        if op_type is not None and node.op_type != op_type:
            return None
        self._nodes.append(node)
        return node


def _is_tanh_gelu(node: ir.Node) -> bool:
    """Returns whether a node is the tanh form of gelu, the only one that MoE has."""
    if node.op_type == "FastGelu":
        return len(node.inputs) < 2 or node.inputs[1] is None
    return node.op_type == "Gelu" and node.attributes.get_string("approximate", "") == "tanh"


def _bounds(node: ir.Node) -> tuple[float, float]:
    """Returns Clip's bounds; an input that is missing does not bind, and neither does the lowest.

    Exporters write the lowest finite number of the type for "no bound".
    """
    found = [-math.inf, math.inf]
    for position, bound in enumerate(node.inputs[1:3]):
        if bound is not None:
            number = scalar(bound)
            if number is None:
                return math.nan, math.nan
            found[position] = number
    low, high = found
    return (-math.inf if low <= _LOWEST else low), high


def _columns(node: ir.Node, value: ir.Value) -> str | None:
    """Returns which columns of its input Split or Slice hands on, or None."""
    if node.op_type == "Split":
        return _columns_of_split(node, value)
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    start, end, axis = (number(bound) for bound in node.inputs[1:4])
    step = number(node.inputs[4]) if len(node.inputs) > 4 else 1
    if start is None or end is None or axis not in (-1, (rank(value) or 0) - 1):
        return None
    width = last_size(node.inputs[0])
    if step == 2 and end >= (width or 2**31 - 1):
        return {0: EVEN, 1: ODD}.get(int(start))
    if step != 1 or width is None:
        return None
    halves = {(0, width / 2): FIRST_HALF, (width / 2, width): SECOND_HALF}
    return halves.get((start, min(end, width)))


def _columns_of_split(node: ir.Node, value: ir.Value) -> str | None:
    if not is_last_axis(node, value, default=0) or len(node.outputs) != 2:
        return None
    sizes = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if sizes is None else ir.convenience.get_const_tensor(sizes)
    if sizes is not None and (
        tensor is None or sizes.is_graph_input() or len(set(tensor.numpy().tolist())) != 1
    ):
        return None
    return FIRST_HALF if value.index() == 0 else SECOND_HALF
