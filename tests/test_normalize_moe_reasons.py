"""Nodes that `normalize_moe_rules` leaves alone, and the reason that it gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnxscript.rewriter import rewrite

from qmoe_rules import normalize_moe_rules, ops
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import apply_rules
from tests.gated_nodes import EXPERTS, HIDDEN, INTER, apart, both, normalize
from tests.moe_models import Array, the_node


def with_input(slot: str, array: Array | None) -> Callable[[ir.Model], None]:
    """Returns what gives the node another constant, or takes one away."""

    def change(model: ir.Model) -> None:
        node = the_node(model, "MoE")
        value = None
        if array is not None:
            value = ir.Value(name=f"new_{slot}", const_value=ir.tensor(array))
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.tensor(array).dtype)
            model.graph.register_initializer(value)
        index = ops.MOE_INPUTS.index(slot)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    return change


def with_attribute(name: str, value: Any) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        the_node(model, "MoE").attributes.add(ir.convenience.convert_attribute(name, value))

    return change


def zeros(*shape: int, dtype: npt.DTypeLike = np.float32) -> Array:
    return np.zeros(shape, dtype)


COMPUTED = {"fc1": "computed"}
REASONS: dict[str, tuple[ir.Model, Callable[[ir.Model], None] | None, str]] = {
    "relu": (apart("fc3", "relu"), None, "activation 'relu' has no meaning with fc3"),
    "identity": (apart("fc3", "identity"), None, "activation 'identity' has no meaning with fc3"),
    "fc3 bias alone": (
        apart("halves"),
        with_input("fc3_experts_bias", zeros(EXPERTS, INTER)),
        "fc3_experts_bias is present without fc3_experts_weights",
    ),
    "computed fc1": (
        apart(homes=COMPUTED),
        None,
        "fc1_experts_weights: fc1 is not a constant",
    ),
    "computed fc2": (
        apart(homes={"fc2": "computed"}),
        None,
        "fc2_experts_weights: fc2 is not a constant",
    ),
    "overridable fc3": (
        apart(homes={"fc3": "overridable"}),
        None,
        "fc3_experts_weights: fc3 is a graph input, so its default may be overridden at run time",
    ),
    "computed fc1 bias": (
        apart(biases=("fc1", "fc3"), homes={"fc1_bias": "computed"}),
        None,
        "fc1_experts_bias: fc1_bias is not a constant",
    ),
    "fc3 bias is an input": (
        apart(biases=("fc1", "fc3"), homes={"fc3_bias": "input"}),
        None,
        "fc3_experts_bias: fc3_bias is a graph input, so its default may be overridden at run time",
    ),
    "bias of another type": (
        apart(),
        with_input("fc3_experts_bias", zeros(EXPERTS, INTER, dtype=np.float16)),
        "fc3_experts_bias is float16 [3, 192]; the weights ask for float32 [3, 192]",
    ),
    "bias of another shape": (
        apart(),
        with_input("fc1_experts_bias", zeros(EXPERTS, 2 * INTER)),
        "fc1_experts_bias is [3, 384]; the weights ask for [3, 192]",
    ),
    "fc3 of another shape": (
        apart(),
        with_input("fc3_experts_weights", zeros(EXPERTS, INTER + 1, HIDDEN)),
        "fc3_experts_weights is [3, 193, 128]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 192, 128]",
    ),
    "fc1 of halves of another shape": (
        apart("halves"),
        with_input("fc1_experts_weights", zeros(EXPERTS, INTER, HIDDEN)),
        "fc1_experts_weights is [3, 192, 128]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 384, 128]",
    ),
    "fc3 of another type": (
        apart(),
        with_input("fc3_experts_weights", zeros(EXPERTS, INTER, HIDDEN, dtype=np.float16)),
        "fc1_experts_weights is float32, fc2_experts_weights is float32, "
        "fc3_experts_weights is float16",
    ),
    "fc2 is missing": (
        apart(),
        with_input("fc2_experts_weights", None),
        "fc2_experts_weights: it is missing",
    ),
    "fused twice": (
        apart(swiglu_fusion=1),
        None,
        "swiglu_fusion=1 with fc3, which is the gate's partner already",
    ),
    "unknown attribute": (
        apart(),
        with_attribute("fancy", 1),
        "MoE has no attribute 'fancy'",
    ),
    "unknown input": (
        apart(),
        lambda model: unknown_input(model),
        "it has more inputs than the 8 that are known",
    ),
}


def unknown_input(model: ir.Model) -> None:
    node = the_node(model, "MoE")
    node.resize_inputs(9)
    node.replace_input_with(8, model.graph.inputs[0])


@pytest.mark.parametrize("quantizing", [False, True])
@pytest.mark.parametrize("case", REASONS)
def test_what_stays_has_a_reason(
    case: str, quantizing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, change, reason = REASONS[case]
    model = model.clone()
    if change is not None:
        change(model)
    node = the_node(model, "MoE")
    before = (list(node.inputs), dict(node.attributes), list(model.graph.initializers))
    report = Report()
    rules = both(report, bits=4) if quantizing else normalize_moe_rules(report=report)
    with caplog.at_level(logging.WARNING):
        assert not apply_rules(model, rules)
    assert the_node(model, "MoE") is node
    assert (list(node.inputs), dict(node.attributes), list(model.graph.initializers)) == before
    assert [(row.node, row.status, row.reason) for row in report.rows] == [("moe", SKIPPED, reason)]
    assert report.rows[0].bytes_after == report.rows[0].bytes_before
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"moe stays as it is: {reason}"]


def test_a_node_in_a_function_stays() -> None:
    model = apart()
    node = the_node(model, "MoE")
    inner = [ir.Value(name=f"in{index}") for index in range(len(node.inputs))]
    copy = ir.node("MoE", inner, attributes=node.attributes, domain=ops.DOMAIN)
    function = ir.Function(
        "local", "experts", "", graph=ir.Graph(inner, copy.outputs, nodes=[copy]), attributes=[]
    )
    model.functions[function.identifier()] = function
    report = Report()
    normalize(model, report)
    assert [row.reason for row in report.rows] == [
        "it is inside a function, which holds no initializers; inline it (see prepare)"
    ]


def test_a_refused_node_may_still_be_quantized_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """CUDA reads halves, and takes biases that are not constant."""
    model = apart("halves", "swiglu", ("fc1",), np.float16, homes={"fc1_bias": "input"})
    report = Report()
    rewrite(model, both(report, bits=4, target="cuda"))
    assert ops.attributes(the_node(model))["swiglu_fusion"] == 2
    assert [(row.node, row.status) for row in report.rows] == [("moe", CONVERTED)]
    assert [record.getMessage() for record in caplog.records] == [
        "moe stays as it is: fc1_experts_bias: fc1_bias is a graph input, so its default may be "
        "overridden at run time"
    ]
