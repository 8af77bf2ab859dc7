"""Experts that all compute every token stay where one MoE is not provable, with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import (
    ConfigError,
    fuse_experts_rules,
)
from tests import expert_graphs
from tests.expert_graphs import ROUTERS, Builder, Layer
from tests.fusions import GPTOSS, check_stays, fused
from tests.moe_models import Graph, nodes_of, relative_error, run

GATE = "l0.experts.2.gate.weight_t"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"numbers": [0, 1, 3]}, "expert 2 is missing"),
        ({"numbers": [1, 2, 3]}, "expert 0 is missing"),
        ({"numbers": [0, 1, 2]}, "the router ranks 4 experts, and there are 3"),
        ({"numbers": [0, 1, 1, 2, 3]}, "expert 1 is added twice"),
        ({"numbers": [-1, 0, 1, 2]}, "there is no expert -1"),
        ({"router": "signed"}, "the weights l0.values_3 may be negative"),
        ({"activation": "reglu"}, "MoE has no gated relu"),
        (
            {"odd": {2: {"activation": "silu"}}},
            "expert 2 computes silu(alpha=1, beta=0, limit=None), and expert 0 "
            "swiglu(alpha=1, beta=0, limit=None)",
        ),
        (
            {**GPTOSS, "odd": {2: {"limit": 6.0}}},
            "expert 2 computes swiglu(alpha=1.702, beta=1, limit=6.0), and expert 0 "
            "swiglu(alpha=1.702, beta=1, limit=7.0)",
        ),
        (
            {"odd": {2: {"inter": 32}}},
            "l0.experts.2.gate.weight_t is float32 [64, 32], and l0.experts.0.gate.weight_t is "
            "float32 [64, 96]",
        ),
        ({"bias": True, "odd": {2: {"bias": False}}}, "expert 2 has no bias, and others have"),
        (
            {"flat": True, "odd": {2: {"gemm": True}}},
            "some weights are stored transposed, and others are not",
        ),
        (
            {"homes": {"experts.2.gate.weight_t": "overridable"}},
            f"{GATE} is a graph input, so its default may be overridden at run time",
        ),
        (
            {"homes": {"experts.2.gate.weight_t": "input"}},
            f"{GATE} is a graph input, so its default may be overridden at run time",
        ),
        ({"homes": {"experts.2.gate.weight_t": "computed"}}, f"{GATE} is not a constant"),
    ],
    ids=str,
)
def test_what_is_not_provable_stays(
    fields: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_stays(expert_graphs.model(**fields), reason, caplog)


GEMM = Layer(flat=True, gemm=True, bias=True)


@pytest.mark.parametrize(
    "attributes", [{"transA": 1}, {"alpha": 2.0}, {"beta": 0.5}], ids=lambda a: next(iter(a))
)
def test_a_gemm_that_is_no_linear_map_stays(
    attributes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = expert_graphs.model(GEMM)
    gate = next(node for node in model.graph if node.op_type == "Gemm")
    gate.attributes.update({a.name: a for a in ir.convenience.convert_attributes(attributes)})
    check_stays(model, "expert 0: what l0.Mul_12 computes is no activation of MoE", caplog)


def test_a_gemm_may_say_that_it_has_no_bias() -> None:
    model = expert_graphs.model(replace(GEMM, bias=False))
    before = run(model, expert_graphs.feeds(GEMM))[0]
    for node in model.graph:
        if node.op_type == "Gemm":
            node.resize_inputs(3)
    assert fused(model).rows == []
    assert relative_error(run(model, expert_graphs.feeds(GEMM))[0], before) < 1e-6


def test_an_operator_of_another_domain_is_no_product(caplog: pytest.LogCaptureFixture) -> None:
    model = expert_graphs.model()
    for node in model.graph:
        if node.op_type == "MatMul" and "experts" in str(node.outputs[0].name):
            node.domain = "local"
    reason = "is not computed by a linear map with constant weights"
    check_stays(model, f"expert 0: l0.experts.0.down.MatMul {reason}", caplog)


def test_weights_with_another_axis_stay(caplog: pytest.LogCaptureFixture) -> None:
    """MatMul broadcasts one matrix of weights, [1, K, N], over a batch."""
    model = expert_graphs.model()
    for name, value in model.graph.initializers.items():
        if name.endswith(".gate.weight_t") and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy()[None], name=name)
            value.shape = ir.Shape(value.const_value.numpy().shape)
    run(model, expert_graphs.feeds())
    check_stays(model, "l0.experts.0.gate.weight_t is [1, 64, 96]", caplog)


def values_of(model: ir.Model, op_type: str) -> list[ir.Value]:
    return [node.outputs[0] for node in model.graph if node.op_type == op_type]


def test_an_intermediate_that_is_a_graph_output_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = expert_graphs.model()
    value = values_of(model, "Sigmoid")[1]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "s", 96])
    model.graph.outputs.append(value)
    check_stays(model, f"{value.name} is a graph output", caplog)


@pytest.mark.parametrize("op_type", ["Add", "Equal", "MatMul"])
def test_an_intermediate_that_is_used_elsewhere_stays(
    op_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = expert_graphs.model()
    value = values_of(model, op_type)[1]
    user = ir.node("Shape", [value], name="user")
    user.outputs[0].name = "size"
    user.outputs[0].type, user.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["r"])
    model.graph.append(user)
    model.graph.outputs.append(user.outputs[0])
    check_stays(model, f"{value.name} is used by user too", caplog)


def test_the_router_may_be_used_elsewhere() -> None:
    model = expert_graphs.model(router="softmax_topk")
    top = next(node for node in model.graph if node.op_type == "TopK")
    values = top.outputs[0]
    values.type, values.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "s", 2])
    model.graph.outputs.append(values)
    before = run(model, expert_graphs.feeds())
    assert fused(model).rows == []
    after = run(model, expert_graphs.feeds())
    assert relative_error(after[0], before[0]) < 1e-6
    assert np.array_equal(after[1], before[1])


def test_experts_of_different_inputs_stay(caplog: pytest.LogCaptureFixture) -> None:
    model = expert_graphs.model()
    x = model.graph.inputs[0]
    node = next(n for n in model.graph if n.outputs[0].name == "l0.experts.2.gate.MatMul")
    other = next(n for n in model.graph if n.outputs[0].name == "l0.experts.2.up.MatMul")
    double = ir.node("Add", [x, x])
    double.outputs[0].name = "double"
    model.graph.insert_before(node, double)
    node.replace_input_with(0, double.outputs[0])
    reason = "gate and up are not applied to the same hidden states"
    check_stays(model.clone(), f"expert 2: {reason}", caplog)
    caplog.clear()
    other.replace_input_with(0, double.outputs[0])
    check_stays(model, "expert 2 is applied to double, not to x", caplog)


def test_experts_of_an_input_of_unknown_rank_stay(caplog: pytest.LogCaptureFixture) -> None:
    model = expert_graphs.model()
    node = next(iter(model.graph))
    x = model.graph.inputs[0]
    hidden = ir.node("Relu", [x])
    hidden.outputs[0].name = "hidden"
    ir.convenience.replace_all_uses_with(x, hidden.outputs[0])
    model.graph.insert_before(node, hidden)
    hidden.replace_input_with(0, x)
    reason = "the experts' input hidden is of unknown rank; MoE takes 2-D and 3-D"
    check_stays(model, reason, caplog)


def test_a_rest_that_is_a_part_of_an_expert_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = expert_graphs.model(shared="before")
    first = next(node for node in model.graph if node.op_type == "Add")
    inner = next(n for n in model.graph if n.outputs[0].name == "l0.experts.0.down.MatMul")
    first.replace_input_with(0, inner.outputs[0])
    name = inner.outputs[0].name
    check_stays(model, f"{name} is a part of the experts and their input too", caplog)


def test_a_router_of_other_tokens_stays(caplog: pytest.LogCaptureFixture) -> None:
    """One row of weights for all tokens of a sequence is broadcast, and MoE cannot do that."""
    layer = Layer()
    builder = Builder(layer)
    graph = builder.graph
    pooled = graph.input("pooled", np.float32, ("batch", 1, layer.hidden))
    x = expert_graphs.source(graph, layer)
    indices, weights = ROUTERS["softmax_topk"](builder, pooled)
    terms = [
        builder.term(builder.expert(x, f"experts.{e}", layer), e, indices, weights)
        for e in range(4)
    ]
    total = terms[0]
    for term in terms[1:]:
        total = builder.op("Add", total, term)
    model = expert_graphs.finished(builder, x, total)
    reason = f"{indices.name} is not known to have one row per token of x"
    check_stays(model, reason, caplog)


def test_a_mask_of_another_type_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = expert_graphs.model(dtype=np.float16, router="softmax_topk")
    top = next(node for node in model.graph if node.op_type == "TopK")
    top.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    check_stays(model, "expert 0 has FLOAT weights and a FLOAT16 mask", caplog)


def test_an_encoded_router_needs_opset_16(caplog: pytest.LogCaptureFixture) -> None:
    check_stays(
        expert_graphs.model(router="sigmoid", opset=15),
        "its routing needs opset 16, and the model imports 15",
        caplog,
    )
    model = expert_graphs.model(opset=15)
    assert fused(model).rows == []


def test_experts_in_a_function_stay() -> None:
    inner = expert_graphs.model()
    function = ir.Function("local", "Layer", graph=inner.graph, attributes=[])
    graph = Graph()
    x = expert_graphs.source(graph, Layer())
    y = graph.op("Layer", x, out="out", like=x, domain="local")
    model = graph.model(y, opsets={"": 21, "local": 1}, functions=[function])
    report = fused(model)
    assert [row.reason for row in report.rows] == [
        "they are inside a function, which holds no initializers; inline it (see prepare)"
    ]
    assert not nodes_of(model, "MoE")


def test_additions_that_are_no_experts_are_not_mentioned() -> None:
    graph = Graph()
    x = expert_graphs.source(graph, Layer())
    model = graph.model(graph.op("Add", x, x, out="y", like=x))
    assert fused(model).rows == []


def test_an_unknown_target_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="target='tpu'"):
        fuse_experts_rules(target="tpu")
