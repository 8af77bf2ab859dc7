"""`normalize_moe_rules` in whole graphs: shared weights, names that are taken, bodies, clones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import rewrite

from qmoe_rules import normalize_moe_rules, ops, reference
from tests.gated_nodes import (
    FP32,
    HIDDEN,
    INT4,
    apart,
    arrays_of,
    attributes_of,
    both,
    constants,
    meaning,
    normal,
    normalize,
)
from tests.moe_models import (
    Array,
    Experts,
    Graph,
    branches,
    inputs_of,
    nodes_of,
    relative_error,
    run,
    the_node,
)


def sharing(graph: Graph, weights: list[Mapping[str, ir.Value]], form: str = "fc3") -> ir.Model:
    x, router = inputs_of(graph, Experts())
    for index, each in enumerate(weights):
        attributes = attributes_of(form, "swiglu")
        x = graph.moe(x, router, each, out=f"y{index}", name=f"moe{index}", **attributes)
    return graph.model(x)


@pytest.mark.parametrize("quantizing", [False, True])
@pytest.mark.parametrize("form", ["fc3", "halves"])
def test_nodes_that_share_weights_share_the_result(form: str, quantizing: bool) -> None:
    graph = Graph()
    weights = graph.weights(arrays_of(form, ("fc1",)))
    model = sharing(graph, [weights, weights], form)
    feeds = Experts().feeds()
    middle = meaning(nodes_of(model, "MoE")[0], feeds)
    final = meaning(nodes_of(model, "MoE")[0], feeds | {"x": middle})
    rewrite(model, both(bits=4) if quantizing else normalize_moe_rules())
    first, second = (ops.inputs(node) for node in nodes_of(model, "MoE", "QMoE"))
    for slot in ("fc1_experts_weights", "fc1_experts_bias", "fc2_experts_weights"):
        assert first[slot] is second[slot]
    assert len(model.graph.initializers) == (6 if quantizing else 4)
    limit = 2 * INT4 if quantizing else FP32
    assert relative_error(run(model, feeds)[0], final) <= limit


def test_one_gate_with_two_partners_is_two_weights() -> None:
    graph = Graph()
    weights = graph.weights(arrays_of("fc3"))
    other = graph.weight("other", -arrays_of("fc3")["fc3"])
    model = normalize(sharing(graph, [weights, {**weights, "fc3": other}]))
    assert sorted(model.graph.initializers) == [
        "fc1_interleaved",
        "fc1_interleaved_1",
        "fc2",
        "fc2_bias",
    ]
    first, second = (constants(node) for node in nodes_of(model, "MoE"))
    np.testing.assert_array_equal(first["fc1"][:, 0::2], second["fc1"][:, 0::2])
    np.testing.assert_array_equal(first["fc1"][:, 1::2], -second["fc1"][:, 1::2])


@pytest.mark.parametrize("quantizing", [False, True])
@pytest.mark.parametrize("name", ["fc1_interleaved", "fc1_bias_interleaved", "val_0"])
def test_taken_names_keep_their_meaning(name: str, quantizing: bool) -> None:
    graph = Graph()
    x, router = inputs_of(graph, Experts())
    three = graph.weight(name, np.full(HIDDEN, 3, np.float32))
    total = graph.op("Add", x, three, out="sum", like=x)
    weights = graph.weights(arrays_of("fc3", ("fc1", "fc3")))
    model = graph.model(graph.moe(total, router, weights, **attributes_of("fc3", "swiglu")))
    feeds = Experts().feeds()
    real = meaning(the_node(model, "MoE"), feeds | {"x": feeds["x"] + 3})
    rewrite(model, both(bits=4) if quantizing else normalize_moe_rules())
    np.testing.assert_array_equal(constants_by_name(model, name), np.full(HIDDEN, 3, np.float32))
    assert relative_error(run(model, feeds)[0], real) <= (INT4 if quantizing else FP32)


def constants_by_name(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize("quantizing", [False, True])
@pytest.mark.parametrize("outer", [False, True], ids=["in the bodies", "in the outer graph"])
def test_nodes_in_both_bodies_of_an_if(outer: bool, quantizing: bool) -> None:
    graph = Graph()
    shared = graph.weights(arrays_of("fc3", ("fc1",))) if outer else {}

    def body_with(k: int) -> Callable[[Graph, ir.Value, ir.Value], ir.Value]:
        def fill(body: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
            weights = shared or body.weights(arrays_of("fc3", ("fc1",)))
            attributes = attributes_of("fc3", "silu", k=k, normalize_routing_weights=1)
            return body.moe(x, router, weights, out="inner", **attributes)

        return fill

    model = branches(body_with(1), body_with(2), graph)
    feeds = Experts().feeds()
    real = [meaning(node, feeds) for node in nodes_of(model, "MoE")]
    rewrite(model, both(bits=4) if quantizing else normalize_moe_rules())
    names = ["fc1_bias_interleaved", "fc1_interleaved", "fc2", "fc2_bias"]
    if quantizing:
        planned = ["fc1_interleaved_quantized", "fc1_interleaved_scales"]
        names = ["fc1_bias_interleaved", *planned, "fc2_bias", "fc2_quantized", "fc2_scales"]
    found = [sorted(graph.initializers) for graph in model.graphs()]
    assert found == ([names, [], []] if outer else [[], names, names])
    for flag, expected in zip((True, False), real, strict=True):
        actual = run(model, feeds | {"flag": np.array(flag)})[0]
        assert relative_error(actual, expected) <= (INT4 if quantizing else FP32)


def test_weights_of_two_graphs_meet() -> None:
    """fc1 is the outer graph's, fc3 the body's own."""
    graph = Graph()
    arrays = arrays_of("fc3")
    shared = graph.weights({name: array for name, array in arrays.items() if name != "fc3"})

    def fill(body: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
        weights = {**shared, "fc3": body.weight("fc3", arrays["fc3"])}
        return body.moe(x, router, weights, out="inner", **attributes_of("fc3", "swiglu"))

    model = branches(fill, fill, graph)
    feeds = Experts().feeds()
    real = meaning(nodes_of(model, "MoE")[0], feeds)
    normalize(model)
    assert [list(graph.initializers) for graph in model.graphs()][1:] == [[], []]
    for flag in (True, False):
        actual = run(model, feeds | {"flag": np.array(flag)})[0]
        assert relative_error(actual, real) <= FP32


def test_a_clone_is_normalized_on_its_own() -> None:
    model = apart(biases=("fc1",))
    clone = model.clone()
    for each in (model, clone):
        normalize(each)
        for name, array in constants(the_node(each, "MoE")).items():
            np.testing.assert_array_equal(array, normal(arrays_of("fc3", ("fc1",)))[name])
    assert model.graph.initializers["fc1_interleaved"].graph is model.graph
    assert clone.graph.initializers["fc1_interleaved"].graph is clone.graph


def test_weights_behind_rearranging_nodes() -> None:
    """fc1 and fc3 are the halves of one packed weight that is stored transposed."""
    arrays: dict[str, Any] = arrays_of("fc3")
    packed = np.concatenate([arrays["fc1"], arrays["fc3"]], axis=1).transpose(0, 2, 1)
    graph = Graph()
    x, router = inputs_of(graph, Experts())
    stored = graph.weight("packed", np.ascontiguousarray(packed))
    turned = graph.op("Transpose", stored, out="turned", perm=[0, 2, 1])
    split = ir.node("Split", [turned], {"axis": 1, "num_outputs": 2}, num_outputs=2)
    graph.nodes.append(split)
    split.outputs[0].name, split.outputs[1].name = "gate", "up"
    weights = {**graph.weights({"fc2": arrays["fc2"]})}
    weights |= {"fc1": split.outputs[0], "fc3": split.outputs[1]}
    y = graph.moe(x, router, weights, **attributes_of("fc3", "silu"))
    model = graph.model(y)
    feeds = Experts().feeds()
    del arrays["fc2_bias"]
    real = reference.moe(feeds["x"], feeds["router_probs"], **arrays, k=2, activation_type="silu")
    rewrite(model, both(bits=8))
    assert [node.op_type for node in model.graph] == ["Softmax", "QMoE"]
    assert "packed" not in model.graph.initializers
    assert relative_error(run(model, feeds)[0], real) <= 0.02
