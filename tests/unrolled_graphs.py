"""Layers of experts that are cut out of stacked weights one by one, as exporters write them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from tests.expert_graphs import ROUTERS, Builder, Layer, finished, source
from tests.moe_models import Array, Arrays, run


@dataclass(frozen=True)
class Form:
    """How a layer is written.

    Attributes:
        layer: What it computes; `numbers` are the experts that are routed to.
        k_major: Whether the weights are [E, K, N] and not [E, N, K].
        cut: How gate and up are told apart: constant or computed bounds, Split, or a wrong one.
        column: How [T] becomes [T, 1]: reshape or unsqueeze.
        zeros: Whether the sums start from zeros.
        like: What the zeros are as large as: "x", or wrongly "router".
        scaled: Whether every expert has a scale, and its sign.
        places: Where the experts' weights are in the stack, where that is not 0, 1, ...
        columns: Which columns of the weights are looked at, where not all are.
    """

    layer: Layer = field(default_factory=lambda: Layer(experts=5))
    k_major: bool = False
    cut: str = "constant"
    column: str = "reshape"
    zeros: bool = True
    like: str = "x"
    scaled: int = 0
    places: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()


class Unrolled(Builder):
    """Writes a layer of this form, and keeps its weights as MoE has them."""

    def __init__(self, form: Form, **keywords: Any) -> None:
        super().__init__(form.layer, **keywords)
        self.form = form
        self.arrays: Arrays = {}

    def experts(self, x: ir.Value) -> ir.Value:
        layer, form = self.layer, self.form
        flat = self.op("Reshape", x, self.constant([-1, layer.hidden]))
        flat.type, flat.shape = x.type, ir.Shape(["T", layer.hidden])
        indices, weights = ROUTERS[layer.router](self, flat)
        if form.scaled:
            scales = form.scaled * (self.rng.random(layer.experts) + 0.5)
            scale = self.weight("scales", scales.astype(layer.dtype))
            weights = self.op("Mul", weights, self.op("Gather", scale, indices, axis=0))
        stacks = (
            self.stack("fc1", layer.inter * 2, layer.hidden),
            self.stack("fc2", layer.hidden, layer.inter),
        )
        total = self.first(flat)
        if layer.shared == "before":
            total = self.plus(total, super().expert(flat, "shared", layer))
        numbers = range(layer.experts) if layer.numbers is None else layer.numbers
        for place, expert in enumerate(numbers):
            where = form.places[place] if form.places else place
            y = self.cut_expert(flat, *stacks, where)
            share = self.share(flat, indices, weights, expert)
            total = self.plus(total, self.op("Mul", y, share))
        if layer.shared == "after":
            total = self.plus(total, super().expert(flat, "shared", layer))
        assert total is not None
        return total

    def plus(self, total: ir.Value | None, value: ir.Value) -> ir.Value:
        return value if total is None else self.op("Add", total, value)

    def first(self, x: ir.Value) -> ir.Value | None:
        """Returns zeros [T, H], where a sum starts from them."""
        return self.filled(self.op("Shape", x)) if self.form.zeros else None

    def filled(self, shape: ir.Value) -> ir.Value:
        zeros = self.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.float32)))
        if self.layer.dtype == np.float32:
            return zeros
        return self.op("Cast", zeros, to=ir.DataType.from_numpy(np.dtype(self.layer.dtype)))

    def stack(self, name: str, rows: int, columns: int) -> ir.Value:
        layer = self.layer
        shape = (layer.experts, rows, columns)
        weight = (self.rng.standard_normal(shape) / columns**0.5).astype(layer.dtype)
        self.arrays[name] = weight
        if name == "fc1":
            halves = np.split(weight, 2, axis=1)
            self.arrays[name] = np.stack(halves, axis=2).reshape(shape)
        stored = weight.transpose(0, 2, 1).copy() if self.form.k_major else weight
        return self.weight(name, stored)

    def cut_expert(self, x: ir.Value, fc1: ir.Value, fc2: ir.Value, index: int) -> ir.Value:
        layer = self.layer
        first, second = (self.matrix(stack, index) for stack in (fc1, fc2))
        gate, up = self.halves(self.op("MatMul", x, first), second)
        if layer.limit is not None:
            gate = self.op("Min", gate, self.number(layer.limit))
            up = self.op("Clip", up, self.number(-layer.limit), self.number(layer.limit))
        return self.op("MatMul", self.op("Mul", self.activation(gate, layer), up), second)

    def matrix(self, stack: ir.Value, index: int) -> ir.Value:
        gathered = self.op("Gather", stack, self.constant([index]), axis=0)
        matrix = self.op("Squeeze", gathered, self.constant([0]))
        return matrix if self.form.k_major else self.op("Transpose", matrix)

    def halves(self, hidden: ir.Value, second: ir.Value) -> tuple[ir.Value, ir.Value]:
        inter, cut = self.layer.inter, self.form.cut
        if cut == "Split":
            node = ir.node("Split", [hidden], {"axis": -1, "num_outputs": 2}, num_outputs=2)
            for output, name in zip(node.outputs, ("gate", "up"), strict=True):
                output.name = f"{hidden.name}.{name}"
            self.graph.nodes.append(node)
            return node.outputs[0], node.outputs[1]
        axis = self.constant([1])
        if cut == "computed":
            half = self.op("Shape", second, start=0, end=1)
            end = self.op("Shape", hidden, start=1, end=2)
        else:
            half = self.constant([inter + (1 if cut == "overlap" else 0)])
            end = self.constant([2 * inter + (1 if cut == "overlap" else 0)])
        gate = self.op("Slice", hidden, self.constant([0]), self.constant([inter]), axis)
        if cut == "overlap":
            half, end = self.constant([1]), self.constant([inter + 1])
        return gate, self.op("Slice", hidden, half, end, axis)

    def share(self, x: ir.Value, indices: ir.Value, weights: ir.Value, expert: int) -> ir.Value:
        """Returns the weight of an expert, [T, 1]."""
        layer, form = self.layer, self.form
        tokens = self.op("Shape", x, start=0, end=1)
        like = self.op("Shape", indices, start=0, end=1) if form.like == "router" else tokens
        total = self.filled(like) if form.zeros else None
        to = ir.DataType.from_numpy(np.dtype(layer.dtype))
        for column in form.columns or range(layer.k):
            equal = self.op("Equal", self.column(indices, column), self.constant(expert))
            mask = self.op("Cast", equal, to=to)
            total = self.plus(total, self.op("Mul", mask, self.column(weights, column)))
        assert total is not None
        if form.column == "unsqueeze":
            return self.op("Unsqueeze", total, self.constant([-1]))
        return self.op("Reshape", total, self.op("Concat", tokens, self.constant([1]), axis=0))

    def column(self, value: ir.Value, index: int) -> ir.Value:
        bounds = (self.constant([each]) for each in (index, index + 1, 1))
        return self.op("Squeeze", self.op("Slice", value, *bounds), self.constant([1]))


def unrolled(form: Form, *more: str, layers: int = 1) -> tuple[ir.Model, Arrays]:
    """Returns a model x -> y, and the weights of its last layer; `more` values are outputs too."""
    builder = Unrolled(form)
    x = value = source(builder.graph, form.layer)
    for index in range(layers):
        own = replace(form, layer=replace(form.layer, seed=index))
        builder = Unrolled(own, graph=builder.graph, prefix=f"l{index}.")
        value = builder.experts(value)
    made = finished(builder, x, builder.op("Reshape", value, builder.op("Shape", x)))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(made), data_prop=True))
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in more)
    return model, builder.arrays


T, H, E = 4, 6, 5


class Cut(Builder):
    """Writes what one expert, 3, does with its weights and its matrix."""

    def __init__(self, k: int = 2, **fields: Any) -> None:
        super().__init__(Layer(k=k, **fields))
        self.x = self.graph.input("x", np.float32, ("T", H))
        self.stack = self.random("stack", E, H, H)
        self.indices = self.graph.input("indices", np.int64, ("T", k))
        self.weights = self.graph.input("weights", np.float32, ("T", k))
        self.others = self.graph.input("others", np.float32, ("T", k))
        self.y = self.op("MatMul", self.x, self.matrix())

    def feeds(self) -> Arrays:
        rng = np.random.default_rng(0)
        k = self.layer.k
        return {
            "x": rng.standard_normal((T, H)).astype(np.float32),
            "indices": rng.permuted(np.tile(np.arange(2, 2 + k), (T, 1)), axis=1),
            "weights": rng.random((T, k)).astype(np.float32),
            "others": rng.random((T, k)).astype(np.float32),
        }

    def result(self, value: ir.Value, opset: int = 21) -> Array:
        out = self.op("Identity", value)
        out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None])
        return run(self.graph.model(out, opsets={"": opset}), self.feeds())[0]

    # Matrices

    def matrix(self, index: Any = 3, axis: int = 0) -> ir.Value:
        return self.op("Gather", self.stack, self.number_of(index), axis=axis)

    def number_of(self, index: Any) -> ir.Value:
        self._count += 1
        return self.graph.weight(f"index{self._count}", np.array(index))

    def squeezed(self, index: Any = (3,), axis: int | None = 0) -> ir.Value:
        axes = [] if axis is None else [self.constant([axis])]
        return self.op("Squeeze", self.matrix(index), *axes)

    def product(self, matrix: ir.Value | None) -> ir.Value:
        return self.op("MatMul", self.x, matrix)

    # Weights

    def column(
        self,
        value: ir.Value,
        j: int,
        axis: int = 1,
        end: int | None = None,
        squeezed: Any = 1,
        steps: tuple[int, ...] = (),
    ) -> ir.Value:
        bounds = (j, j + 1 if end is None else end, axis, *steps)
        cut = self.op("Slice", value, *(self.constant([each]) for each in bounds))
        return self.op("Squeeze", cut, self.constant([squeezed]))

    def slot(
        self,
        j: int,
        other: int | None = None,
        weights: ir.Value | None = None,
        expert: int = 3,
        **cut: Any,
    ) -> ir.Value:
        index = self.column(self.indices, j, **cut)
        equal = self.op("Equal", index, self.constant(expert))
        mask = self.op("Cast", equal, to=ir.DataType.FLOAT)
        weight = self.column(weights or self.weights, j if other is None else other, **cut)
        return self.op("Mul", mask, weight)

    def zeros(self, like: ir.Value | None = None, number: float = 0, **cut: int) -> ir.Value:
        shape = self.op("Shape", like or self.x, **(cut or {"start": 0, "end": 1}))
        return self.filled(shape, number)

    def filled(self, shape: ir.Value, number: float = 0) -> ir.Value:
        value = ir.tensor(np.array([number], np.float32))
        return self.op("ConstantOfShape", shape, value=value)

    def sum(self, *values: ir.Value) -> ir.Value:
        total = values[0]
        for value in values[1:]:
            total = self.op("Add", total, value)
        return total

    def slots(self) -> ir.Value:
        return self.sum(*(self.slot(j) for j in range(self.layer.k)))

    def tall(self, value: ir.Value, axis: int = 1) -> ir.Value:
        return self.op("Unsqueeze", value, self.constant([axis]))

    def reshaped(self, value: ir.Value, *sizes: int) -> ir.Value:
        return self.op("Reshape", value, self.constant(sizes))

    def cast(self, value: ir.Value, to: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return self.op("Cast", value, to=to)

    def share(self, column: ir.Value) -> ir.Value:
        return self.op("Mul", self.y, column)
