"""Layers of experts as exporters write them that gather weights token by token, made to measure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from tests.expert_graphs import ROUTERS, Builder, Layer, finished, source
from tests.moe_models import Array, Arrays


@dataclass(frozen=True)
class Form:
    """How a layer is written.

    Attributes:
        layer: What it computes.
        k_major: Whether the weights are [E, K, N] and not [E, N, K].
        interleaved: Whether gate and up alternate and are not halves.
        gather: GatherND or Gather.
        repeat: How tokens are repeated: expand, range, or wrongly: tile.
        pairs: How often something is unsqueezed and squeezed again behind the biases.
        wide: Where a float16 layer is cast: "weighting", "product" or "sum", maybe several.
        routed: The axes of indices and weights: 2, or 3 where they are [1, T, k].
        reads: What the router reads: flat tokens, deep ones [B, S, H], or others, `z` [N, H].
        ends: Whether axes are counted from the other end.
        cut: How gate and up are told apart: Split, Slice, or wrongly: overlap, thirds.
        apart: Whether gate and up are two maps and not parts of one.
        others: The constants that are gathered with the experts of another router.
        second: Another router that gives the weights.
        group: How many results are summed, 0 for k.
    """

    layer: Layer = field(default_factory=lambda: Layer(experts=5))
    k_major: bool = False
    interleaved: bool = False
    gather: str = "GatherND"
    repeat: str = "expand"
    pairs: int = 0
    wide: tuple[str, ...] = ()
    routed: int = 2
    reads: str = "flat"
    ends: bool = False
    cut: str = "Split"
    apart: bool = False
    others: tuple[str, ...] = ()
    second: str = ""
    group: int = 0


PARTS = ("gate", "up")

MIXTRAL = Form()
GPT_OSS = Form(
    Layer(experts=5, k=3, router="topk_softmax", bias=True, limit=0.5, alpha=1.702, beta=1.0),
    k_major=True,
    interleaved=True,
    pairs=1,
)


class Batched(Builder):
    """Writes a layer of this form, and keeps its weights as MoE has them."""

    def __init__(self, form: Form, **keywords: Any) -> None:
        super().__init__(form.layer, **keywords)
        self.form = form
        self.arrays: Arrays = {}
        self.indices: list[ir.Value] = []

    def experts(self, x: ir.Value) -> ir.Value:
        layer, form = self.layer, self.form
        flat = self.op("Reshape", x, self.constant([-1, layer.hidden]))
        flat.type, flat.shape = x.type, ir.Shape(["T", layer.hidden])
        routed = {"flat": flat, "deep": x}.get(form.reads)
        routed = routed or self.graph.input("z", layer.dtype, ("N", layer.hidden))
        indices, weights = ROUTERS[layer.router](self, routed)
        if form.second:
            _, weights = ROUTERS[form.second](self, routed)
        self.indices = [indices]
        if form.others:
            self.indices.append(ROUTERS[layer.router](self, routed)[0])
        if form.routed == 3:
            weights = self.op("Unsqueeze", weights, self.constant([0]))
            self.indices = [self.op("Unsqueeze", each, self.constant([0])) for each in self.indices]
        tokens = self.repeated(flat)
        if layer.activation in ("silu", "relu"):
            hidden = self.gathered(tokens, "fc1", layer.inter, layer.hidden)
            hidden = self.activation(hidden, layer)
        elif form.apart:
            parts = [self.gathered(tokens, name, layer.inter, layer.hidden) for name in PARTS]
            hidden = self.product(*parts)
        else:
            inner = layer.inter * (3 if form.cut == "thirds" else 2)
            hidden = self.gated(self.gathered(tokens, "fc1", inner, layer.hidden))
        results = self.gathered(hidden, "fc2", layer.hidden, layer.inter)
        return self.summed(results, weights)

    def repeated(self, x: ir.Value) -> ir.Value:
        k, hidden = self.layer.k, self.layer.hidden
        if self.form.repeat == "range":  # its size is a symbol, as exporters say it
            tokens = self.op("Squeeze", self.op("Shape", x, start=0, end=1))
            numbers = self.op("Range", self.constant(0), tokens, self.constant(1))
            numbers.type, numbers.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["T"])
            column = self.op("Unsqueeze", numbers, self.constant([1]))
            copies = self.op("Expand", column, self.constant([1, k]))
            rows = self.op("Reshape", copies, self.constant([-1]))
            return self.op("Gather", x, rows, axis=0)
        axis = 0 if self.form.repeat == "tile" else 1
        spread = self.op("Unsqueeze", x, self.constant([axis]))
        shape = [k, 1, 1] if axis == 0 else [1, k, 1]
        copies = self.op("Expand", spread, self.constant(shape))
        return self.op("Reshape", copies, self.constant([-1, hidden]))

    def gathered(self, x: ir.Value, name: str, rows: int, columns: int) -> ir.Value:
        layer, form = self.layer, self.form
        shape = (layer.experts, rows, columns)
        weight = (self.rng.standard_normal(shape) / columns**0.5).astype(layer.dtype)
        self.keep(name, weight)
        stored = weight.transpose(0, 2, 1).copy() if form.k_major else weight
        axis = self.axis(1, -2) if form.k_major else self.axis(-1, 2)
        weights, vectors = self.pick(name, stored), self.op("Unsqueeze", x, axis)
        operands = (vectors, weights) if form.k_major else (weights, vectors)
        y = self.op("Squeeze", self.op("MatMul", *operands), axis)
        if layer.bias:
            bias = self.rng.standard_normal((layer.experts, rows)).astype(layer.dtype)
            self.keep(f"{name}_bias", bias)
            y = self.op("Add", y, self.pick(f"{name}_bias", bias))
        for _ in range(form.pairs):
            y = self.op("Squeeze", self.op("Unsqueeze", y, axis), axis)
        return y

    def keep(self, name: str, array: Array) -> None:
        if name.startswith("fc1") and not self.form.interleaved:
            halves = np.split(array, 2, axis=1)
            array = np.stack(halves, axis=2).reshape(array.shape)
        self.arrays[name] = array

    def axis(self, number: int, other: int) -> ir.Value:
        return self.constant([other if self.form.ends else number])

    def pick(self, name: str, array: Array) -> ir.Value:
        indices = self.indices[-1 if name in self.form.others else 0]
        rows = self.op("Reshape", indices, self.constant([-1]))
        constant = self.weight(name, array)
        if self.form.gather == "Gather":
            return self.op("Gather", constant, rows, axis=0)
        return self.op("GatherND", constant, self.op("Unsqueeze", rows, self.constant([-1])))

    def gated(self, hidden: ir.Value) -> ir.Value:
        layer, form = self.layer, self.form
        if form.interleaved:
            gate, up = (self.slice(hidden, start, 2**63 - 1, 2) for start in (0, 1))
        elif form.cut in ("Split", "thirds"):
            count = 3 if form.cut == "thirds" else 2
            node = ir.node("Split", [hidden], {"axis": -1, "num_outputs": count}, num_outputs=count)
            for index, output in enumerate(node.outputs):
                output.name = f"{self.prefix}part{index}"
            self.graph.nodes.append(node)
            gate, up = node.outputs[:2]
        else:
            start = 1 if form.cut == "overlap" else layer.inter
            gate = self.slice(hidden, 0, layer.inter, 1)
            up = self.slice(hidden, start, start + layer.inter, 1)
        return self.product(gate, up)

    def product(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        layer = self.layer
        if layer.limit is not None:
            gate = self.op("Clip", gate, None, self.number(layer.limit))
            up = self.op("Clip", up, self.number(-layer.limit), self.number(layer.limit))
        if layer.beta:
            up = self.op("Add", up, self.number(layer.beta))
        return self.op("Mul", self.activation(gate, layer), up)

    def slice(self, value: ir.Value, start: int, end: int, step: int) -> ir.Value:
        return self.op("Slice", value, *(self.constant([i]) for i in (start, end, 1, step)))

    def summed(self, results: ir.Value, weights: ir.Value) -> ir.Value:
        layer, form = self.layer, self.form
        if "weighting" in form.wide:
            results = self.op("Cast", results, to=ir.DataType.FLOAT)
            weights = self.op("Cast", weights, to=ir.DataType.FLOAT)
        flat = self.op("Reshape", weights, self.constant([-1]))
        weighted = self.op("Mul", results, self.op("Unsqueeze", flat, self.constant([-1])))
        to = ir.DataType.from_numpy(np.dtype(layer.dtype))
        if "product" in form.wide:
            weighted = self.op("Cast", weighted, to=to if "weighting" in form.wide else 1)
        shape = self.constant([-1, form.group or layer.k, layer.hidden])
        folded = self.op("Reshape", weighted, shape)
        if "sum" in form.wide:
            folded = self.op("Cast", folded, to=ir.DataType.FLOAT)
        total = self.op("ReduceSum", folded, self.axis(1, -2), keepdims=0)
        return self.op("Cast", total, to=to) if form.wide else total


def batched(form: Form, *more: str, layers: int = 1) -> tuple[ir.Model, Arrays]:
    """Returns a model x -> y, and the weights of its last layer; `more` values are outputs too."""
    builder = Batched(form)
    x = value = source(builder.graph, form.layer)
    for index in range(layers):
        own = replace(form, layer=replace(form.layer, seed=index))
        builder = Batched(own, graph=builder.graph, prefix=f"l{index}.")
        value = builder.experts(value)
    shaped = builder.op("Reshape", value, builder.op("Shape", x))
    model = inferred(finished(builder, x, shaped))
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in more)
    return model, builder.arrays


def inferred(model: ir.Model) -> ir.Model:
    """Returns the model with the shapes that exporters write."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))
