"""Experts whose weights are gathered token by token, fused into a MoE."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript import rewriter

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
        layer: What it computes.
        k_major: Whether the weights are [E, K, N] and not [E, N, K].
        interleaved: Whether gate and up alternate and are not halves.
        gather: GatherND or Gather.
        repeat: How tokens are repeated: expand, range, or wrongly: tile.
        pairs: Whether nothing is unsqueezed and squeezed behind the biases.
        wide: Where a float16 layer goes on in float32: "", "weighting" or "sum".
        routed: The axes of indices and weights: 2, or 3 where they are [1, T, k].
        cut: How gate and up are told apart: Split, Slice, or wrongly: overlap, thirds.
        others: Whether the second map takes the experts of another router.
        second: Another router that gives the weights.
        group: How many results are summed, 0 for k.
    """

    layer: Layer = field(default_factory=lambda: Layer(experts=5))
    k_major: bool = False
    interleaved: bool = False
    gather: str = "GatherND"
    repeat: str = "expand"
    pairs: bool = False
    wide: str = ""
    routed: int = 2
    cut: str = "Split"
    others: bool = False
    second: str = ""
    group: int = 0


MIXTRAL = Form()
GPT_OSS = Form(
    Layer(experts=5, k=3, router="topk_softmax", bias=True, limit=0.5, alpha=1.702, beta=1.0),
    k_major=True,
    interleaved=True,
    pairs=True,
)


class Batched(Builder):
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
        if form.second:
            _, weights = ROUTERS[form.second](self, flat)
        rows = [indices, ROUTERS[layer.router](self, flat)[0] if form.others else indices]
        if form.routed == 3:
            weights = self.op("Unsqueeze", weights, self.constant([0]))
            rows = [self.op("Unsqueeze", each, self.constant([0])) for each in rows]
        inner = layer.inter * (3 if form.cut == "thirds" else 2)
        hidden = self.gathered(self.repeated(flat), rows[0], "fc1", inner, layer.hidden)
        hidden = self.gated(hidden)
        results = self.gathered(hidden, rows[1], "fc2", layer.hidden, layer.inter)
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

    def gathered(
        self, x: ir.Value, indices: ir.Value, name: str, rows: int, columns: int
    ) -> ir.Value:
        layer, form = self.layer, self.form
        shape = (layer.experts, rows, columns)
        weight = (self.rng.standard_normal(shape) / columns**0.5).astype(layer.dtype)
        self.keep(name, weight)
        stored = weight.transpose(0, 2, 1).copy() if form.k_major else weight
        flat = self.op("Reshape", indices, self.constant([-1]))
        axis = self.constant([1 if form.k_major else -1])
        weights, vectors = self.pick(name, stored, flat), self.op("Unsqueeze", x, axis)
        operands = (vectors, weights) if form.k_major else (weights, vectors)
        y = self.op("Squeeze", self.op("MatMul", *operands), axis)
        if layer.bias:
            bias = self.rng.standard_normal((layer.experts, rows)).astype(layer.dtype)
            self.keep(f"{name}_bias", bias)
            y = self.op("Add", y, self.pick(f"{name}_bias", bias, flat))
        if form.pairs:
            y = self.op("Squeeze", self.op("Unsqueeze", y, axis), axis)
        return y

    def keep(self, name: str, array: Array) -> None:
        if name.startswith("fc1") and not self.form.interleaved:
            halves = np.split(array, 2, axis=1)
            array = np.stack(halves, axis=2).reshape(array.shape)
        self.arrays[name] = array

    def pick(self, name: str, array: Array, rows: ir.Value) -> ir.Value:
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
        if form.wide == "weighting":
            results = self.op("Cast", results, to=ir.DataType.FLOAT)
            weights = self.op("Cast", weights, to=ir.DataType.FLOAT)
        flat = self.op("Reshape", weights, self.constant([-1]))
        weighted = self.op("Mul", results, self.op("Unsqueeze", flat, self.constant([-1])))
        shape = self.constant([-1, form.group or layer.k, layer.hidden])
        folded = self.op("Reshape", weighted, shape)
        if form.wide == "sum":
            folded = self.op("Cast", folded, to=ir.DataType.FLOAT)
        total = self.op("ReduceSum", folded, self.constant([1]), keepdims=0)
        to = ir.DataType.from_numpy(np.dtype(layer.dtype))
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
    model = _inferred(finished(builder, x, shaped))
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in more)
    return model, builder.arrays


def _inferred(model: ir.Model) -> ir.Model:
    """Returns the model with the shapes that exporters write."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))


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
    assert not kinds & {"Gather", "GatherND", "Range", "Slice", "Split", "Squeeze", "Unsqueeze"}
    for value in model.graph.initializers.values():
        assert value.uses()
    for node in model.graph:
        assert any(output.uses() or output.is_graph_output() for output in node.outputs)


FORMS = {
    "mixtral": MIXTRAL,
    "gpt_oss": GPT_OSS,
    "olmoe": Form(Layer(experts=5, k=3, router="softmax_topk")),
    "deepseek": Form(Layer(experts=5, router="sigmoid_corrected")),
    "scaled": Form(Layer(experts=5, router="scaled"), k_major=True),
    "mixer": Form(Layer(experts=5, router="mixer")),
    "one": Form(Layer(experts=5, k=1)),
    "all": Form(Layer(experts=3, k=3)),
    "swapped": Form(Layer(experts=5, bias=True, swapped=True), gather="Gather"),
    "range": Form(repeat="range"),
    "range_gpt_oss": replace(GPT_OSS, repeat="range", gather="Gather"),
    "slice": Form(cut="Slice"),
    "grouped": Form(routed=3),
    "another_router": Form(Layer(experts=5, router="softmax_topk"), second="sigmoid"),
}


@pytest.mark.parametrize("name", FORMS)
def test_it_computes_the_same(name: str) -> None:
    form = FORMS[name]
    before, _ = batched(form)
    after, _ = batched(form)
    assert fused(after).rows == []
    assert the_node(after, "MoE").inputs[0] is not None
    only_the_moe_is_left(after)
    agree(before, after, form.layer, 1e-5)


@pytest.mark.parametrize("wide", ["", "weighting", "sum"])
@pytest.mark.parametrize("form", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_float16_computes_the_same(form: Form, wide: str) -> None:
    form = replace(form, layer=replace(form.layer, dtype=np.float16), wide=wide)
    before, _ = batched(form)
    after, _ = batched(form)
    assert fused(after).rows == []
    assert the_node(after, "MoE").outputs[0].dtype == ir.DataType.FLOAT16
    agree(before, after, form.layer, 2e-3)


def test_the_node_says_what_the_block_computed() -> None:
    model, _ = batched(GPT_OSS)
    fused(model)
    attributes = {key: value.value for key, value in the_node(model, "MoE").attributes.items()}
    assert attributes.pop("activation_alpha") == pytest.approx(1.702)
    assert attributes == {
        "activation_type": "swiglu",
        "activation_beta": 1.0,
        "k": 3,
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "swiglu_limit": 0.5,
        "use_sparse_mixer": 0,
    }


def test_layers_in_a_row() -> None:
    before, _ = batched(MIXTRAL, layers=3)
    after, _ = batched(MIXTRAL, layers=3)
    fused(after)
    assert len(nodes_of(after, "MoE")) == 3
    only_the_moe_is_left(after)
    agree(before, after, MIXTRAL.layer, 1e-5)


def test_rewrite_and_a_second_sweep() -> None:
    before, _ = batched(MIXTRAL)
    after, _ = batched(MIXTRAL)
    after = rewriter.rewrite(after, fuse_experts_rules())
    agree(before, after, MIXTRAL.layer, 1e-5)
    assert not apply_rules(after, fuse_experts_rules())


def _logits(model: ir.Model, x: Array) -> Array:
    weight = model.graph.initializers["l0.router"].const_value
    assert weight is not None
    return np.asarray(x.reshape(-1, x.shape[-1]) @ weight.numpy())


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 0)])
@pytest.mark.parametrize("form", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_quantized_in_the_same_list(form: Form, bits: int, block: int) -> None:
    model, arrays = batched(form)
    quantizing = moe_to_qmoe_rules(bits=bits, block_size=block, target="cpu")
    apply_rules(model, [*fuse_experts_rules(), *quantizing])
    assert nodes_of(model, "MoE") == []
    node = the_node(model)
    names = ("activation_type", "activation_alpha", "activation_beta", "k", "swiglu_fusion")
    feeds = inputs(form.layer, (4, 7))
    logits = _logits(model, feeds["x"])
    chosen = np.argsort(logits)[:, -form.layer.k :]
    assert len(np.unique(chosen)) == form.layer.experts
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
    "tile": (Form(repeat="tile"), "is not every token 2 times in a row"),
    "group": (Form(group=4), "is not every token 4 times in a row"),
    "others": (Form(others=True), "one map takes the experts"),
    "overlap": (Form(cut="overlap"), "is no activation of MoE"),
    "thirds": (Form(Layer(experts=5, inter=64), cut="thirds"), "is no activation of MoE"),
    "signed": (Form(Layer(experts=5, router="signed")), "may be negative"),
    "reglu": (Form(Layer(experts=5, activation="reglu")), "MoE has no gated relu"),
    "overridable": (
        Form(Layer(experts=5, homes={"fc1": "overridable"})),
        "l0.fc1 is a graph input, so its default may be overridden at run time",
    ),
    "computed": (Form(Layer(experts=5, homes={"fc2": "computed"})), "l0.fc2 is not a constant"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_proven_stays(name: str) -> None:
    form, reason = REASONS[name]
    model, _ = batched(form)
    count = len(list(model.graph))
    (row,) = fused(model).rows
    assert row.status == SKIPPED
    assert reason in row.reason
    assert nodes_of(model, "MoE") == []
    assert len(list(model.graph)) == count


@pytest.mark.parametrize("op_type", ["MatMul", "Squeeze", "Sigmoid", "Split", "Mul", "GatherND"])
def test_a_value_that_others_need_stays(op_type: str) -> None:
    model, _ = batched(MIXTRAL)
    # The router's own MatMul comes before the experts'.
    name = [node.outputs[0].name for node in model.graph if node.op_type == op_type][-1]
    model, _ = batched(MIXTRAL, str(name))
    (row,) = fused(model).rows
    assert row.reason == f"{name} is a graph output"
    assert nodes_of(model, "MoE") == []


@pytest.mark.parametrize("op_type", ["TopK", "Expand"])
def test_what_others_need_of_the_routing_is_kept(op_type: str) -> None:
    model, _ = batched(MIXTRAL)
    name = next(node.outputs[-1].name for node in model.graph if node.op_type == op_type)
    before, _ = batched(MIXTRAL, str(name))
    after, _ = batched(MIXTRAL, str(name))
    assert fused(after).rows == []
    feeds = inputs(MIXTRAL.layer, (4, 7))
    for old, new in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


def test_other_sums_are_none_of_its_business() -> None:
    builder = Builder(Layer())
    x = source(builder.graph, builder.layer)
    weighted = builder.op("Mul", x, builder.number(2.0))
    folded = builder.op("Reshape", weighted, builder.constant([-1, 2, 32]))
    total = builder.op("ReduceSum", folded, builder.constant([1]), keepdims=0)
    model = _inferred(finished(builder, x, total))
    assert fused(model).rows == []


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_exported_models(shared: Path, name: str) -> None:
    path = shared / "models" / f"torch-{name}-batched_mm-fp32-none" / "model.onnx"
    before, after = (ir.external_data.load_to_model(ir.load(path)) for _ in range(2))
    assert fused(after).rows == []
    the_node(after, "MoE")
    agree(before, after, Layer(hidden=128), 1e-5)
