"""The schema tables against the installed runtime, and the views of a node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qmoe_rules import ops
from qmoe_rules.formats import FORMATS, Spec
from tests.moe_models import OPSETS, Experts, Graph, inputs_of, single, the_node


def schema(op_type: str) -> Any:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    (found,) = [
        schema
        for schema in get_all_operator_schema()
        if schema.name == op_type and schema.domain == ops.DOMAIN
    ]
    return found


def test_input_slots_are_those_of_the_runtime() -> None:
    assert [item.name for item in schema("MoE").inputs] == list(ops.MOE_INPUTS)
    assert [item.name for item in schema("QMoE").inputs] == list(ops.QMOE_INPUTS)


@pytest.mark.parametrize("op_type", ["MoE", "QMoE"])
def test_attributes_and_defaults_are_those_of_the_runtime(op_type: str) -> None:
    node = ir.node(op_type, [], domain=ops.DOMAIN)
    ours = ops.attributes(node)
    declared = schema(op_type).attributes
    assert set(ours) == set(declared)
    # None marks what means something only by being present, even where a default is declared.
    for name, value in ours.items():
        default = onnx.AttributeProto.FromString(declared[name]._default_value)
        if default.type == onnx.AttributeProto.UNDEFINED:
            assert value is None, name
        elif value is None:
            assert onnx.helper.get_attribute_value(default) == 0, name
        else:
            given = onnx.helper.get_attribute_value(default)
            assert value == (given.decode() if isinstance(given, bytes) else given), name


def test_every_input_has_an_entry() -> None:
    given = ops.inputs(the_node(single(Experts(bias=False)), "MoE"))
    names = {name: value.name for name, value in given.items() if value is not None}
    assert list(given) == list(ops.MOE_INPUTS)
    assert names == {
        "input": "x",
        "router_probs": "router_probs",
        "fc1_experts_weights": "fc1",
        "fc2_experts_weights": "fc2",
    }


@pytest.mark.parametrize("empty", [None, ir.Value(name="")], ids=["None", "unnamed value"])
def test_empty_inputs_are_missing_inputs(empty: ir.Value | None) -> None:
    node = ir.node("MoE", [ir.val("x"), empty, ir.val("fc1"), empty], domain=ops.DOMAIN)
    assert [name for name, value in ops.inputs(node).items() if value is not None] == [
        "input",
        "fc1_experts_weights",
    ]


def test_given_attributes_replace_defaults() -> None:
    node = the_node(single(k=3, swiglu_limit=7.0), "MoE")
    values = ops.attributes(node)
    assert (values["k"], values["swiglu_limit"], values["activation_type"]) == (3, 7.0, "swiglu")
    assert (values["activation_alpha"], values["swiglu_limit_after_activation"]) == (1.0, None)
    assert ops.refuse_unknown(node) is None


def test_unknown_attributes_are_named() -> None:
    node = the_node(single(made_up=3, block_size=32), "MoE")
    assert ops.refuse_unknown(node) == "MoE has no attribute 'made_up'"


@pytest.mark.parametrize(
    ("domain", "op_type", "is_moe"),
    [
        ("com.microsoft", "MoE", True),
        ("com.microsoft", "QMoE", False),
        ("ai.custom", "MoE", False),
        ("", "MoE", False),
    ],
)
def test_is_op_looks_at_the_domain(domain: str, op_type: str, is_moe: bool) -> None:
    assert ops.is_op(ir.node(op_type, [], domain=domain), "MoE") == is_moe


def test_nodes_are_found_in_graphs_bodies_and_functions() -> None:
    experts = Experts()

    def fill(graph: Graph, name: str) -> ir.Value:
        x, router_probs = inputs_of(graph, experts, prefix=f"{name}_")
        return graph.moe(x, router_probs, graph.weights(experts.arrays()), name=name)

    inner = Graph()
    function = ir.Function(
        "local", "Block", graph=inner.done(fill(inner, "function"), opsets=OPSETS), attributes=[]
    )
    graph, body = Graph(), Graph()
    y = fill(graph, "main")
    bodies: dict[str, Any] = {"then_branch": body.done(fill(body, "body"))}
    graph.op("If", graph.weight("flag", experts.arrays()["fc1"]), out="z", **bodies)
    model = graph.model(y, functions=[function])
    assert [node.name for node in ops.nodes(model, "MoE", "QMoE")] == ["main", "body", "function"]
    assert list(ops.nodes(model, "QMoE")) == []
    found = [ops.in_function(model, node) for node in ops.nodes(model, "MoE")]
    assert found == [False, False, True]


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        (ir.AttrInt64("to", 10), ir.DataType.FLOAT16),
        (ir.AttrInt64("to", -1), None),
        (ir.AttrInt64("to", 1000), None),
        (ir.AttrString("to", "FLOAT"), None),  # before opset 6
        (ir.RefAttr("to", "type", ir.AttributeType.INT), None),  # in a function
        (None, None),
    ],
)
def test_what_a_cast_casts_to(to: ir.Attr | None, expected: ir.DataType | None) -> None:
    node = ir.node("Cast", [ir.val("x")])
    if to is not None:
        node.attributes["to"] = to
    assert ops.cast_type(node) == expected


def test_the_producer_of_a_value() -> None:
    node = ir.node("MoE", [ir.val("x")], domain=ops.DOMAIN)
    assert ops.producer(node.outputs[0]) is node
    with pytest.raises(AssertionError, match="x has no producer"):
        ops.producer(ir.val("x"))


@pytest.mark.parametrize(
    ("name", "output", "label"),
    [("moe", "y", "moe"), (None, "y", "y"), ("", "y", "y"), (None, None, "(unnamed)")],
)
def test_label_falls_back_to_the_output(name: str | None, output: str | None, label: str) -> None:
    node = ir.node("MoE", [], domain=ops.DOMAIN, name=name)
    node.outputs[0].name = output
    assert ops.label(node) == label


def test_static_shape_tells_unknown_sizes_apart() -> None:
    assert ops.static_shape(None) is None
    assert ops.static_shape(ir.val("x")) is None
    assert ops.static_shape(ir.val("x", ir.DataType.FLOAT, ("batch", None, 3))) == (None, None, 3)
    assert ops.static_shape(ir.val("x", ir.DataType.FLOAT, ())) == ()


def test_a_node_without_a_name_and_outputs_has_a_label() -> None:
    assert ops.label(ir.node("MoE", [], domain=ops.DOMAIN, num_outputs=0)) == "(unnamed)"


def test_inputs_that_no_schema_has_are_refused_unless_they_are_missing() -> None:
    known = [ir.val(name) for name in ops.QMOE_INPUTS]
    node = ir.node("QMoE", [*known, ir.Value(name="")], domain=ops.DOMAIN)
    assert ops.refuse_unknown(node) is None
    node = ir.node("QMoE", [*known, None, ir.val("more")], domain=ops.DOMAIN)
    assert ops.refuse_unknown(node) == "it has more inputs than the 21 that are known"
    assert ops.inputs(node) == dict(zip(ops.QMOE_INPUTS, known, strict=True))


@pytest.mark.parametrize("part", ["experts_weights", "experts_bias", "scales", "zero_points"])
def test_anything_of_fc3_makes_it_a_projection(part: str) -> None:
    given = dict.fromkeys(ops.QMOE_INPUTS) | {"fc1_experts_weights": ir.val("fc1")}
    assert ops.projections(given) == ("fc1", "fc2")
    given[f"fc3_{part}"] = ir.val("value")
    assert ops.projections(given) == ("fc1", "fc2", "fc3")


def test_every_part_of_a_projection_has_its_slot() -> None:
    spec = Spec(FORMATS["int4"], 32, symmetric=False)
    parts = ["global_scale", *spec.parts(64, 64, np.dtype(np.float32))]
    found = {ops.slot("fc2", part) for part in parts}
    assert found <= set(ops.QMOE_INPUTS)
    assert found == {"fc2_experts_weights", "fc2_scales", "fc2_zero_points", "fc2_global_scale"}


@pytest.mark.parametrize(
    ("op_type", "domain", "softmax"),
    [
        ("Softmax", "", True),
        ("Softmax", "other", False),
        ("LogSoftmax", "", False),
        (None, "", False),
    ],
)
def test_routing_by_softmax(op_type: str | None, domain: str, softmax: bool) -> None:
    router: ir.Value | None = ir.val("router_probs")
    if op_type is not None:
        router = ir.node(op_type, [router], domain=domain).outputs[0]
    assert ops.routes_by_softmax(ir.node("MoE", [None, router], domain=ops.DOMAIN)) == softmax
    assert not ops.routes_by_softmax(ir.node("MoE", [router], domain=ops.DOMAIN))


def test_a_discarded_constant_takes_along_what_only_it_used() -> None:
    """A shared source stays, and so does what a node uses, a graph returns or is given."""
    graph = Graph()
    shared, own = (graph.weight(name, np.zeros(2, np.float32)) for name in ("shared", "own"))
    negated = graph.op("Neg", shared, out="negated")
    unused = graph.op("Add", negated, own, out="unused")
    used = graph.op("Abs", shared, out="used")
    y = graph.op("Abs", used, out="y", like=shared)
    x = graph.input("x", np.float32, (2,))
    model = graph.model(y)
    for value in (used, y, x, ir.val("of no graph")):
        ops.discard(value)
    assert [node.outputs[0].name for node in model.graph] == ["negated", "unused", "used", "y"]
    assert model.graph.inputs == [x]
    ops.discard(unused)
    assert [node.outputs[0].name for node in model.graph] == ["used", "y"]
    assert list(model.graph.initializers) == ["shared"]
    ops.discard(shared)
    assert list(model.graph.initializers) == ["shared"]


def test_everything_behind_a_discarded_value_is_looked_at() -> None:
    """Behind both operands, and also after one that stays: used, returned, or given."""
    graph = Graph()
    own, other, kept, returned = (
        graph.weight(name, np.zeros(2, np.float32)) for name in ("own", "other", "kept", "returned")
    )
    given = graph.weight("given", np.zeros(2, np.float32), "overridable")
    left, right = graph.op("Neg", own, out="left"), graph.op("Neg", other, out="right")
    unused = graph.op("Sum", left, right, given, returned, kept, out="unused")
    model = graph.model(graph.op("Abs", kept, out="y", like=kept), returned)
    ops.discard(unused)
    assert [node.outputs[0].name for node in model.graph] == ["y"]
    assert set(model.graph.initializers) == {"kept", "returned", "given"}


def test_a_node_with_another_output_in_use_is_not_discarded() -> None:
    graph = Graph()
    node = ir.node("Split", [graph.weight("w", np.zeros(4, np.float32))], num_outputs=3)
    graph.nodes.append(node)
    for name, output in zip(("first", "second", "third"), node.outputs, strict=True):
        output.name = name
    y = graph.op("Abs", node.outputs[1], out="y", like=node.inputs[0])
    model = graph.model(y, node.outputs[2])
    ops.discard(node.outputs[0])
    assert [each.op_type for each in model.graph] == ["Split", "Abs"]


def test_what_never_came_into_a_graph_uses_no_constant() -> None:
    """As a replacement that a dry run built and threw away."""
    graph = Graph()
    weight = graph.weight("w", np.zeros(2, np.float32))
    model = graph.model(graph.input("x", np.float32, (2,)))
    ir.node("Abs", [weight])
    ops.discard(weight)
    assert not model.graph.initializers


VALUES = {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 1, "swiglu_limit": None}


@pytest.mark.parametrize("shape", [None, ("tokens", "experts"), ("tokens", 4), (7, 4)])
def test_shapes_that_may_agree_are_accepted(shape: tuple[int | str, ...] | None) -> None:
    given = dict.fromkeys(ops.MOE_INPUTS) | {
        "router_probs": ir.val("router_probs", ir.DataType.FLOAT, shape)
    }
    assert ops.refuse_shapes((4, 6, 8), (4, 8, 3), given, VALUES) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"k": 1}, None),
        ({"k": 4}, None),
        ({"k": 0}, "k=0 with 4 experts"),
        ({"k": 5}, "k=5 with 4 experts"),
        ({"swiglu_limit": 0.0}, None),
        ({"swiglu_limit": -0.5}, "swiglu_limit=-0.5 is negative, which ends the whole process"),
        (
            {"swiglu_fusion": 0},
            "activation 'swiglu' with swiglu_fusion=0 and no fc3: the gate is missing",
        ),
        (
            {"activation_type": "relu"},
            "swiglu_fusion=1 with activation 'relu', which has no gate to fuse",
        ),
        (
            {"activation_type": "relu", "swiglu_fusion": 0},
            "fc1_experts_weights is [4, 6, 8]; fc2_experts_weights [4, 8, 3] with activation "
            "'relu' asks for [4, 3, 8]",
        ),
    ],
)
def test_attributes_that_do_not_agree(changed: dict[str, Any], reason: str | None) -> None:
    given = dict.fromkeys(ops.MOE_INPUTS)
    assert ops.refuse_shapes((4, 6, 8), (4, 8, 3), given, VALUES | changed) == reason


@pytest.mark.parametrize(
    ("bias", "shape", "expected"), [("fc1", (4, 3), "[4, 6]"), ("fc2", (4, 3), "[4, 8]")]
)
def test_a_bias_has_one_number_per_row(bias: str, shape: tuple[int, ...], expected: str) -> None:
    given = dict.fromkeys(ops.MOE_INPUTS)
    given[f"{bias}_experts_bias"] = ir.val("bias", ir.DataType.FLOAT, shape)
    reason = ops.refuse_shapes((4, 6, 8), (4, 8, 3), given, VALUES)
    assert reason == f"{bias}_experts_bias is [4, 3]; the weights ask for {expected}"


@pytest.mark.parametrize("shape", [(4,), ("batch", "sequence", 4)])
def test_shapes_of_another_rank_disagree(shape: tuple[int | str, ...]) -> None:
    given = dict.fromkeys(ops.MOE_INPUTS) | {
        "router_probs": ir.val("router_probs", ir.DataType.FLOAT, shape)
    }
    reason = ops.refuse_shapes((4, 6, 8), (4, 8, 3), given, VALUES)
    assert reason is not None
    assert reason.endswith("the weights ask for [?, 4]")


def test_an_fc3_takes_half_of_the_rows_of_fc1() -> None:
    given = dict.fromkeys(ops.MOE_INPUTS)
    values = VALUES | {"swiglu_fusion": 0}
    assert ops.refuse_shapes((4, 3, 8), (4, 8, 3), given, values, (4, 3, 8)) is None
    assert ops.refuse_shapes((4, 3, 8), (4, 8, 3), given, values, (4, 6, 8)) == (
        "fc3_experts_weights is [4, 6, 8]; fc2_experts_weights [4, 8, 3] with activation 'swiglu' "
        "asks for [4, 3, 8]"
    )
    reason = ops.refuse_shapes((4, 3, 8), (4, 8, 3), given, VALUES, (4, 3, 8))
    assert reason == "swiglu_fusion=1 with fc3, which is the gate's partner already"
    given["fc3_experts_bias"] = ir.val("bias", ir.DataType.FLOAT, (4, 6))
    reason = ops.refuse_shapes((4, 3, 8), (4, 8, 3), given, values, (4, 3, 8))
    assert reason == "fc3_experts_bias is [4, 6]; the weights ask for [4, 3]"


def test_the_last_axis_of_the_input_is_the_hidden_size() -> None:
    for shape, agrees in [((None, 8), True), ((2, 5, 8), True), ((None, 9), False)]:
        given = dict.fromkeys(ops.MOE_INPUTS)
        given["input"] = ir.val("x", ir.DataType.FLOAT, shape)
        reason = ops.refuse_shapes((4, 6, 8), (4, 8, 3), given, VALUES)
        assert reason == (None if agrees else "input is [?, 9]; the weights ask for [?, 8]")


def test_slots_are_those_of_the_schema_without_missing_ones_at_the_end() -> None:
    x, scales = ir.val("x"), ir.val("scales")
    given = {"fc1_scales": scales, "input": x, "fc2_scales": None}
    assert ops.slots("QMoE", given) == [x, None, None, scales]
    assert ops.slots("MoE", given) == [x]
    assert ops.slots("MoE", {}) == []
