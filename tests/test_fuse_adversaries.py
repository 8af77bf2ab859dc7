"""Graphs that look like routed experts and mean something else, or are typed otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript import rewriter

from qmoe_rules import fuse_experts_rules
from qmoe_rules.report import Report
from qmoe_rules.rules import apply_rules
from tests import expert_graphs
from tests.expert_graphs import ROUTERS, Builder, Layer
from tests.moe_models import nodes_of, relative_error, run

Router = Callable[[Builder, ir.Value], tuple[ir.Value, ir.Value]]


def layer_with(
    router: Router, monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> tuple[ir.Model, Layer]:
    monkeypatch.setitem(ROUTERS, "adversary", router)
    layer = Layer(router="adversary", **fields)
    builder = Builder(layer)
    x = expert_graphs.source(builder.graph, layer)
    return expert_graphs.finished(builder, x, builder.experts(x), 21), layer


def without_types(model: ir.Model) -> ir.Model:
    """Returns the model as an exporter leaves it that writes no value_info."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return ir.from_proto(proto)


def float32_router(builder: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    layer = builder.layer
    weight = builder.rng.standard_normal((layer.hidden, layer.experts)).astype(np.float32)
    wide = builder.op("Cast", x, to=ir.DataType.FLOAT)
    logits = builder.op("MatMul", wide, builder.weight("router", weight))
    values, indices = builder.top(logits, layer.k)
    weights = builder.op("Softmax", values, axis=-1)
    return indices, builder.op("Cast", weights, to=ir.DataType.FLOAT16)


def rounded_to_integers(builder: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    layer = builder.layer
    weight = 3 * builder.rng.standard_normal((layer.hidden, layer.experts))
    logits = builder.op("MatMul", x, builder.weight("router", weight.astype(layer.dtype)))
    whole = builder.op("Cast", logits, to=ir.DataType.INT64)
    values, indices = builder.top(builder.op("Cast", whole, to=ir.DataType.FLOAT), layer.k)
    return indices, builder.op("Softmax", values, axis=-1)


def made_equal(*steps: Callable[[Builder, ir.Value], ir.Value]) -> Router:
    """Returns a router by logits that something has made equal in many tokens."""

    def router(builder: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        layer = builder.layer
        weight = 3 * builder.rng.standard_normal((layer.hidden, layer.experts)) / layer.hidden**0.5
        logits = builder.op("MatMul", x, builder.weight("router", weight.astype(layer.dtype)))
        for step in steps:
            logits = step(builder, logits)
            logits.shape = ir.Shape(["batch", "sequence", layer.experts])
        values, indices = builder.top(builder.op("Softmax", logits, axis=-1), layer.k)
        return indices, values

    return router


def relu(builder: Builder, value: ir.Value) -> ir.Value:
    return builder.op("Relu", value)


def coarse(builder: Builder, value: ir.Value) -> ir.Value:
    step = builder.number(0.5)
    zero = builder.constant(128, np.uint8)
    codes = builder.op("QuantizeLinear", value, step, zero)
    return builder.op("DequantizeLinear", codes, step, zero)


def times_two(builder: Builder, value: ir.Value) -> ir.Value:
    return builder.op("Mul", value, builder.number(2.0))


def times_zeros(builder: Builder, value: ir.Value) -> ir.Value:
    return builder.op("Mul", value, builder.constant([1, 0, 0, 1], np.float32))


def plus_half(builder: Builder, value: ir.Value) -> ir.Value:
    return builder.op("Add", builder.number(0.5), value)


@pytest.mark.parametrize(
    ("steps", "direct"),
    [
        ((), True),
        ((times_two, plus_half), True),
        ((relu,), False),
        ((relu, times_two), False),
        ((relu, plus_half, times_two), False),
        ((times_zeros,), False),
        ((coarse,), False),
        ((lambda b, value: b.op("Ceil", value),), False),
        ((lambda b, value: b.op("Tanh", b.op("Relu", value)),), False),
        ((lambda b, value: b.op("Mul", value, b.op("Sigmoid", value)),), False),
    ],
    ids=[
        "nothing", "scale and shift", "relu", "relu and scale", "relu, shift and scale", "zeros",
        "quantized", "ceil", "tanh", "swish",
    ],
)  # fmt: skip
def test_logits_that_something_makes_equal_are_not_handed_over(
    steps: Any, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TopK takes the first of equal logits, and MoE the last."""
    model, layer = layer_with(made_equal(*steps), monkeypatch)
    feeds = expert_graphs.feeds(layer, (2, 200))
    expected = run(model, feeds)[0]
    rewriter.rewrite(model, [*fuse_experts_rules()])
    (moe,) = nodes_of(model, "MoE")
    router_probs = moe.inputs[1]
    assert router_probs is not None
    assert (router_probs.producer().op_type == "Reshape") is direct  # type: ignore[union-attr]
    assert relative_error(run(model, feeds)[0], expected) < 1e-6


def chosen_thrice(builder: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    indices, weights = ROUTERS["softmax_topk_norm"](builder, x)
    return (
        builder.op("Concat", indices, indices, indices, axis=-1),
        builder.op("Concat", weights, weights, weights, axis=-1),
    )


def float_indices(builder: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    indices, weights = ROUTERS["sigmoid"](builder, x)
    return builder.op("Cast", indices, to=ir.DataType.FLOAT), weights


@pytest.mark.parametrize(
    ("router", "fields", "tolerance"),
    [
        (float32_router, {"dtype": np.float16}, 2e-3),
        (rounded_to_integers, {}, 1e-5),
        (chosen_thrice, {}, 1e-5),
    ],
)
def test_whatever_is_fused_computes_the_same(
    router: Router, fields: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layer = layer_with(router, monkeypatch, **fields)
    feeds = expert_graphs.feeds(layer, (2, 200))
    expected = run(model, feeds)[0]
    fused = rewriter.rewrite(without_types(model), [*fuse_experts_rules()])
    assert relative_error(run(fused, feeds)[0], expected) <= tolerance


def top_of_an_old_opset(builder: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    indices, weights = ROUTERS["softmax_topk"](builder, x)
    top = builder.graph.nodes[-1]
    top.resize_inputs(1)
    top.attributes["k"] = ir.AttrInt64("k", builder.layer.k)
    return indices, weights


def test_k_that_is_an_attribute_is_of_an_opset_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = layer_with(top_of_an_old_opset, monkeypatch)
    model.graph.opset_imports[""] = 9
    apply_rules(model, fuse_experts_rules())
    assert nodes_of(model, "MoE") == []
    assert caplog.messages[0].endswith("its routing needs opset 13, and the model imports 9")


def test_indices_of_another_type_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Builder, "constant", _float_numbers(Builder.constant))
    model, _ = layer_with(float_indices, monkeypatch)
    rewriter.rewrite(model, [*fuse_experts_rules()])
    assert nodes_of(model, "MoE") == []


class Old(Builder):
    """Writes operators as they were before their numbers became inputs."""

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        if op_type in ("ReduceSum", "Unsqueeze"):
            x, axes = inputs
            assert axes is not None
            node = axes.producer()
            assert node is not None
            (axis,) = node.attributes["value"].as_tensor().numpy().tolist()
            # The last axis has no negative number yet.
            return super().op(op_type, x, axes=[2 if axis == -1 else axis], **attributes)
        return super().op(op_type, *inputs, **attributes)


class Oldest(Old):
    """Writes TopK as it was before its k became an input."""

    def top(self, scores: ir.Value, k: int) -> tuple[ir.Value, ir.Value]:
        values, indices = super().top(scores, k)
        node = values.producer()
        assert node is not None
        node.resize_inputs(1)
        node.attributes["k"] = ir.AttrInt64("k", k)
        return values, indices


@pytest.mark.parametrize(("kind", "opset"), [(Old, 12), (Old, 11), (Oldest, 9)])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_models_of_old_opsets_are_read_and_stay(
    kind: type[Builder], opset: int, keepdims: int
) -> None:
    builder = kind(Layer(keepdims=keepdims))
    x = expert_graphs.source(builder.graph, builder.layer)
    model = expert_graphs.finished(builder, x, builder.experts(x), opset)
    run(model, expert_graphs.feeds())
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    report = Report()
    rewriter.rewrite(ir.from_proto(proto), [*fuse_experts_rules(report=report)])
    (row,) = report.rows
    assert row.reason == f"its routing needs opset 13, and the model imports {opset}"


def test_columns_of_old_opsets_are_read() -> None:
    builder = Builder(Layer())
    x = expert_graphs.source(builder.graph, builder.layer)
    product = builder.op("MatMul", x, builder.random("w", 64, 64))
    column = builder.op("Unsqueeze", builder.random("v", 5), axes=[1])
    total = builder.op("Add", builder.op("Mul", product, column), x)
    model = expert_graphs.finished(builder, x, total, 12)
    run(model, expert_graphs.feeds())
    report = Report()
    rewriter.rewrite(model, [*fuse_experts_rules(report=report)])
    assert report.rows == []


def the_best_of_all_tokens(builder: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """One weight for all tokens, the largest."""
    indices, weights = ROUTERS["sigmoid"](builder, x)
    best, _ = builder.top(weights, 1)
    builder.graph.nodes[-1].attributes["axis"] = ir.AttrInt64("axis", 0)
    return indices, best


def test_weights_that_are_ranked_among_tokens_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = layer_with(the_best_of_all_tokens, monkeypatch, k=1, flat=True)
    feeds = expert_graphs.feeds(layer)
    expected = run(model, feeds)[0]
    rewriter.rewrite(model, [*fuse_experts_rules()])
    assert nodes_of(model, "MoE") == []
    assert np.array_equal(run(model, feeds)[0], expected)


def test_what_is_chosen_by_its_name_stays() -> None:
    """A sum of what a text selects looks like an expert's weight, and its number is a text."""
    builder = Builder(Layer())
    x = builder.graph.input("x", np.float32, ("tokens", 2))
    names = ir.val("names", ir.DataType.STRING, ["tokens", 2])
    builder.graph.inputs.append(names)
    equal = builder.op("Equal", names, builder.op("Constant", value_string="0"))
    mask = builder.op("Cast", equal, to=ir.DataType.FLOAT)
    weight = builder.op("ReduceSum", builder.op("Mul", x, mask), builder.constant([-1]), keepdims=1)
    y = builder.op("Add", builder.op("Mul", x, weight), x)
    y.type, y.shape = x.type, x.shape
    model = builder.graph.model(y)
    rewriter.rewrite(model, [*fuse_experts_rules()])
    assert nodes_of(model, "MoE") == []


def _float_numbers(constant: Any) -> Any:
    def as_floats(builder: Builder, value: Any, dtype: Any = np.int64) -> ir.Value:
        made: ir.Value = constant(builder, value, np.float32 if isinstance(value, int) else dtype)
        return made

    return as_floats
