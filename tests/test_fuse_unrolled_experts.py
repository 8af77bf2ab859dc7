"""Experts that are cut out of stacked weights one by one, fused into a MoE."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.report import SKIPPED, Report
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from qmoe_rules.rules.fuse_experts import fuse_experts_rules
from tests.expert_graphs import ROUTERS, Builder, Layer, finished, source
from tests.moe_models import Array, Arrays, expected, nodes_of, relative_error, run, the_node

SHAPES = [(1, 1), (1, 7), (4, 1), (4, 7)]


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


def fused(model: ir.Model) -> Report:
    report = Report()
    apply_rules(model, fuse_experts_rules(report=report))
    return report


def inputs(layer: Layer, shape: tuple[int, int]) -> Arrays:
    x = np.random.default_rng(1).standard_normal((*shape, layer.hidden))
    return {"x": x.astype(layer.dtype)}


def agree(before: ir.Model, after: ir.Model, layer: Layer, tolerance: float) -> None:
    for shape in SHAPES:
        feeds = inputs(layer, shape)
        assert relative_error(run(after, feeds)[0], run(before, feeds)[0]) < tolerance


def only_the_moe_is_left(model: ir.Model) -> None:
    kinds = {node.op_type for node in model.graph}
    assert not kinds & {"Equal", "Slice", "Split", "Squeeze", "Transpose"}
    for value in model.graph.initializers.values():
        assert value.uses()
    for node in model.graph:
        assert any(output.uses() or output.is_graph_output() for output in node.outputs)


FORMS = {
    "gemma": Form(scaled=1),
    "gemma_computed": Form(cut="computed", scaled=1),
    "k_major": Form(k_major=True, cut="Split"),
    "topk_softmax": Form(Layer(experts=5, k=3, router="topk_softmax"), column="unsqueeze"),
    "sigmoid": Form(Layer(experts=5, router="sigmoid_corrected")),
    "no_zeros": Form(zeros=False),
    "one": Form(Layer(experts=5, k=1)),
    "swapped": Form(Layer(experts=5, swapped=True)),
    "gpt_oss": Form(Layer(experts=5, router="topk_softmax", limit=0.5, alpha=1.702)),
    "unordered": Form(Layer(experts=5, numbers=(3, 0, 4, 1, 2)), places=(3, 0, 4, 1, 2)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", FORMS)
def test_it_computes_the_same(name: str, dtype: Any) -> None:
    form = replace(FORMS[name], layer=replace(FORMS[name].layer, dtype=dtype))
    before, _ = unrolled(form)
    after, _ = unrolled(form)
    assert fused(after).rows == []
    the_node(after, "MoE")
    only_the_moe_is_left(after)
    agree(before, after, form.layer, 1e-5 if dtype == np.float32 else 2e-3)


@pytest.mark.parametrize("shared", ["before", "after"])
def test_a_shared_expert_stays_beside_it(shared: str) -> None:
    form = Form(Layer(experts=5, shared=shared))
    before, _ = unrolled(form)
    after, _ = unrolled(form)
    assert fused(after).rows == []
    the_node(after, "MoE")
    assert [node.op_type for node in after.graph].count("Sigmoid") == 1
    agree(before, after, form.layer, 1e-5)


def test_layers_in_a_row() -> None:
    before, _ = unrolled(FORMS["gemma"], layers=2)
    after, _ = unrolled(FORMS["gemma"], layers=2)
    fused(after)
    assert len(nodes_of(after, "MoE")) == 2
    only_the_moe_is_left(after)
    agree(before, after, FORMS["gemma"].layer, 1e-5)
    assert not apply_rules(after, fuse_experts_rules())


def test_work_grows_with_the_number_of_experts_and_not_its_square() -> None:
    """Counted in calls: four times the experts take about four times as many."""

    def calls(experts: int) -> int:
        model, _ = unrolled(Form(Layer(experts=experts, hidden=4, inter=2)))
        events = itertools.count()

        def count(*_event: object) -> None:
            next(events)

        sys.setprofile(count)
        try:
            assert fused(model).rows == []
        finally:
            sys.setprofile(None)
        the_node(model, "MoE")
        only_the_moe_is_left(model)
        return next(events)

    calls(8)  # imports and caches, which come once
    assert calls(128) < 4.5 * calls(32)


def _logits(model: ir.Model, x: Array) -> Array:
    weight = model.graph.initializers["l0.router"].const_value
    assert weight is not None
    return np.asarray(x.reshape(-1, x.shape[-1]) @ weight.numpy())


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 0)])
@pytest.mark.parametrize("name", ["no_zeros", "k_major", "gpt_oss"])
def test_quantized_in_the_same_list(name: str, bits: int, block: int) -> None:
    form = FORMS[name]
    model, arrays = unrolled(form)
    quantizing = moe_to_qmoe_rules(bits=bits, block_size=block, target="cpu")
    apply_rules(model, [*fuse_experts_rules(), *quantizing])
    assert nodes_of(model, "MoE") == []
    node = the_node(model)
    names = ("activation_type", "activation_alpha", "activation_beta", "k", "swiglu_fusion")
    feeds = inputs(form.layer, (4, 7))
    logits = _logits(model, feeds["x"])
    assert len(np.unique(np.argsort(logits)[:, -form.layer.k :])) == form.layer.experts
    wanted = expected(
        arrays,
        {**feeds, "router_probs": logits},
        Spec(FORMATS[f"int{bits}"], block),
        normalize_routing_weights=1,
        swiglu_limit=form.layer.limit,
        **{name: node.attributes[name].value for name in names},
    )
    assert relative_error(run(model, feeds)[0], wanted) < 1e-5


REASONS = {
    "missing": (Form(Layer(experts=5, numbers=(0, 1, 3, 4))), "expert 2 is missing"),
    "twice": (Form(Layer(experts=5, numbers=(0, 1, 1, 3, 4))), "expert 1 is added twice"),
    "mixed_up": (Form(places=(0, 2, 1, 3, 4)), "expert 1 has the weights of expert 2"),
    "overlap": (Form(cut="overlap"), "is no activation of MoE"),
    "signed": (Form(scaled=-1), "may be negative"),
    "zeros": (Form(like="router"), "are not known to be like"),
    "overridable": (
        Form(Layer(experts=5, homes={"fc1": "overridable"})),
        "l0.fc1 is a graph input, so its default may be overridden at run time",
    ),
    "computed": (Form(Layer(experts=5, homes={"fc2": "computed"})), "l0.fc2 is not a constant"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_proven_stays(name: str) -> None:
    form, reason = REASONS[name]
    model, _ = unrolled(form)
    count = len(list(model.graph))
    (row,) = fused(model).rows
    assert row.status == SKIPPED
    assert reason in row.reason
    assert nodes_of(model, "MoE") == []
    assert len(list(model.graph)) == count


def test_a_column_that_is_left_out_is_no_weight_of_an_expert() -> None:
    model, _ = unrolled(Form(columns=(0,)))
    assert fused(model).rows == []
    assert nodes_of(model, "MoE") == []


@pytest.mark.parametrize("op_type", ["MatMul", "Slice", "Sigmoid", "Mul", "Gather", "Equal"])
def test_a_value_that_others_need_stays(op_type: str) -> None:
    form = Form(Layer(experts=5, router="topk_softmax"))
    model, _ = unrolled(form)
    name = [node.outputs[0].name for node in model.graph if node.op_type == op_type][-1]
    model, _ = unrolled(form, str(name))
    if op_type == "Slice":  # the last one reads a column of the weights, and may stay
        assert fused(model).rows == []
        return
    (row,) = fused(model).rows
    assert row.reason == f"{name} is a graph output"
    assert nodes_of(model, "MoE") == []
