"""The rule in whole graphs: shared weights, names, bodies, functions, other rules, second sweeps.

Every resulting model passes `onnx.checker` and runs; see `moe_models.run`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript.rewriter import MatchingTracer, MatchStatus, RewriteRule, RewriteRuleSet, rewrite

from qmoe_rules import ops
from qmoe_rules.formats import Spec
from qmoe_rules.lazy import PlannedTensor
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from qmoe_rules.statistics import Statistics
from qmoe_rules.testing import (
    LayerDesign,
    ModelDesign,
    assert_same_meaning,
    assert_valid,
    build_model,
)
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
SPEC = Recipe().specs["fc1"]
PLANNED = ["fc1_quantized", "fc1_scales", "fc2_quantized", "fc2_scales"]


def convert(model: ir.Model, **fields: Any) -> ir.Model:
    return rewrite(model, [*moe_to_qmoe_rules(**fields)])


def wanted(feeds: Arrays, experts: Experts = EXPERTS, **attributes: Any) -> Array:
    return expected(experts.arrays(), feeds, SPEC, **{**ATTRIBUTES, **attributes})


def planned_names(graph: ir.Graph) -> list[str]:
    return sorted(
        name
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, PlannedTensor)
    )


def float_weights(model: ir.Model) -> list[str | None]:
    """Returns the 3-D float arrays that are left, in initializers or in Constant nodes."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    values += [node.outputs[0] for node in model.graph.all_nodes() if node.op_type == "Constant"]
    tensors = [(value.name, ir.convenience.get_const_tensor(value)) for value in values]
    return [
        name
        for name, tensor in tensors
        if tensor is not None and len(tensor.shape) == 3 and not isinstance(tensor, PlannedTensor)
    ]


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


def two_nodes_with_the_same_weights() -> ir.Model:
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    weights = graph.weights(EXPERTS.arrays())
    first = graph.moe(x, router_probs, weights, out="first", name="first", **ATTRIBUTES)
    y = graph.moe(first, router_probs, weights, name="second", **ATTRIBUTES)
    return graph.model(y)


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


# --- Together with other rules -------------------------------------------------------------------


def silu_to_swish() -> RewriteRule:
    """X * Sigmoid(x) -> QuickGelu(x, alpha=1): a rule that has nothing to do with MoE."""
    return RewriteRule(
        lambda op, x: op.Mul(x, op.Sigmoid(x)),
        lambda op, x: op.QuickGelu(x, alpha=1.0, _domain="com.microsoft"),
        name="silu",
    )


def drop_made_up() -> RewriteRule:
    """MoE(made_up=1) -> MoE: makes a node convertible."""

    def without(op: Any, x: Any, router: Any, fc1: Any, moe: ir.Value) -> Any:
        node = ops.producer(moe)
        kept = {name: a for name, a in node.attributes.items() if name != "made_up"}
        return op.MoE(*node.inputs, _domain="com.microsoft", _name=node.name, **kept)

    return RewriteRule(
        lambda op, x, router, fc1: op.MoE(
            x, router, fc1, _allow_other_inputs=True, _domain="com.microsoft", _outputs=["moe"]
        ),
        without,
        lambda context, moe, **_: "made_up" in ops.producer(moe).attributes,
        name="drop_made_up",
    )


@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
def test_unrelated_rules_in_the_same_list(first: bool) -> None:
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    gate = graph.op("Sigmoid", x, out="gate", like=x)
    silu = graph.op("Mul", x, gate, out="silu", like=x)
    moe = graph.moe(silu, router_probs, graph.weights(EXPERTS.arrays()), out="m", **ATTRIBUTES)
    gate = graph.op("Sigmoid", moe, out="gate2", like=x)
    model = graph.model(graph.op("Mul", moe, gate, out="y", like=x))
    rules = [silu_to_swish()]
    rewrite(model, [*moe_to_qmoe_rules(), *rules] if first else [*rules, *moe_to_qmoe_rules()])
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["QuickGelu", "Softmax", "QMoE", "QuickGelu"]
    feeds = EXPERTS.feeds()

    def swish(x: Array) -> Array:
        return np.asarray(x / (1 + np.exp(-x.astype(np.float64))))

    final = swish(wanted(feeds | {"x": swish(feeds["x"])}))
    assert relative_error(run(model, feeds)[0], final) <= EXACT


def test_a_rule_before_ours_makes_a_node_convertible() -> None:
    report = Report()
    model = single(made_up=1, **ATTRIBUTES)
    rewrite(model, [drop_made_up(), *moe_to_qmoe_rules(report=report)])
    assert [row.status for row in report.rows] == [CONVERTED]
    feeds = EXPERTS.feeds()
    assert relative_error(run(model, feeds)[0], wanted(feeds)) <= EXACT


def test_the_first_rule_of_two_recipes_wins() -> None:
    rules = [*moe_to_qmoe_rules(nodes_to_exclude=["moe0"]), *moe_to_qmoe_rules(bits=8)]
    model = rewrite(layers(2, **ATTRIBUTES), rules)
    widths = {n.name: ops.attributes(n)["expert_weight_bits"] for n in nodes_of(model, "QMoE")}
    assert widths == {"moe0": 8, "moe1": 4}
    assert float_weights(model) == []
    run(model, EXPERTS.feeds())


def test_factories_return_independent_rules() -> None:
    reports = Report(), Report()
    four = moe_to_qmoe_rules(bits=4, report=reports[0])
    eight = moe_to_qmoe_rules(bits=8, report=reports[1])
    assert not set(four) & set(eight)
    models = rewrite(single(), [*four]), rewrite(single(), [*eight])
    widths = [ops.attributes(the_node(model))["expert_weight_bits"] for model in models]
    assert widths == [4, 8]
    assert [report.rows[0].stored for report in reports] == ["int4 row, raw", "int8 row, raw"]


def test_rule_objects_may_be_used_for_one_model_after_the_other() -> None:
    rules = moe_to_qmoe_rules()
    for seed in (1, 2):
        experts = Experts(seed=seed)
        model = rewrite(single(experts, **ATTRIBUTES), rules)
        feeds = experts.feeds()
        assert relative_error(run(model, feeds)[0], wanted(feeds, experts)) <= EXACT


# --- Sweeps and copies ---------------------------------------------------------------------------


def test_a_second_rewrite_changes_nothing() -> None:
    model = convert(layers(2, **ATTRIBUTES))
    before = ir.to_proto(model).SerializeToString()
    report = Report()
    assert not apply_rules(model, moe_to_qmoe_rules(report=report))
    convert(model, bits=8)
    assert ir.to_proto(model).SerializeToString() == before
    assert report.rows == []


def forbid_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setitem(METHODS, "rtn", refuse)


def test_a_dry_run_computes_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(2, **ATTRIBUTES)
    nodes = [*model.graph]
    tracer, report = MatchingTracer(), Report()
    rules = moe_to_qmoe_rules(nodes_to_exclude=["moe1"], report=report)
    with monkeypatch.context() as patch:
        forbid_quantizing(patch)
        rules.apply_to_model(model, tracer=tracer)
    assert [*model.graph] == nodes
    (matches,) = tracer.best_matches_map.values()
    assert [(m.root_node.name, m.status) for m in matches] == [("moe0", MatchStatus.SUCCESS)]
    assert [row.status for row in report.rows] == [CONVERTED, SKIPPED]
    # The model is as good as before: it runs in float, and converts.
    feeds = EXPERTS.feeds()
    own = [Experts(seed=0).arrays(), Experts(seed=1).arrays()]
    real = expected(own[0], feeds, None, **ATTRIBUTES)
    real = expected(own[1], feeds | {"x": real}, None, **ATTRIBUTES)
    assert relative_error(run(model, feeds)[0], real) <= EXACT
    convert(model)
    assert [node.op_type for node in nodes_of(model, "MoE", "QMoE")] == ["QMoE", "QMoE"]
    final = expected(own[0], feeds, SPEC, **ATTRIBUTES)
    final = expected(own[1], feeds | {"x": final}, SPEC, **ATTRIBUTES)
    assert relative_error(run(model, feeds)[0], final) <= EXACT
    assert len(planned_names(model.graph)) == 8


def test_a_dry_run_tells_why_a_node_stays() -> None:
    tracer = MatchingTracer()
    rules = moe_to_qmoe_rules(nodes_to_exclude=["moe"])
    rules.apply_to_model(single(), tracer=tracer)
    (match,) = next(iter(tracer.best_matches_map.values()))
    assert match.status == MatchStatus.CONDITION_FAILED
    assert match.match_result.reason == "excluded by the recipe"


def test_a_dry_run_leaves_no_initializers_behind() -> None:
    model = single()
    before = list(model.graph.initializers)
    moe_to_qmoe_rules().apply_to_model(model, tracer=MatchingTracer())
    assert list(model.graph.initializers) == before


@pytest.mark.parametrize("first", ["original", "clone"])
def test_original_and_clone_convert_on_their_own(first: str) -> None:
    model = single(**ATTRIBUTES)
    clone = model.clone()
    feeds = EXPERTS.feeds()
    for each in (model, clone) if first == "original" else (clone, model):
        convert(each)
        assert planned_names(each.graph) == PLANNED
        assert relative_error(run(each, feeds)[0], wanted(feeds)) <= EXACT


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_a_clone_carries_no_plan_of_the_original(deep: bool) -> None:
    """The skipped node keeps the weights, so the clone inherits what was remembered with them."""
    model = two_nodes_with_the_same_weights()
    convert(model, nodes_to_exclude=["second"])
    clone = model.clone(deep_copy=deep)
    feeds = EXPERTS.feeds()
    final = wanted(feeds | {"x": wanted(feeds)})
    for each in (clone, model):
        convert(each)
        assert float_weights(each) == []
        owned = set(each.graph.initializers.values())
        for node in nodes_of(each, "QMoE"):
            constants = [value for value in node.inputs if value and value.is_initializer()]
            assert set(constants) <= owned
        assert relative_error(run(each, feeds)[0], final) <= EXACT


def test_a_clone_of_a_planned_model_is_planned() -> None:
    clone = convert(single(**ATTRIBUTES)).clone()
    assert planned_names(clone.graph) == PLANNED
    feeds = EXPERTS.feeds()
    assert relative_error(run(clone, feeds)[0], wanted(feeds)) <= EXACT


@pytest.mark.parametrize("as_set", [False, True], ids=["list", "set"])
def test_rules_come_as_a_set_or_a_list(as_set: bool) -> None:
    rules = moe_to_qmoe_rules()
    assert isinstance(rules, RewriteRuleSet)
    model = single(**ATTRIBUTES)
    assert apply_rules(model, rules if as_set else [*rules])
    run(model, EXPERTS.feeds())
