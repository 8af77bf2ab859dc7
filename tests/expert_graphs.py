"""Layers of experts as exporters without a fused operator write them, made to measure.

Every expert computes every token and is weighted with what the router gave it, as in
`sum(expert_e(x) * ReduceSum(weights * (indices == e)))`. Values have no shapes but where an
exporter's would matter, so that what is proven is proven from the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.moe_models import Array, Graph

OPSETS = {"": 21, "com.microsoft": 1}


@dataclass(frozen=True)
class Layer:
    """One layer of experts and what is odd about it.

    Attributes:
        experts: E.
        hidden: H.
        inter: I.
        k: Experts per token.
        router: One of `ROUTERS`.
        activation: swiglu, silu, relu, reglu, gelu or geglu.
        limit: A clamp of the gate and of the linear half.
        alpha: A factor in the sigmoid.
        beta: A shift of the linear half.
        bias: Whether the maps have biases.
        gemm: Whether the maps are Gemm (x must be 2-D).
        bits: Of MatMulNBits, 0 for float maps.
        block: Of MatMulNBits.
        zero_points: Whether MatMulNBits has them.
        flat: Whether x is [T, H] and not [B, S, H].
        swapped: Whether all operands are in the other order.
        keepdims: Of the ReduceSum of the weights; 0 has an Unsqueeze.
        shared: Where a shared expert is added: "", "before" or "after".
        numbers: The experts' numbers, where they are not 0, 1, ...
        odd: Other fields of single experts.
        homes: Where single weights live, by name; see `Graph.weight`.
        dtype: Of everything.
        seed: Of everything random.
    """

    experts: int = 4
    hidden: int = 64
    inter: int = 96
    k: int = 2
    router: str = "softmax_topk_norm"
    activation: str = "swiglu"
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    bias: bool = False
    gemm: bool = False
    bits: int = 0
    block: int = 32
    zero_points: bool = False
    flat: bool = False
    swapped: bool = False
    keepdims: int = 1
    shared: str = ""
    numbers: Sequence[int] | None = None
    odd: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)
    dtype: Any = np.float32
    seed: int = 0


class Builder:
    """Writes layers into a graph."""

    def __init__(self, layer: Layer, graph: Graph | None = None, prefix: str = "l0.") -> None:
        self.layer = layer
        self.graph = graph or Graph()
        self.prefix = prefix
        self.rng = np.random.default_rng(layer.seed)
        self._count = 0

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Appends a node; commutative operands go the layer's way round."""
        if self.layer.swapped and op_type in ("Add", "Mul", "Equal"):
            inputs = inputs[::-1]
        self._count += 1
        out = f"{self.prefix}{op_type}_{self._count}"
        return self.graph.op(op_type, *inputs, out=out, **attributes)

    def top(self, scores: ir.Value, k: int) -> tuple[ir.Value, ir.Value]:
        """Appends a TopK."""
        self._count += 1
        node = ir.node("TopK", [scores, self.constant([k])], {"axis": -1}, num_outputs=2)
        for output, name in zip(node.outputs, ("values", "indices"), strict=True):
            output.name = f"{self.prefix}{name}_{self._count}"
        self.graph.nodes.append(node)
        return node.outputs[0], node.outputs[1]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """Appends a Constant node."""
        return self.op("Constant", value=ir.tensor(np.array(value, dtype)))

    def number(self, value: float) -> ir.Value:
        """Appends a scalar of the layer's type."""
        return self.constant(value, self.layer.dtype)

    def random(self, name: str, *shape: int) -> ir.Value:
        """Adds a random weight."""
        array = (self.rng.standard_normal(shape) / shape[0] ** 0.5).astype(self.layer.dtype)
        return self.weight(name, array)

    def weight(self, name: str, array: Array) -> ir.Value:
        return self.graph.weight(
            self.prefix + name, array, self.layer.homes.get(name, "initializer")
        )

    # Maps

    def linear(self, x: ir.Value, name: str, rows: int, columns: int, layer: Layer) -> ir.Value:
        if layer.bits:
            return self.nbits(x, name, rows, columns, layer)
        bias = self.random(f"{name}.bias", rows) if layer.bias else None
        if layer.gemm:
            weight = self.random(f"{name}.weight", rows, columns)
            return self.op("Gemm", x, weight, *([] if bias is None else [bias]), transB=1)
        product = self.graph.op(
            "MatMul",
            x,
            self.random(f"{name}.weight_t", columns, rows),
            out=f"{self.prefix}{name}.MatMul",
        )
        return product if bias is None else self.op("Add", product, bias)

    def nbits(self, x: ir.Value, name: str, rows: int, columns: int, layer: Layer) -> ir.Value:
        blocks = -(-columns // layer.block)
        rng = self.rng
        codes = rng.integers(0, 256, (rows, blocks, layer.block * layer.bits // 8), np.uint8)
        scales = (rng.random((rows, blocks)) + 0.5) / columns**0.5 / 2 ** (layer.bits - 1)
        inputs: list[ir.Value | None] = [
            x,
            self.weight(f"{name}.codes", codes),
            self.weight(f"{name}.scales", scales.astype(layer.dtype)),
        ]
        if layer.zero_points:
            packed = rng.integers(0, 256, (rows, -(-blocks * layer.bits // 8)), np.uint8)
            inputs.append(self.weight(f"{name}.zero_points", packed))
        if layer.bias:
            inputs += [None] * (5 - len(inputs)) + [self.random(f"{name}.bias", rows)]
        return self.op(
            "MatMulNBits",
            *inputs,
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=layer.bits,
            block_size=layer.block,
        )

    # Experts

    def expert(self, x: ir.Value, name: str, layer: Layer) -> ir.Value:
        gate = self.linear(x, f"{name}.gate", layer.inter, layer.hidden, layer)
        if layer.limit is not None:
            gate = self.op("Min", gate, self.number(layer.limit))
        hidden = self.activation(gate, layer)
        if layer.activation in ("swiglu", "geglu", "reglu"):
            up = self.linear(x, f"{name}.up", layer.inter, layer.hidden, layer)
            if layer.limit is not None:
                up = self.op("Clip", up, self.number(-layer.limit), self.number(layer.limit))
            if layer.beta:
                up = self.op("Add", up, self.number(layer.beta))
            hidden = self.op("Mul", hidden, up)
        return self.linear(hidden, f"{name}.down", layer.hidden, layer.inter, layer)

    def activation(self, gate: ir.Value, layer: Layer) -> ir.Value:
        if layer.activation in ("relu", "reglu"):
            return self.op("Relu", gate)
        if layer.activation in ("gelu", "geglu"):
            return self.op("Gelu", gate, approximate="tanh")
        inner = gate if layer.alpha == 1.0 else self.op("Mul", self.number(layer.alpha), gate)
        return self.op("Mul", gate, self.op("Sigmoid", inner))

    def term(self, y: ir.Value, expert: int, indices: ir.Value, weights: ir.Value) -> ir.Value:
        layer = self.layer
        equal = self.op("Equal", indices, self.constant(expert))
        mask = self.op("Cast", equal, to=ir.DataType.from_numpy(np.dtype(layer.dtype)))
        product = self.op("Mul", weights, mask)
        share = self.op("ReduceSum", product, self.constant([-1]), keepdims=layer.keepdims)
        if not layer.keepdims:
            share = self.op("Unsqueeze", share, self.constant([-1]))
        return self.op("Mul", y, share)

    def experts(self, x: ir.Value) -> ir.Value:
        """Appends the layer; returns the sum."""
        layer = self.layer
        indices, weights = ROUTERS[layer.router](self, x)
        total = self.expert(x, "shared", layer) if layer.shared == "before" else None
        numbers = range(layer.experts) if layer.numbers is None else layer.numbers
        for place, expert in enumerate(numbers):
            own = replace(layer, **layer.odd.get(place, {}))
            y = self.expert(x, f"experts.{place}", own)
            term = self.term(y, expert, indices, weights)
            total = term if total is None else self.op("Add", total, term)
        assert total is not None
        if layer.shared == "after":
            total = self.op("Add", total, self.expert(x, "shared", layer))
        return total


# Routers: (indices, weights)


def _logits(b: Builder, x: ir.Value) -> ir.Value:
    layer = b.layer
    if layer.bits:
        return b.nbits(x, "router", layer.experts, layer.hidden, replace(layer, bias=False))
    weight = b.rng.standard_normal((layer.hidden, layer.experts)) * 3 / layer.hidden**0.5
    return b.op("MatMul", x, b.weight("router", weight.astype(layer.dtype)))


def _normalized(b: Builder, weights: ir.Value) -> ir.Value:
    return b.op("Div", weights, b.op("ReduceSum", weights, b.constant([-1]), keepdims=1))


def _softmax_topk(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    values, indices = b.top(b.op("Softmax", _logits(b, x), axis=-1), b.layer.k)
    return indices, values


def _softmax_topk_norm(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    indices, values = _softmax_topk(b, x)
    return indices, _normalized(b, values)


def _topk_softmax(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    values, indices = b.top(_logits(b, x), b.layer.k)
    return indices, b.op("Softmax", values, axis=-1)


def _scaled(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    scores = b.op("Softmax", _logits(b, x), axis=-1)
    _, indices = b.top(scores, b.layer.k)
    chosen = b.op("GatherElements", scores, indices, axis=-1)
    total = b.op("ReduceSum", chosen, b.constant([-1]), keepdims=1)
    weights = b.op("Div", chosen, b.op("Add", total, b.number(1e-6)))
    return indices, b.op("Mul", weights, b.number(2.5))


def _sigmoid(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    values, indices = b.top(b.op("Sigmoid", _logits(b, x)), b.layer.k)
    return indices, values


def _sigmoid_corrected(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    scores = b.op("Sigmoid", _logits(b, x))
    _, indices = b.top(b.op("Add", scores, b.random("correction", b.layer.experts)), b.layer.k)
    return indices, _normalized(b, b.op("GatherElements", scores, indices, axis=-1))


def _float32(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    logits = b.op("Cast", _logits(b, x), to=ir.DataType.FLOAT)
    values, indices = b.top(b.op("Softmax", logits, axis=-1), b.layer.k)
    to = ir.DataType.from_numpy(np.dtype(b.layer.dtype))
    return indices, b.op("Cast", _normalized(b, values), to=to)


def _mixer(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    logits = _logits(b, x)
    indices, weights = [], []
    for place in range(b.layer.k):
        _, index = b.top(logits, 1)
        weights.append(b.op("GatherElements", b.op("Softmax", logits, axis=-1), index, axis=-1))
        indices.append(index)
        if place + 1 < b.layer.k:
            low = b.op("Expand", b.number(-1e4), b.op("Shape", index))
            logits = b.op("ScatterElements", logits, index, low, axis=-1)
    return b.op("Concat", *indices, axis=-1), b.op("Concat", *weights, axis=-1)


def _signed(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    values, indices = b.top(_logits(b, x), b.layer.k)
    return indices, values


ROUTERS: dict[str, Callable[[Builder, ir.Value], tuple[ir.Value, ir.Value]]] = {
    "softmax_topk": _softmax_topk,
    "softmax_topk_norm": _softmax_topk_norm,
    "topk_softmax": _topk_softmax,
    "scaled": _scaled,
    "sigmoid": _sigmoid,
    "sigmoid_corrected": _sigmoid_corrected,
    "float32": _float32,
    "mixer": _mixer,
    "signed": _signed,
}


def source(graph: Graph, layer: Layer) -> ir.Value:
    """Adds the graph input x."""
    batch = ("tokens",) if layer.flat else ("batch", "sequence")
    return graph.input("x", layer.dtype, (*batch, layer.hidden))


def model(layer: Layer | None = None, opset: int = 21, **fields: Any) -> ir.Model:
    """Returns a model x -> y of one layer."""
    builder = Builder(replace(layer or Layer(), **fields))
    x = source(builder.graph, builder.layer)
    return finished(builder, x, builder.experts(x), opset)


def finished(
    builder: Builder, x: ir.Value, total: ir.Value, opset: int = 21, *more: ir.Value
) -> ir.Model:
    """Returns a model whose output y is a sum; `more` values are outputs too."""
    y = builder.graph.op("Identity", total, out="y", like=x)
    for value in more:
        value.type, value.shape = x.type, x.shape
    return builder.graph.model(y, *more, opsets={**OPSETS, "": opset})


def feeds(layer: Layer | None = None, tokens: Sequence[int] = (2, 5), seed: int = 1) -> Any:
    """Returns x for a model of a layer."""
    layer = layer or Layer()
    shape = (int(np.prod(tokens)),) if layer.flat else tuple(tokens)
    x = np.random.default_rng(seed).standard_normal((*shape, layer.hidden))
    return {"x": x.astype(layer.dtype)}
