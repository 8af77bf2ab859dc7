"""Experts that are cut out of stacked weights one by one, fused into a MoE."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.report import SKIPPED
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from qmoe_rules.rules.fuse_experts import fuse_experts_rules
from tests.expert_graphs import Layer
from tests.fusions import fused
from tests.moe_models import Array, Arrays, expected, nodes_of, relative_error, run, the_node
from tests.unrolled_graphs import Form, unrolled

SHAPES = [(1, 1), (1, 7), (4, 1), (4, 7)]


def inputs(layer: Layer, shape: tuple[int, int]) -> Arrays:
    x = np.random.default_rng(1).standard_normal((*shape, layer.hidden))
    return {"x": x.astype(layer.dtype)}


def agree(before: ir.Model, after: ir.Model, layer: Layer, tolerance: float) -> None:
    for shape in SHAPES:
        feeds = inputs(layer, shape)
        assert relative_error(run(after, feeds)[0], run(before, feeds)[0]) < tolerance


def only_the_moe_is_left(model: ir.Model) -> None:
    kinds = {node.op_type for node in model.graph}
    assert not kinds & {"Equal", "Slice", "Split", "Squeeze", "Transpose"}
    for value in model.graph.initializers.values():
        assert value.uses()
    for node in model.graph:
        assert any(output.uses() or output.is_graph_output() for output in node.outputs)


FORMS = {
    "gemma": Form(scaled=1),
    "gemma_computed": Form(cut="computed", scaled=1),
    "k_major": Form(k_major=True, cut="Split"),
    "topk_softmax": Form(Layer(experts=5, k=3, router="topk_softmax"), column="unsqueeze"),
    "sigmoid": Form(Layer(experts=5, router="sigmoid_corrected")),
    "no_zeros": Form(zeros=False),
    "one": Form(Layer(experts=5, k=1)),
    "swapped": Form(Layer(experts=5, swapped=True)),
    "gpt_oss": Form(Layer(experts=5, router="topk_softmax", limit=0.5, alpha=1.702)),
    "unordered": Form(Layer(experts=5, numbers=(3, 0, 4, 1, 2)), places=(3, 0, 4, 1, 2)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", FORMS)
def test_it_computes_the_same(name: str, dtype: Any) -> None:
    form = replace(FORMS[name], layer=replace(FORMS[name].layer, dtype=dtype))
    before, _ = unrolled(form)
    after, _ = unrolled(form)
    assert fused(after).rows == []
    the_node(after, "MoE")
    only_the_moe_is_left(after)
    agree(before, after, form.layer, 1e-5 if dtype == np.float32 else 2e-3)


@pytest.mark.parametrize("shared", ["before", "after"])
def test_a_shared_expert_stays_beside_it(shared: str) -> None:
    form = Form(Layer(experts=5, shared=shared))
    before, _ = unrolled(form)
    after, _ = unrolled(form)
    assert fused(after).rows == []
    the_node(after, "MoE")
    assert [node.op_type for node in after.graph].count("Sigmoid") == 1
    agree(before, after, form.layer, 1e-5)


def test_layers_in_a_row() -> None:
    before, _ = unrolled(FORMS["gemma"], layers=2)
    after, _ = unrolled(FORMS["gemma"], layers=2)
    fused(after)
    assert len(nodes_of(after, "MoE")) == 2
    only_the_moe_is_left(after)
    agree(before, after, FORMS["gemma"].layer, 1e-5)
    assert not apply_rules(after, fuse_experts_rules())


def test_work_grows_with_the_number_of_experts_and_not_its_square() -> None:
    """Counted in calls: four times the experts take about four times as many."""

    def calls(experts: int) -> int:
        model, _ = unrolled(Form(Layer(experts=experts, hidden=4, inter=2)))
        events = itertools.count()

        def count(*_event: object) -> None:
            next(events)

        sys.setprofile(count)
        try:
            assert fused(model).rows == []
        finally:
            sys.setprofile(None)
        the_node(model, "MoE")
        only_the_moe_is_left(model)
        return next(events)

    calls(8)  # imports and caches, which come once
    assert calls(128) < 4.5 * calls(32)


def _logits(model: ir.Model, x: Array) -> Array:
    weight = model.graph.initializers["l0.router"].const_value
    assert weight is not None
    return np.asarray(x.reshape(-1, x.shape[-1]) @ weight.numpy())


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 0)])
@pytest.mark.parametrize("name", ["no_zeros", "k_major", "gpt_oss"])
def test_quantized_in_the_same_list(name: str, bits: int, block: int) -> None:
    form = FORMS[name]
    model, arrays = unrolled(form)
    quantizing = moe_to_qmoe_rules(bits=bits, block_size=block, target="cpu")
    apply_rules(model, [*fuse_experts_rules(), *quantizing])
    assert nodes_of(model, "MoE") == []
    node = the_node(model)
    names = ("activation_type", "activation_alpha", "activation_beta", "k", "swiglu_fusion")
    feeds = inputs(form.layer, (4, 7))
    logits = _logits(model, feeds["x"])
    assert len(np.unique(np.argsort(logits)[:, -form.layer.k :])) == form.layer.experts
    wanted = expected(
        arrays,
        {**feeds, "router_probs": logits},
        Spec(FORMATS[f"int{bits}"], block),
        normalize_routing_weights=1,
        swiglu_limit=form.layer.limit,
        **{name: node.attributes[name].value for name in names},
    )
    assert relative_error(run(model, feeds)[0], wanted) < 1e-5


REASONS = {
    "missing": (Form(Layer(experts=5, numbers=(0, 1, 3, 4))), "expert 2 is missing"),
    "twice": (Form(Layer(experts=5, numbers=(0, 1, 1, 3, 4))), "expert 1 is added twice"),
    "mixed_up": (Form(places=(0, 2, 1, 3, 4)), "expert 1 has the weights of expert 2"),
    "overlap": (Form(cut="overlap"), "is no activation of MoE"),
    "signed": (Form(scaled=-1), "may be negative"),
    "zeros": (Form(like="router"), "are not known to be like"),
    "overridable": (
        Form(Layer(experts=5, homes={"fc1": "overridable"})),
        "l0.fc1 is a graph input, so its default may be overridden at run time",
    ),
    "computed": (Form(Layer(experts=5, homes={"fc2": "computed"})), "l0.fc2 is not a constant"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_proven_stays(name: str) -> None:
    form, reason = REASONS[name]
    model, _ = unrolled(form)
    count = len(list(model.graph))
    (row,) = fused(model).rows
    assert row.status == SKIPPED
    assert reason in row.reason
    assert nodes_of(model, "MoE") == []
    assert len(list(model.graph)) == count


def test_a_column_that_is_left_out_is_no_weight_of_an_expert() -> None:
    model, _ = unrolled(Form(columns=(0,)))
    assert fused(model).rows == []
    assert nodes_of(model, "MoE") == []


@pytest.mark.parametrize("op_type", ["MatMul", "Slice", "Sigmoid", "Mul", "Gather", "Equal"])
def test_a_value_that_others_need_stays(op_type: str) -> None:
    form = Form(Layer(experts=5, router="topk_softmax"))
    model, _ = unrolled(form)
    name = [node.outputs[0].name for node in model.graph if node.op_type == op_type][-1]
    model, _ = unrolled(form, str(name))
    if op_type == "Slice":  # the last one reads a column of the weights, and may stay
        assert fused(model).rows == []
        return
    (row,) = fused(model).rows
    assert row.reason == f"{name} is a graph output"
    assert nodes_of(model, "MoE") == []
