"""Fusing several layers, in branches, with other rules, and as a dry run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import MatchingTracer

from qmoe_rules import (
    Report,
    fuse_experts_rules,
    moe_to_qmoe_rules,
)
from qmoe_rules.report import CONVERTED
from tests import expert_graphs
from tests.expert_graphs import Builder, Layer
from tests.fusions import fused, graph_of
from tests.moe_models import Graph, branches, nodes_of, relative_error, run


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
