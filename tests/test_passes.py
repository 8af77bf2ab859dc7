"""`prepare` and `QuantizeMoEPass`: functions that hold MoE nodes, and the report of a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import plan
from qmoe_rules.errors import ConfigError
from qmoe_rules.passes import QuantizeMoEPass, prepare
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, KEPT, SKIPPED
from tests.moe_models import (
    OPSETS,
    Array,
    Arrays,
    Experts,
    Graph,
    branches,
    expected,
    inputs_of,
    layers,
    nodes_of,
    relative_error,
    run,
    single,
    the_node,
)

EXACT = 1e-5
EXPERTS = Experts()
ATTRIBUTES: dict[str, Any] = {**EXPERTS.attributes, "k": 2}
LOCAL = {**OPSETS, "local": 1}
SPEC = Recipe().specs["fc1"]


def wanted(feeds: Arrays, calls: int = 1) -> Array:
    x = feeds["x"]
    for _ in range(calls):
        x = expected(EXPERTS.arrays(), feeds | {"x": x}, SPEC, **ATTRIBUTES)
    return x


def function(name: str, body: Graph, *outputs: ir.Value, domain: str = "local") -> ir.Function:
    return ir.Function(domain, name, graph=body.done(*outputs, opsets=LOCAL), attributes=[])


def moe_block(name: str = "Block", weights_inside: bool = True) -> ir.Function:
    """Returns a function around a MoE, whose weights are constants or arguments."""
    body, arrays = Graph(), EXPERTS.arrays()
    x, router_probs = ir.val("inner_x"), ir.val("inner_router")
    body.inputs.extend((x, router_probs))
    if weights_inside:
        weights = body.weights(arrays, homes=dict.fromkeys(arrays, "constant"))
    else:
        weights = {name: ir.val(f"inner_{name}") for name in arrays}
        body.inputs.extend(weights.values())
    return function(name, body, body.moe(x, router_probs, weights, out="inner", **ATTRIBUTES))


def quick_gelu() -> ir.Function:
    """Returns a fallback for `com.microsoft::QuickGelu`, which the runtime has a kernel for."""
    body = Graph()
    x = ir.val("gelu_x")
    body.inputs.append(x)
    gate = body.op("Sigmoid", x, out="gelu_gate")
    return function(
        "QuickGelu", body, body.op("Mul", x, gate, out="gelu_y"), domain="com.microsoft"
    )


def calls(functions: Sequence[ir.Function], names: Sequence[str]) -> ir.Model:
    """Returns a model that calls functions of `local`, one after the other."""
    graph = Graph()
    y, router_probs = inputs_of(graph, EXPERTS)
    for index, name in enumerate(names):
        y = graph.op(name, y, router_probs, out=f"y{index}", like=y, domain="local")
    return graph.model(y, opsets=LOCAL, functions=functions)


def quantize(model: ir.Model, **fields: Any) -> QuantizeMoEPass:
    quantize_moe = QuantizeMoEPass(**fields)
    assert quantize_moe(model).model is model
    return quantize_moe


# --- Functions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_functions_with_a_moe_are_inlined_and_converted(count: int) -> None:
    model = calls([moe_block()], ["Block"] * count)
    report = quantize(model).report
    assert not model.functions
    assert [row.status for row in report.rows] == [CONVERTED] * count
    assert len(nodes_of(model, "QMoE")) == count
    feeds = EXPERTS.feeds()
    assert relative_error(run(model, feeds)[0], wanted(feeds, count)) <= EXACT


def test_weights_may_be_arguments_of_the_function() -> None:
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    weights = graph.weights(EXPERTS.arrays()).values()
    y = graph.op("Block", x, router_probs, *weights, out="y", like=x, domain="local")
    model = graph.model(y, opsets=LOCAL, functions=[moe_block(weights_inside=False)])
    assert quantize(model).report.count(CONVERTED) == 1
    assert not model.functions
    assert {"fc1", "fc2"}.isdisjoint(model.graph.initializers)
    feeds = EXPERTS.feeds()
    assert relative_error(run(model, feeds)[0], wanted(feeds)) <= EXACT


def nested(name: str, inner: str) -> ir.Function:
    """Returns a function that calls another one inside an If."""
    body = Graph()
    x, router_probs = ir.val(f"{name}_x"), ir.val(f"{name}_router")
    body.inputs.extend((x, router_probs))
    bodies: dict[str, Any] = {}
    for branch in ("then_branch", "else_branch"):
        inside = Graph()
        out = inside.op(inner, x, router_probs, out=f"{name}_{branch}", domain="local")
        bodies[branch] = inside.done(out)
    flag = body.weight(f"{name}_flag", np.array(True), "constant")
    return function(name, body, body.op("If", flag, out=f"{name}_y", **bodies))


def test_callers_of_such_functions_are_inlined_too() -> None:
    functions = [nested("Outer", "Middle"), nested("Middle", "Block"), moe_block()]
    model = calls(functions, ["Outer"])
    quantize(model)
    assert not model.functions
    assert nodes_of(model, "MoE") == []
    assert len(nodes_of(model, "QMoE")) == 4
    feeds = EXPERTS.feeds()
    assert relative_error(run(model, feeds)[0], wanted(feeds)) <= EXACT


@pytest.mark.parametrize("fallback_first", [False, True])
def test_other_functions_stay(fallback_first: bool) -> None:
    fallback, block = quick_gelu(), moe_block()
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    moe = graph.op("Block", x, router_probs, out="m", like=x, domain="local")
    y = graph.op("QuickGelu", moe, out="y", like=x, domain="com.microsoft", alpha=1.0)
    functions = [fallback, block] if fallback_first else [block, fallback]
    model = graph.model(y, opsets=LOCAL, functions=functions)
    assert prepare(model) is model
    assert list(model.functions.values()) == [fallback]
    assert [node.op_type for node in model.graph if node.domain] == ["MoE", "QuickGelu"]
    quantize(model)
    assert list(model.functions.values()) == [fallback]
    feeds = EXPERTS.feeds()
    linear = wanted(feeds)
    assert relative_error(run(model, feeds)[0], linear / (1 + np.exp(-linear))) <= EXACT


def test_a_model_without_such_functions_is_not_touched() -> None:
    graph = Graph()
    x, _ = inputs_of(graph, EXPERTS)
    model = graph.model(
        graph.op("QuickGelu", x, out="y", like=x, domain="com.microsoft", alpha=1.0),
        functions=[quick_gelu()],
    )
    before = ir.to_proto(model).SerializeToString()
    result = QuantizeMoEPass()(prepare(model))
    assert not result.modified
    assert ir.to_proto(model).SerializeToString() == before


def test_inlining_counts_as_a_modification() -> None:
    model = calls([moe_block()], ["Block"])
    result = QuantizeMoEPass(nodes_to_exclude=["*"])(model)
    assert not model.functions
    assert result.modified


# --- The report ----------------------------------------------------------------------------------


def test_the_report_has_every_node_once() -> None:
    model = layers(3, **ATTRIBUTES)
    quantize(model, nodes_to_exclude=["moe0", "moe2"])
    second = quantize(model, nodes_to_exclude=["moe2"]).report
    rows = {row.node: (row.status, row.reason) for row in second.rows}
    assert rows == {
        "moe0": (CONVERTED, ""),
        "moe1": (KEPT, "it is QMoE already"),
        "moe2": (SKIPPED, "excluded by the recipe"),
    }


def test_a_pass_may_be_used_again_and_reports_the_last_model() -> None:
    quantize_moe = QuantizeMoEPass(bits=8)
    assert quantize_moe(layers(2)).modified
    assert [row.node for row in quantize_moe.report.rows] == ["moe0", "moe1"]
    model = single()
    assert quantize_moe(model).modified
    assert [row.node for row in quantize_moe.report.rows] == ["moe"]
    assert not quantize_moe(model).modified
    assert [row.status for row in quantize_moe.report.rows] == [KEPT]


def test_the_pass_runs_in_a_sequence_with_others() -> None:
    model = single(**ATTRIBUTES)
    sequence = ir.passes.Sequential(
        QuantizeMoEPass(bits=8), ir.passes.common.RemoveUnusedNodesPass()
    )
    assert sequence(model).modified
    feeds = EXPERTS.feeds()
    final = expected(EXPERTS.arrays(), feeds, Recipe(bits=8).specs["fc1"], **ATTRIBUTES)
    assert relative_error(run(model, feeds)[0], final) <= EXACT


def test_recipe_and_fields_are_combined() -> None:
    model = single()
    quantize(model, recipe=Recipe(bits=8, block_size=64), block_size=32)
    attributes = the_node(model).attributes
    assert attributes["expert_weight_bits"].as_int() == 8
    assert attributes["block_size"].as_int() == 32


def test_a_wrong_recipe_fails_before_any_model() -> None:
    with pytest.raises(ConfigError, match="bits=5"):
        QuantizeMoEPass(bits=5)


def test_a_model_without_moe_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    graph = Graph()
    x, _ = inputs_of(graph, EXPERTS)
    model = graph.model(graph.op("Neg", x, out="y", like=x))
    quantize_moe = QuantizeMoEPass()
    assert not quantize_moe(model).modified
    assert quantize_moe.report.rows == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- Nodes of the same name ----------------------------------------------------------------------


def in_both_bodies() -> ir.Model:
    def fill(body: Graph, x: ir.Value, router_probs: ir.Value) -> ir.Value:
        return body.moe(x, router_probs, body.weights(EXPERTS.arrays()), out="inner", **ATTRIBUTES)

    return branches(fill, fill)


def quantized_block(name: str, with_moe: bool = False) -> ir.Function:
    """Returns a function around a QMoE, behind a MoE if wanted; only the function's name varies."""
    done = single(**{**ATTRIBUTES, "normalize_routing_weights": 1})  # which adds no Softmax
    quantize(done, target="cpu")
    stored = {
        name: value.const_value.numpy()
        for name, value in done.graph.initializers.items()
        if value.const_value is not None
    }
    body, node = Graph(), the_node(done)
    x, router_probs = ir.val("inner_x"), ir.val("inner_router")
    body.inputs.extend((x, router_probs))
    weights = [
        body.weight(f"q_{value.name}", stored[str(value.name)], "constant")
        for value in node.inputs[2:]
        if value is not None
    ]
    if with_moe:
        arrays = EXPERTS.arrays()
        constants = body.weights(arrays, homes=dict.fromkeys(arrays, "constant"))
        x = body.moe(x, router_probs, constants, out="between", **ATTRIBUTES)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    y = body.op(
        "QMoE",
        *(x, router_probs, *weights),
        out="q",
        name="qmoe",
        domain="com.microsoft",
        **attributes,
    )
    return function(name, body, y)


def in_two_functions() -> ir.Model:
    return calls([quantized_block("A"), quantized_block("B")], ["A", "B"])


def in_an_inlined_function() -> ir.Model:
    return calls([quantized_block("A", with_moe=True)], ["A", "A"])


@pytest.mark.parametrize("make", [in_both_bodies, in_two_functions, in_an_inlined_function])
def test_nodes_of_the_same_name_have_a_row_each(make: Any, tmp_path: Path) -> None:
    """Names are unique in a scope; sibling bodies and functions may use the same ones."""
    model = make()
    ir.save(model, tmp_path / "model.onnx")
    report = quantize(model).report
    assert nodes_of(model, "MoE") == []
    feeds = EXPERTS.feeds()
    run(model, feeds | ({"flag": np.array(True)} if make is in_both_bodies else {}))
    assert len(report.rows) == len(nodes_of(model, "QMoE"))
    assert len(plan(tmp_path / "model.onnx").rows) == len(report.rows)
