"""The weights that the rule takes and stores in a graph: shared ones, names that are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import ops
from qmoe_rules.formats import Spec
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import Recipe
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from qmoe_rules.statistics import Statistics
from tests.moe_models import (
    Array,
    Graph,
    expected,
    inputs_of,
    nodes_of,
    relative_error,
    run,
    single,
)
from tests.moe_rewrites import (
    ATTRIBUTES,
    EXACT,
    EXPERTS,
    PLANNED,
    convert,
    float_weights,
    planned_names,
    two_nodes_with_the_same_weights,
    wanted,
)

# --- Weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", ["initializer", "constant"])
def test_old_weights_are_gone_and_nothing_else(home: str) -> None:
    model = single(homes=dict.fromkeys(("fc1", "fc2"), home), **ATTRIBUTES)
    feeds = EXPERTS.feeds()
    assert apply_rules(model, moe_to_qmoe_rules())  # the rule alone, without rewrite's clean-up
    assert float_weights(model) == []
    assert sorted(model.graph.initializers) == sorted([*PLANNED, "fc1_bias", "fc2_bias"])
    assert relative_error(run(model, feeds)[0], wanted(feeds)) <= EXACT


def test_biases_may_be_constants_or_inputs() -> None:
    model = convert(single(homes={"fc1_bias": "constant", "fc2_bias": "input"}, **ATTRIBUTES))
    feeds = EXPERTS.feeds()
    given = feeds | {"fc2_bias": EXPERTS.arrays()["fc2_bias"]}
    assert relative_error(run(model, given)[0], wanted(feeds)) <= EXACT


def test_a_weight_with_another_user_stays_for_it() -> None:
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    weights = graph.weights(EXPERTS.arrays())
    y = graph.moe(x, router_probs, weights, **ATTRIBUTES)
    copy = graph.op("Neg", weights["fc1"], out="copy", like=weights["fc1"])
    model = convert(graph.model(y, copy))
    feeds = EXPERTS.feeds()
    actual, negative = run(model, feeds)
    assert relative_error(actual, wanted(feeds)) <= EXACT
    np.testing.assert_array_equal(negative, -EXPERTS.arrays()["fc1"])
    assert float_weights(model) == ["fc1"]


def test_a_weight_that_is_a_graph_output_stays() -> None:
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    weights = graph.weights(EXPERTS.arrays())
    y = graph.moe(x, router_probs, weights, **ATTRIBUTES)
    model = convert(graph.model(y, weights["fc2"]))
    feeds = EXPERTS.feeds()
    actual, weight = run(model, feeds)
    assert relative_error(actual, wanted(feeds)) <= EXACT
    np.testing.assert_array_equal(weight, EXPERTS.arrays()["fc2"])
    assert float_weights(model) == ["fc2"]


def test_shared_weights_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, calls = METHODS["rtn"], []

    def counted(
        weight: Array, spec: Spec, statistics: Statistics | None = None
    ) -> QuantizedWeights:
        calls.append(weight.shape)
        return quantizer(weight, spec, statistics)

    monkeypatch.setitem(METHODS, "rtn", counted)
    model = convert(two_nodes_with_the_same_weights())
    first, second = nodes_of(model, "QMoE")
    for slot in ("fc1_experts_weights", "fc1_scales", "fc2_experts_weights", "fc2_scales"):
        assert ops.inputs(first)[slot] is ops.inputs(second)[slot]
    assert planned_names(model.graph) == PLANNED
    assert float_weights(model) == []
    assert not calls
    feeds = EXPERTS.feeds()
    actual = run(model, feeds)[0]
    assert relative_error(actual, wanted(feeds | {"x": wanted(feeds)})) <= EXACT
    # Every expert of fc1 and of fc2: the scales come from the cache.
    assert len(calls) == 2 * EXPERTS.experts


def test_shared_weights_with_two_recipes_are_stored_twice() -> None:
    recipe = Recipe.of(overrides=("second:bits=8",))
    model = convert(two_nodes_with_the_same_weights(), recipe=recipe)
    assert len(planned_names(model.graph)) == 8
    assert float_weights(model) == []
    feeds = EXPERTS.feeds()
    middle = wanted(feeds)
    eight = recipe.resolve("second").specs["fc1"]
    final = expected(EXPERTS.arrays(), feeds | {"x": middle}, eight, **ATTRIBUTES)
    assert relative_error(run(model, feeds)[0], final) <= EXACT


def test_shared_weights_stay_for_a_node_that_was_skipped() -> None:
    model = convert(two_nodes_with_the_same_weights(), nodes_to_exclude=["second"])
    assert [node.op_type for node in nodes_of(model, "MoE", "QMoE")] == ["QMoE", "MoE"]
    feeds = EXPERTS.feeds()
    final = expected(EXPERTS.arrays(), feeds | {"x": wanted(feeds)}, None, **ATTRIBUTES)
    assert relative_error(run(model, feeds)[0], final) <= EXACT


# --- Names ---------------------------------------------------------------------------------------


def taken_by_initializer(graph: Graph, x: ir.Value, name: str) -> ir.Value:
    three = graph.weight(name, np.full(EXPERTS.hidden, 3, np.float32))
    return graph.op("Add", x, three, out="sum", like=x)


def taken_by_input(graph: Graph, x: ir.Value, name: str) -> ir.Value:
    given = graph.input(name, np.float32, (EXPERTS.hidden,))
    return graph.op("Add", x, given, out="sum", like=x)


def taken_by_node(graph: Graph, x: ir.Value, name: str) -> ir.Value:
    negative = graph.op("Neg", x, out=name, like=x)
    return graph.op("Abs", negative, out="sum", like=x)


def taken_in_subgraph(graph: Graph, x: ir.Value, name: str) -> ir.Value:
    bodies: dict[str, Any] = {}
    for branch, op_type in (("then_branch", "Neg"), ("else_branch", "Abs")):
        body = Graph()
        inner = body.op(op_type, x, out=name, like=x)
        bodies[branch] = body.done(body.op("Relu", inner, out="relu", like=x))
    flag = graph.weight("flag", np.array(False))
    return graph.op("If", flag, out="sum", like=x, **bodies)


TAKEN: dict[str, tuple[Callable[[Graph, ir.Value, str], ir.Value], Callable[[Array], Array]]] = {
    "initializer": (taken_by_initializer, lambda x: x + 3),
    "graph input": (taken_by_input, lambda x: x + 3),
    "node output": (taken_by_node, np.abs),
    "subgraph": (taken_in_subgraph, np.abs),
}


@pytest.mark.parametrize("name", [*PLANNED, "y_router_weights"])
@pytest.mark.parametrize("by", TAKEN)
def test_taken_names_keep_their_meaning(by: str, name: str) -> None:
    take, meaning = TAKEN[by]
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    changed = take(graph, x, name)
    y = graph.moe(changed, router_probs, graph.weights(EXPERTS.arrays()), **ATTRIBUTES)
    model = convert(graph.model(y))
    feeds = EXPERTS.feeds()
    given = dict(feeds)
    if by == "graph input":
        given[name] = np.full(EXPERTS.hidden, 3, np.float32)
    assert [value.name for value in model.graph.inputs] == list(given)
    actual = run(model, given)[0]
    assert relative_error(actual, wanted(feeds | {"x": meaning(feeds["x"])})) <= EXACT


@pytest.mark.parametrize("name", [*PLANNED, "y_router_weights"])
@pytest.mark.parametrize("own", [False, True], ids=["another node's", "the node's own"])
def test_names_of_graph_outputs_never_change(own: bool, name: str) -> None:
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    weights = graph.weights(EXPERTS.arrays())
    y = graph.moe(x, router_probs, weights, out=name if own else "y", **ATTRIBUTES)
    model = graph.model(y if own else graph.op("Identity", y, out=name, like=y))
    convert(model)
    assert [value.name for value in model.graph.outputs] == [name]
    feeds = EXPERTS.feeds()
    assert relative_error(run(model, feeds)[0], wanted(feeds)) <= EXACT
