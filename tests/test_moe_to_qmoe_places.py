"""Where the rule meets a node: in bodies, in functions, in other domains and versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qmoe_rules import ops
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from qmoe_rules.testing import (
    LayerDesign,
    ModelDesign,
    assert_same_meaning,
    assert_valid,
    build_model,
)
from tests.moe_models import (
    OPSETS,
    Graph,
    branches,
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
    wanted,
)

# --- Bodies --------------------------------------------------------------------------------------


def in_the_outer_graph(graph: Graph, body: Graph) -> dict[str, ir.Value]:
    return shared_weights(graph)


def in_the_body(graph: Graph, body: Graph) -> dict[str, ir.Value]:
    return body.weights(EXPERTS.arrays())


def in_constants_of_the_body(graph: Graph, body: Graph) -> dict[str, ir.Value]:
    arrays = EXPERTS.arrays()
    return body.weights(arrays, homes=dict.fromkeys(arrays, "constant"))


def shared_weights(graph: Graph) -> dict[str, ir.Value]:
    """Returns the outer graph's weights, which the first caller adds."""
    if not graph.initializers:
        return graph.weights(EXPERTS.arrays())
    return {str(value.name): value for value in graph.initializers}


@pytest.mark.parametrize("home", [in_the_outer_graph, in_the_body, in_constants_of_the_body])
def test_nodes_in_both_bodies_of_an_if(
    home: Callable[[Graph, Graph], dict[str, ir.Value]],
) -> None:
    """Both bodies use the same names, which is legal, and differ in k."""
    graph = Graph()

    def body_with(k: int) -> Callable[[Graph, ir.Value, ir.Value], ir.Value]:
        def fill(body: Graph, x: ir.Value, router_probs: ir.Value) -> ir.Value:
            attributes = {**ATTRIBUTES, "k": k}
            return body.moe(x, router_probs, home(graph, body), out="inner", **attributes)

        return fill

    model = convert(branches(body_with(1), body_with(2), graph))
    assert len(nodes_of(model, "QMoE")) == 2
    assert float_weights(model) == []
    outer, *bodies = [planned_names(owner) for owner in model.graphs()]
    if home is in_the_outer_graph:
        assert (outer, bodies) == (PLANNED, [[], []])
    else:
        assert (outer, bodies) == ([], [PLANNED, PLANNED])
    feeds = EXPERTS.feeds()
    for flag, k in ((True, 1), (False, 2)):
        actual = run(model, feeds | {"flag": np.array(flag)})[0]
        assert relative_error(actual, wanted(feeds, k=k)) <= EXACT


def test_router_weights_in_a_body_and_around_it_have_their_own_names() -> None:
    """A name that is in an outer graph may not be in a body of it."""
    layers = tuple(LayerDesign(experts=3, k=2, normalize=0, place=p) for p in ("loop", "main"))
    model = build_model(ModelDesign(layers=layers))
    before = model.clone()
    after = convert(model, target="cpu")
    names = [
        ops.inputs(node)["router_weights"].name  # type: ignore[union-attr]
        for node in nodes_of(after, "QMoE")
    ]
    assert len(set(names)) == 2
    assert_valid(after, runs_on="cpu")
    assert_same_meaning(before, after)


def test_weights_shared_with_a_skipped_body_stay() -> None:
    graph = Graph()

    def named(name: str) -> Callable[[Graph, ir.Value, ir.Value], ir.Value]:
        def fill(body: Graph, x: ir.Value, router_probs: ir.Value) -> ir.Value:
            weights = shared_weights(graph)
            return body.moe(x, router_probs, weights, out=f"{name}_y", name=name, **ATTRIBUTES)

        return fill

    model = convert(branches(named("one"), named("two"), graph), nodes_to_exclude=["two"])
    assert float_weights(model) == ["fc1", "fc2"]
    feeds = EXPERTS.feeds()
    actual = [run(model, feeds | {"flag": np.array(flag)})[0] for flag in (True, False)]
    assert relative_error(actual[0], wanted(feeds)) <= EXACT
    real = expected(EXPERTS.arrays(), feeds, None, **ATTRIBUTES)
    assert relative_error(actual[1], real) <= EXACT


@pytest.mark.parametrize("name", PLANNED)
def test_names_taken_in_the_body_that_uses_the_outer_weights(name: str) -> None:
    graph = Graph()

    def fill(body: Graph, x: ir.Value, router_probs: ir.Value) -> ir.Value:
        three = body.weight(name, np.full(EXPERTS.hidden, 3, np.float32))
        total = body.op("Add", x, three, out="sum", like=x)
        weights = {key: shared[key] for key in EXPERTS.arrays()}
        return body.moe(total, router_probs, weights, out="inner", **ATTRIBUTES)

    shared = graph.weights(EXPERTS.arrays())
    model = convert(branches(fill, fill, graph))
    feeds = EXPERTS.feeds()
    final = wanted(feeds | {"x": feeds["x"] + 3})
    for flag in (True, False):
        actual = run(model, feeds | {"flag": np.array(flag)})[0]
        assert relative_error(actual, final) <= EXACT


def same_names_in_both_bodies() -> ir.Model:
    def fill(body: Graph, x: ir.Value, router_probs: ir.Value) -> ir.Value:
        return body.moe(x, router_probs, body.weights(EXPERTS.arrays()), out="inner", **ATTRIBUTES)

    return branches(fill, fill)


def test_nodes_of_the_same_name_have_a_row_each() -> None:
    report = Report()
    convert(same_names_in_both_bodies(), report=report)
    assert [row.status for row in report.rows] == [CONVERTED, CONVERTED]


# --- Functions -----------------------------------------------------------------------------------


def function_of(fill: Callable[[Graph, ir.Value, ir.Value], ir.Value]) -> ir.Model:
    """Returns `y = local::Block(x, router_probs)`, whose body holds its weights as constants."""
    inner = Graph()
    given = (ir.val("inner_x"), ir.val("inner_router"))
    inner.inputs.extend(given)
    block = ir.Function(
        "local", "Block", graph=inner.done(fill(inner, *given), opsets=OPSETS), attributes=[]
    )
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    y = graph.op("Block", x, router_probs, out="y", like=x, domain="local")
    return graph.model(y, opsets={**OPSETS, "local": 1}, functions=[block])


def plain_body(body: Graph, x: ir.Value, router_probs: ir.Value) -> ir.Value:
    arrays = EXPERTS.arrays()
    weights = body.weights(arrays, homes=dict.fromkeys(arrays, "constant"))
    return body.moe(x, router_probs, weights, out="inner_y", **ATTRIBUTES)


def body_with_an_if(body: Graph, x: ir.Value, router_probs: ir.Value) -> ir.Value:
    arrays = EXPERTS.arrays()
    weights = body.weights(arrays, homes=dict.fromkeys(arrays, "constant"))
    flag = body.weight("flag", np.array(True), "constant")
    bodies: dict[str, Any] = {}
    for branch in ("then_branch", "else_branch"):
        inner = Graph()
        out = inner.moe(x, router_probs, weights, out="o", name=branch, **ATTRIBUTES)
        bodies[branch] = inner.done(out)
    return body.op("If", flag, out="inner_y", **bodies)


@pytest.mark.parametrize(
    "fill",
    [
        plain_body,
        pytest.param(body_with_an_if),
    ],
)
def test_a_node_inside_a_function_stays(
    fill: Callable[[Graph, ir.Value, ir.Value], ir.Value],
) -> None:
    report = Report()
    model = convert(function_of(fill), report=report)
    feeds = EXPERTS.feeds()
    real = expected(EXPERTS.arrays(), feeds, None, **ATTRIBUTES)
    assert relative_error(run(model, feeds)[0], real) <= EXACT
    assert {(row.status, row.reason) for row in report.rows} == {
        (SKIPPED, "it is inside a function, which holds no initializers; inline it (see prepare)")
    }


# --- Domains and versions ------------------------------------------------------------------------


def test_another_domain_is_not_ours() -> None:
    graph, report = Graph(), Report()
    x, router_probs = inputs_of(graph, EXPERTS)
    weights = graph.weights(EXPERTS.arrays())
    y = graph.moe(x, router_probs, weights, domain="ai.custom", **ATTRIBUTES)
    model = graph.model(y, opsets={"": 21, "ai.custom": 1})
    before = ir.to_proto(model).SerializeToString()
    assert not apply_rules(model, moe_to_qmoe_rules(report=report))
    assert ir.to_proto(model).SerializeToString() == before
    assert report.rows == []


@pytest.mark.parametrize("version", [1, 7])
def test_an_import_of_the_domain_is_kept(version: int) -> None:
    model = convert(single(opsets={"": 21, "com.microsoft": version}, **ATTRIBUTES))
    assert model.graph.opset_imports == {"": 21, "com.microsoft": version}
    onnx.checker.check_model(ir.to_proto(model))  # no released runtime loads version 7


def test_a_missing_import_of_the_domain_is_added() -> None:
    model = convert(single(opsets={"": 21}, **ATTRIBUTES))
    assert model.graph.opset_imports == {"": 21, "com.microsoft": 1}
    feeds = EXPERTS.feeds()
    assert relative_error(run(model, feeds)[0], wanted(feeds)) <= EXACT
