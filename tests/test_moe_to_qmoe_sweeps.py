"""The rule beside other rules, in a second sweep, in a dry run, on clones."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import MatchingTracer, MatchStatus, RewriteRule, RewriteRuleSet, rewrite

from qmoe_rules import ops
from qmoe_rules.quantizers import METHODS
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from tests.moe_models import (
    Array,
    Experts,
    Graph,
    expected,
    inputs_of,
    layers,
    nodes_of,
    relative_error,
    run,
    single,
    the_node,
)
from tests.moe_rewrites import (
    ATTRIBUTES,
    EXACT,
    EXPERTS,
    PLANNED,
    SPEC,
    convert,
    float_weights,
    planned_names,
    two_nodes_with_the_same_weights,
    wanted,
)

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
