"""Experts that all compute every token become one MoE, or stay with the reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import rewriter
from onnxscript.rewriter import MatchingTracer

from qmoe_rules import (
    ConfigError,
    Report,
    fuse_experts_rules,
    moe_to_qmoe_rules,
    qmoe_to_moe_rules,
    save,
)
from qmoe_rules.report import CONVERTED, SKIPPED
from qmoe_rules.rules import apply_rules
from tests import expert_graphs
from tests.expert_graphs import ROUTERS, Builder, Layer
from tests.moe_models import Array, Graph, branches, nodes_of, relative_error, run, the_node

GPTOSS: dict[str, Any] = {"limit": 7.0, "alpha": 1.702, "beta": 1.0, "bias": True}


def fused(model: ir.Model) -> Report:
    """Fuses a model and returns the report."""
    report = Report()
    apply_rules(model, fuse_experts_rules(report=report))
    return report


def check_same(layer: Layer, tolerance: float = 1e-6) -> ir.Node:
    """Fuses a layer, checks that it computes the same in one MoE, and returns the MoE."""
    model = expert_graphs.model(layer)
    feeds = [expert_graphs.feeds(layer, tokens) for tokens in ((1, 1), (4, 5))]
    before = [run(model, feed)[0] for feed in feeds]
    assert fused(model).rows == []
    assert not [node for node in model.graph if node.op_type in ("Equal", "Sigmoid", "Relu")][1:]
    assert not any(value.name and ".experts." in value.name for value in old_weights(model))
    for feed, expected in zip(feeds, before, strict=True):
        assert relative_error(run(model, feed)[0], expected) < tolerance
    return the_node(model, "MoE")


def old_weights(model: ir.Model) -> list[ir.Value]:
    """Returns the initializers of single experts that are left."""
    return [
        value for value in model.graph.initializers.values() if "experts_" not in str(value.name)
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"signed"}))
def test_every_router_is_kept(router: str, dtype: Any) -> None:
    layer = Layer(router=router, dtype=dtype)
    node = check_same(layer, 1e-6 if dtype is np.float32 else 2e-3)
    direct = {"softmax_topk": 0, "softmax_topk_norm": 1, "topk_softmax": 1, "float32": 1}
    assert node.attributes.get_int("normalize_routing_weights") == direct.get(router, 1)
    assert node.attributes.get_int("k") == 2
    router_probs = node.inputs[1]
    assert router_probs is not None
    encoded = "Cast" if router not in direct else "Reshape"
    assert router_probs.producer().op_type == encoded  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "fields",
    [
        {"experts": 2, "k": 1},
        {"experts": 16, "k": 5},
        {"bias": True},
        {"bias": True, "swapped": True},
        {"flat": True},
        {"flat": True, "gemm": True, "bias": True},
        {"flat": True, "gemm": True},
        {"keepdims": 0},
        {"shared": "before"},
        {"shared": "after"},
        {"shared": "before", "experts": 1, "k": 1},
        {"activation": "silu"},
        {"activation": "relu", "bias": True},
        {"activation": "gelu"},
        {"numbers": [3, 0, 2, 1]},
        GPTOSS,
        {**GPTOSS, "limit": 0.25, "swapped": True},
        {**GPTOSS, "limit": None, "alpha": 0.7, "beta": 0.0},
        {"homes": {"experts.1.down.weight_t": "constant"}},
    ],
    ids=str,
)
def test_every_form_of_expert_is_kept(fields: dict[str, Any]) -> None:
    check_same(Layer(**fields))


def test_attributes_are_all_written_out() -> None:
    node = check_same(Layer(**GPTOSS))
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert values == {
        "activation_alpha": pytest.approx(1.702),
        "activation_beta": 1.0,
        "activation_type": "swiglu",
        "k": 2,
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "swiglu_limit": 7.0,
        "use_sparse_mixer": 0,
    }
    plain = check_same(Layer(activation="relu"))
    assert plain.attributes.get_int("swiglu_fusion") == 0
    assert "swiglu_limit" not in plain.attributes


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_the_experts_rows_in_turn(dtype: Any) -> None:
    model = expert_graphs.model(dtype=dtype, bias=True)
    old = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    fused(model)
    new = [value.const_value.numpy() for value in the_node(model, "MoE").inputs[2:] if value]  # type: ignore[union-attr]
    assert [array.dtype for array in new] == [np.dtype(dtype)] * 4
    for expert in range(4):
        name = f"l0.experts.{expert}"
        fc1, fc1_bias, fc2, fc2_bias = (array[expert] for array in new)
        assert np.array_equal(fc1[0::2], old[f"{name}.gate.weight_t"].T)
        assert np.array_equal(fc1[1::2], old[f"{name}.up.weight_t"].T)
        assert np.array_equal(fc1_bias[0::2], old[f"{name}.gate.bias"])
        assert np.array_equal(fc1_bias[1::2], old[f"{name}.up.bias"])
        assert np.array_equal(fc2, old[f"{name}.down.weight_t"].T)
        assert np.array_equal(fc2_bias, old[f"{name}.down.bias"])


def test_node_and_weights_have_names_of_the_experts() -> None:
    model = expert_graphs.model()
    fused(model)
    node = the_node(model, "MoE")
    assert node.name == "l0.experts"
    assert [value.name for value in node.inputs[2:] if value] == [
        "l0.experts.fc1_experts_weights",
        "l0.experts.fc2_experts_weights",
    ]


def test_nothing_is_read_before_the_model_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    original = expert_graphs.model()
    ir.save(original, path, external_data="model.data", size_threshold_bytes=0)
    model = ir.load(path)
    fused(model)
    assert len(model.graph.initializers) == 3
    save(model, tmp_path / "fused" / "model.onnx")
    feeds = expert_graphs.feeds()
    session = ort.InferenceSession(tmp_path / "fused" / "model.onnx")
    assert relative_error(session.run(None, feeds)[0], run(original, feeds)[0]) < 1e-6


def test_512_experts_and_a_recursion_limit_do_not_meet() -> None:
    model = expert_graphs.model(experts=512, hidden=8, inter=8, k=8)
    feeds = expert_graphs.feeds(Layer(hidden=8))
    before = run(model, feeds)[0]
    assert fused(model).rows == []
    assert sum(1 for _ in model.graph) == 5
    assert relative_error(run(model, feeds)[0], before) < 1e-6


# What must stay


def graph_of(model: ir.Model) -> list[bytes]:
    """Returns everything but the types, which the rewriter fills in for constants."""
    proto = ir.to_proto(model).graph
    fields = (proto.node, proto.initializer, proto.input, proto.output)
    return [each.SerializeToString() for field in fields for each in field]


def check_stays(model: ir.Model, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    before = graph_of(model)
    with caplog.at_level(logging.WARNING):
        report = fused(model)
    assert [(row.status, row.reason) for row in report.rows] == [(SKIPPED, reason)]
    assert [record.message for record in caplog.records] == [
        f"the experts before {report.rows[0].node} are not fused: {reason}"
    ]
    assert graph_of(model) == before


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


# With other rules, graphs and ways of applying


def test_two_layers_in_a_row_and_the_whole_rewriter() -> None:
    layer = Layer(shared="before", bias=True)
    graph = Graph()
    x = expert_graphs.source(graph, layer)
    first = Builder(layer, graph, "l0.").experts(x)
    middle = graph.op("Add", x, first, out="middle", like=x)
    second = Builder(replace(layer, seed=1), graph, "l1.")
    model = expert_graphs.finished(second, x, second.experts(middle))
    before = run(model, expert_graphs.feeds())[0]
    report = Report()
    rules = [*fuse_experts_rules(), *moe_to_qmoe_rules(bits=8, report=report, target="cpu")]
    rewritten = rewriter.rewrite(model, rules)
    assert [(row.node, row.status) for row in report.rows] == [
        ("l0.experts", CONVERTED),
        ("l1.experts", CONVERTED),
    ]
    names = {str(name) for name in rewritten.graph.initializers}
    assert not any(
        "experts." in name and "quantized" not in name
        for name in names
        if not name.endswith(("scales", "bias"))
    )
    assert relative_error(run(rewritten, expert_graphs.feeds())[0], before) < 0.03


def test_nothing_of_any_layer_is_left() -> None:
    layer = Layer()
    graph = Graph()
    x = expert_graphs.source(graph, layer)
    first, second = Builder(layer, graph, "l0."), Builder(replace(layer, seed=1), graph, "l1.")
    middle = first.experts(x)
    middle.type, middle.shape = x.type, x.shape
    model = expert_graphs.finished(second, x, second.experts(middle))
    assert fused(model).rows == []
    left = Counter(node.op_type for node in model.graph)
    assert (left["MoE"], left["MatMul"]) == (2, 2)
    assert {"TopK", "Equal", "ReduceSum", "Div"}.isdisjoint(left)
    assert set(model.graph.initializers) == {
        f"l{index}.{name}"
        for index in (0, 1)
        for name in ("router", "experts.fc1_experts_weights", "experts.fc2_experts_weights")
    }


def test_layers_that_share_their_weights_share_the_new_ones() -> None:
    layer = Layer()
    graph = Graph()
    x = expert_graphs.source(graph, layer)
    builder = Builder(layer, graph)
    first = builder.experts(x)
    first.type, first.shape = x.type, x.shape
    weights = {str(value.name): value for value in graph.initializers}
    builder.weight = lambda name, array: weights[f"l0.{name}"]  # type: ignore[method-assign]
    builder.prefix = "l0.again."
    model = expert_graphs.finished(builder, x, builder.experts(first))
    before = run(model, expert_graphs.feeds())[0]
    assert fused(model).rows == []
    moes = nodes_of(model, "MoE")
    assert len(moes) == 2
    assert moes[0].inputs[2:] == moes[1].inputs[2:]
    assert relative_error(run(model, expert_graphs.feeds())[0], before) < 1e-6


def test_experts_in_a_branch_with_weights_outside() -> None:
    outer = Graph()
    layer = Layer(hidden=128)

    def fill(prefix: str) -> Any:
        def body(graph: Graph, x: ir.Value, router_probs: ir.Value) -> ir.Value:
            builder = Builder(replace(layer, flat=True), graph, prefix)
            builder.weight = Builder(layer, outer, prefix).weight  # type: ignore[method-assign]
            return graph.op("Identity", builder.experts(x), out=f"{prefix}y", like=x)

        return body

    model = branches(fill("then."), fill("else."), outer)
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)}
    # The branches do not read router_probs.
    feeds["router_probs"] = np.zeros((5, 3), np.float32)
    every = [{**feeds, "flag": np.array(flag)} for flag in (True, False)]
    before = [run(model, feed)[0] for feed in every]
    assert fused(model).rows == []
    assert len(nodes_of(model, "MoE")) == 2
    assert len(model.graph.initializers) == 6  # two routers, two layers of two projections
    for feed, expected in zip(every, before, strict=True):
        assert relative_error(run(model, feed)[0], expected) < 1e-6


def test_a_dry_run_changes_nothing() -> None:
    model = expert_graphs.model()
    before = graph_of(model)
    fuse_experts_rules().apply_to_model(model, tracer=MatchingTracer())
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    assert graph_of(model) == before


# As an exporter writes them

SAMPLES = {
    "mobius-deepseek_v3-fp32-cpu": 1,
    "mobius-gptoss-fp32-cpu": 2,
    "mobius-mixtral-fp32-cpu": 2,
    "mobius-phimoe-fp32-cpu": 2,
}


def language_feeds(model: ir.Model, batch: int, length: int = 7) -> dict[str, Array]:
    """Returns tokens without a past for a language model."""
    rng = np.random.default_rng(batch)
    feeds = {}
    for value in model.graph.inputs:
        shape = [_size(size, batch, length) for size in value.shape or ()]
        if value.name == "input_ids":
            array: Any = rng.integers(0, 256, shape)
        elif value.name == "position_ids":
            array = np.broadcast_to(np.arange(length), shape)
        else:
            array = np.ones(shape)
        feeds[str(value.name)] = array.astype(value.dtype.numpy())  # type: ignore[union-attr]
    return feeds


def _size(size: int | ir.SymbolicDim, batch: int, length: int) -> int:
    if isinstance(size, int):
        return size
    return {"batch": batch, "past_sequence_len": 0}.get(str(size.value), length)


def outputs_of(path: Path, feeds: Sequence[dict[str, Array]]) -> list[list[Array]]:
    """Runs a model in a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [[np.asarray(out) for out in session.run(None, feed)] for feed in feeds]


def errors(actual: Sequence[Sequence[Array]], expected: Sequence[Sequence[Array]]) -> list[float]:
    return [
        relative_error(a, b)
        for first, second in zip(actual, expected, strict=True)
        for a, b in zip(first, second, strict=True)
    ]


@pytest.mark.parametrize("name", SAMPLES)
def test_exported_models(name: str, shared: Path, tmp_path: Path) -> None:
    path = shared / "models" / name / "model.onnx"
    model = ir.load(path)
    feeds = [language_feeds(model, batch) for batch in (1, 4)]
    assert fused(model).rows == []
    assert len(nodes_of(model, "MoE")) == SAMPLES[name]
    assert Counter(node.op_type for node in model.graph)["Equal"] == 0
    assert not [each for each in model.graph.initializers if "experts.0" in each]
    save(model, tmp_path / "fused.onnx")
    found = outputs_of(tmp_path / "fused.onnx", feeds)
    assert max(errors(found, outputs_of(path, feeds))) < 1e-5


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 32)])
@pytest.mark.parametrize("name", SAMPLES)
def test_exported_models_quantized(
    name: str, bits: int, block: int, shared: Path, tmp_path: Path
) -> None:
    """The quantized model computes what its own weights mean in float."""
    model = ir.load(shared / "models" / name / "model.onnx")
    feeds = [language_feeds(model, batch) for batch in (1, 4)]
    report = Report()
    quantize = moe_to_qmoe_rules(bits=bits, block_size=block, report=report, target="cpu")
    apply_rules(model, [*fuse_experts_rules(report=report), *quantize])
    assert [row.status for row in report.rows] == [CONVERTED] * SAMPLES[name]
    save(model, tmp_path / "quantized.onnx")
    found = outputs_of(tmp_path / "quantized.onnx", feeds)
    back = ir.load(tmp_path / "quantized.onnx")
    apply_rules(back, qmoe_to_moe_rules())
    assert len(nodes_of(back, "MoE")) == SAMPLES[name]
    save(back, tmp_path / "float.onnx")
    assert max(errors(found, outputs_of(tmp_path / "float.onnx", feeds))) < 1e-5


def test_an_invalid_export_is_left_alone(shared: Path) -> None:
    model = ir.load(shared / "models" / "mobius-gptoss-fp16-cuda" / "model.onnx")
    count = sum(1 for _ in model.graph)
    report = fused(model)
    reason = "expert 0 has FLOAT16 weights and a FLOAT mask"
    assert [row.reason for row in report.rows] == [reason] * 2
    assert sum(1 for _ in model.graph) == count
