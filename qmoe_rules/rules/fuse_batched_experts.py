"""Experts whose weights are gathered token by token, in one batched product -> MoE.

Every token is repeated k times, each copy meets the matrix of one of its experts, and the k
weighted results are summed. PyTorch exports a layer like this where it is told to use batched
products: without a loop, and with every weight a constant [E, N, K] or [E, K, N].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.report import Report
from qmoe_rules.rules._chain import Map, name_of
from qmoe_rules.rules._experts import Experts, Parts, assemble, transposed
from qmoe_rules.rules._facts import axis_of, both_ways, producer, rank
from qmoe_rules.rules._fusing import Block, FusingRule
from qmoe_rules.rules._mlp import MLP, Linear, match_mlp
from qmoe_rules.rules._repeats import (
    column,
    regrouped,
    repeated_tokens,
    sizes,
    unflattened,
    without_casts,
)
from qmoe_rules.rules._routing import Routing, routing_of, settled
from qmoe_rules.weights import resolve

__all__ = ["FuseBatchedExperts"]


@dataclass(frozen=True)
class _Gathered(Map):
    """A linear map whose weight and bias are gathered.

    Attributes:
        indices: The experts by token, before they are flattened.
    """

    indices: tuple[ir.Value, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class _Tail:
    """How the results of the chosen experts are weighted and summed.

    Attributes:
        output: The results, [T * k, H].
        weights: Their weights, before they are flattened.
        k: Experts per token.
        hidden: H as the sum's Reshape says it, None where it is not known.
        dtype: What the sum was cast to, None where it was not.
        nodes: The nodes that do it.
    """

    output: ir.Value
    weights: ir.Value
    k: int
    hidden: int | None
    dtype: ir.DataType | None
    nodes: tuple[ir.Node, ...]


class FuseBatchedExperts(FusingRule):
    """The rule for products with gathered weights."""

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self._dtype: ir.DataType | None = None

    def pattern(self, op: Any) -> Any:
        """Matches any ReduceSum; `find` looks at its axes."""
        return op.ReduceSum(_allow_other_inputs=True, _outputs=["result"])

    def find(self, node: ir.Node) -> Block | str | None:
        """Returns the experts whose results a node sums, and why they stay where they do."""
        tail = _tail_of(node)
        if tail is None:
            return None
        self._dtype = tail.dtype
        mlp = match_mlp(tail.output, _linear)
        if isinstance(mlp, str):
            return mlp
        experts = _experts(tail, mlp)
        if isinstance(experts, str):
            return experts
        nodes = [*tail.nodes, *mlp.nodes, *(each for map_ in _maps(mlp) for each in map_.nodes)]
        return Block(experts, nodes, name_of([mlp], node))

    def rewrite(self, op: Any, *args: Any, **bindings: Any) -> ir.Value:
        """Builds the node, and casts its output where the sum was computed in another type."""
        output = super().rewrite(op, **bindings)
        cast: ir.Value = output if self._dtype is None else op.Cast(output, to=self._dtype)
        return cast


def _tail_of(node: ir.Node) -> _Tail | None:
    """Returns how a ReduceSum ends a block, or None; in constant time."""
    if node.attributes.get_int("keepdims", 1) != 0 or axis_of(node) not in (1, -2):
        return None
    folded, after = without_casts(node.inputs[0])
    reshape = producer(folded, "Reshape")
    shape = () if folded is None else sizes(folded) or ()
    if reshape is None or len(shape) != 3 or shape[1] is None:
        return None
    weighted, before = without_casts(reshape.inputs[0])
    product = producer(weighted, "Mul")
    for result, weight in both_ways(product):
        weight, _ = without_casts(weight)
        output, inner = without_casts(result)
        weights = column(weight)
        if output is None or product is None or weights is None or _linear(output) is None:
            continue
        casts = (*after, *before, *inner)
        to = ops.cast_type(casts[0]) if casts else None
        return _Tail(output, weights, shape[1], shape[2], to, (node, reshape, product, *casts))
    return None


def _linear(value: ir.Value) -> Linear[_Gathered] | None:
    """Returns the product with gathered weights that computes a value, or None."""
    value, nodes = _without_pairs(value)
    value, bias = _without_bias(value)
    squeeze = producer(value, "Squeeze")
    product = None if squeeze is None else producer(squeeze.inputs[0], "MatMul")
    if squeeze is None or product is None:
        return None
    row_major = axis_of(squeeze) in (-1, 2)
    if not row_major and axis_of(squeeze) not in (-2, 1):
        return None
    weights, vectors = product.inputs if row_major else reversed(product.inputs)
    weight = _gathered(weights)
    unsqueeze = producer(vectors, "Unsqueeze")
    if weight is None or unsqueeze is None or unsqueeze.inputs[0] is None:
        return None
    if axis_of(unsqueeze) not in ((-1, 2) if row_major else (-2, 1)):
        return None
    nodes += [squeeze, product, unsqueeze, *weight.nodes, *(bias.nodes if bias else ())]
    constants = (weight.constant, bias.constant if bias else None)
    indices = (weight.indices, *([bias.indices] if bias else ()))
    return Linear(
        unsqueeze.inputs[0], _Gathered(constants, (not row_major,), tuple(nodes), indices)
    )


def _without_bias(value: ir.Value) -> tuple[ir.Value, _Rows | None]:
    """Reads through the addition of a gathered bias."""
    add = producer(value, "Add")
    for inner, other in both_ways(add):
        rows = _gathered(other)
        if add is not None and rows is not None:
            return inner, dataclasses.replace(rows, nodes=(*rows.nodes, add))
    return value, None


def _without_pairs(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """Reads through a Squeeze that undoes an Unsqueeze."""
    nodes: list[ir.Node] = []
    while True:
        squeeze = producer(value, "Squeeze")
        unsqueeze = None if squeeze is None else producer(squeeze.inputs[0], "Unsqueeze")
        if squeeze is None or unsqueeze is None or unsqueeze.inputs[0] is None:
            return value, nodes
        if axis_of(squeeze) is None or axis_of(squeeze) != axis_of(unsqueeze):
            return value, nodes
        nodes += [squeeze, unsqueeze]
        value = unsqueeze.inputs[0]


@dataclass(frozen=True)
class _Rows:
    """Parts of a constant that are gathered, one for each index."""

    constant: ir.Value
    indices: ir.Value
    nodes: tuple[ir.Node, ...]


def _gathered(value: ir.Value | None) -> _Rows | None:
    """Returns what is gathered along the first axis, with the indices before they are flat."""
    node = producer(value, "GatherND", "Gather")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "GatherND":
        indices = None if node.attributes.get_int("batch_dims", 0) else column(node.inputs[1])
    else:
        indices = None if node.attributes.get_int("axis", 0) else unflattened(node.inputs[1])
    return None if indices is None else _Rows(node.inputs[0], indices, (node,))


def _maps(mlp: MLP[_Gathered]) -> list[_Gathered]:
    return [mlp.gate[0], *([] if mlp.up is None else [mlp.up[0]]), mlp.down]


def _experts(tail: _Tail, mlp: MLP[_Gathered]) -> Experts | str:
    """Returns all experts, or why they are not those that a token was routed to."""
    maps = _maps(mlp)
    indices, *others = (regrouped(each) for found in maps for each in found.indices)
    for other in others:
        if other is not indices:
            return f"one map takes the experts {indices.name}, and another {other.name}"
    source = repeated_tokens(mlp.source, tail.k)
    if source is None:
        return f"{mlp.source.name} is not every token {tail.k} times in a row"
    home = maps[0].constants[0]
    shape = ops.static_shape(home)
    if home is None or not shape or shape[0] is None:
        return "the weights have an unknown shape"
    routing = _routing(indices, tail, shape[0], source)
    if isinstance(routing, str):
        return routing
    mlp = dataclasses.replace(mlp, source=source)
    experts = assemble([mlp], routing, _parts, home=home)
    if isinstance(experts, str):
        return experts
    if experts.down["weights"].shape[1] != tail.hidden:
        return f"the results are summed in groups that are not {tail.k} experts"
    weights = routing.weights
    if rank(weights) != 2 and settled(routing, experts.dtype).logits is None:
        return f"the weights {weights.name} are not [T, k], and its routing is not the MoE's own"
    return experts


def _routing(indices: ir.Value, tail: _Tail, count: int, source: ir.Value) -> Routing | str:
    """Returns how tokens reach the experts, seen through what only regroups tokens."""
    weights = regrouped(tail.weights)
    # Where a token has several experts, only equally many tokens can meet their weights.
    routing = routing_of(indices, weights, count, source if tail.k == 1 else None)
    if isinstance(routing, str):
        return routing
    if routing.k != tail.k:
        return f"{tail.k} results are summed for {routing.k} experts per token"
    return routing


def _parts(maps: Sequence[_Gathered]) -> Parts | str:
    """Returns the one map of all experts, or why it cannot be read."""
    (found,) = maps
    weight, bias = found.constants
    if weight is None:
        raise AssertionError("a map has a weight")
    weights = resolve(weight)
    if isinstance(weights, str):
        return weights
    if len(weights.shape) != 3:
        return f"{weight.name} has shape {list(weights.shape)}, not [E, N, K]"
    parts = {"weights": transposed(weights) if found.attributes == (True,) else weights}
    if bias is not None:
        biases = resolve(bias)
        if isinstance(biases, str):
            return biases
        parts["bias"] = biases
    return parts
