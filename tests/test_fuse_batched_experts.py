"""Experts whose weights are gathered token by token, fused into a MoE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript import rewriter

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.report import SKIPPED
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from qmoe_rules.rules.fuse_experts import fuse_experts_rules
from tests.batched_graphs import GPT_OSS, MIXTRAL, Form, batched, inferred
from tests.expert_graphs import Builder, Layer, finished, source
from tests.fusions import fused
from tests.moe_models import Array, Arrays, expected, nodes_of, relative_error, run, the_node

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
    assert not kinds & {"Gather", "GatherND", "Range", "Slice", "Split", "Squeeze", "Unsqueeze"}
    for value in model.graph.initializers.values():
        assert value.uses()
    for node in model.graph:
        assert any(output.uses() or output.is_graph_output() for output in node.outputs)


FORMS = {
    "mixtral": MIXTRAL,
    "gpt_oss": GPT_OSS,
    "olmoe": Form(Layer(experts=5, k=3, router="softmax_topk")),
    "deepseek": Form(Layer(experts=5, router="sigmoid_corrected")),
    "scaled": Form(Layer(experts=5, router="scaled"), k_major=True),
    "mixer": Form(Layer(experts=5, router="mixer")),
    "one": Form(Layer(experts=5, k=1)),
    "all": Form(Layer(experts=3, k=3)),
    "swapped": Form(Layer(experts=5, bias=True, swapped=True), gather="Gather"),
    "range": Form(repeat="range"),
    "range_gpt_oss": replace(GPT_OSS, repeat="range", gather="Gather"),
    "slice": Form(cut="Slice"),
    "grouped": Form(routed=3),
    "apart": Form(apart=True),
    "apart_k_major": Form(Layer(experts=5, bias=True), k_major=True, apart=True),
    "ends": Form(ends=True),
    "ends_k_major": replace(GPT_OSS, ends=True),
    "deep": Form(reads="deep"),
    "plain": Form(Layer(experts=5, activation="silu")),
    "another_router": Form(Layer(experts=5, router="softmax_topk"), second="sigmoid"),
}


@pytest.mark.parametrize("name", FORMS)
def test_it_computes_the_same(name: str) -> None:
    form = FORMS[name]
    before, _ = batched(form)
    after, _ = batched(form)
    assert fused(after).rows == []
    assert the_node(after, "MoE").inputs[0] is not None
    only_the_moe_is_left(after)
    agree(before, after, form.layer, 1e-5)


@pytest.mark.parametrize(
    "wide",
    [
        (),
        ("weighting",),
        ("product",),
        ("sum",),
        ("weighting", "product"),
        ("weighting", "sum"),
        ("product", "sum"),
        ("weighting", "product", "sum"),
    ],
)
@pytest.mark.parametrize("form", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_float16_computes_the_same(form: Form, wide: tuple[str, ...]) -> None:
    form = replace(form, layer=replace(form.layer, dtype=np.float16), wide=wide)
    before, _ = batched(form)
    after, _ = batched(form)
    assert fused(after).rows == []
    output = the_node(after, "MoE").outputs[0]
    assert output.dtype == ir.DataType.FLOAT16
    casts = [node.attributes.get_int("to") for node in output.consumers() if node.op_type == "Cast"]
    total = [node for node in before.graph if node.op_type == "ReduceSum"][-1].outputs[0]
    assert casts == ([total.dtype] if wide else [])
    agree(before, after, form.layer, 2e-3)


def test_the_node_says_what_the_block_computed() -> None:
    model, _ = batched(GPT_OSS)
    fused(model)
    attributes = {key: value.value for key, value in the_node(model, "MoE").attributes.items()}
    assert attributes.pop("activation_alpha") == pytest.approx(1.702)
    assert attributes == {
        "activation_type": "swiglu",
        "activation_beta": 1.0,
        "k": 3,
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "swiglu_limit": 0.5,
        "use_sparse_mixer": 0,
    }


def test_layers_in_a_row() -> None:
    before, _ = batched(MIXTRAL, layers=3)
    after, _ = batched(MIXTRAL, layers=3)
    fused(after)
    assert len(nodes_of(after, "MoE")) == 3
    only_the_moe_is_left(after)
    agree(before, after, MIXTRAL.layer, 1e-5)


def test_rewrite_and_a_second_sweep() -> None:
    before, _ = batched(MIXTRAL)
    after, _ = batched(MIXTRAL)
    after = rewriter.rewrite(after, fuse_experts_rules())
    agree(before, after, MIXTRAL.layer, 1e-5)
    assert not apply_rules(after, fuse_experts_rules())


def _logits(model: ir.Model, x: Array) -> Array:
    weight = model.graph.initializers["l0.router"].const_value
    assert weight is not None
    return np.asarray(x.reshape(-1, x.shape[-1]) @ weight.numpy())


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 0)])
@pytest.mark.parametrize("form", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_quantized_in_the_same_list(form: Form, bits: int, block: int) -> None:
    model, arrays = batched(form)
    quantizing = moe_to_qmoe_rules(bits=bits, block_size=block, target="cpu")
    apply_rules(model, [*fuse_experts_rules(), *quantizing])
    assert nodes_of(model, "MoE") == []
    node = the_node(model)
    names = ("activation_type", "activation_alpha", "activation_beta", "k", "swiglu_fusion")
    feeds = inputs(form.layer, (4, 7))
    logits = _logits(model, feeds["x"])
    chosen = np.argsort(logits)[:, -form.layer.k :]
    assert len(np.unique(chosen)) == form.layer.experts
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
    "tile": (Form(repeat="tile"), "is not every token 2 times in a row"),
    "group": (Form(group=4), "is not every token 4 times in a row"),
    "others": (Form(others=("fc2",)), "one map takes the experts"),
    "overlap": (Form(cut="overlap"), "is no activation of MoE"),
    "thirds": (Form(Layer(experts=5, inter=64), cut="thirds"), "is no activation of MoE"),
    "signed": (Form(Layer(experts=5, router="signed")), "may be negative"),
    "reglu": (Form(Layer(experts=5, activation="reglu")), "MoE has no gated relu"),
    "overridable": (
        Form(Layer(experts=5, homes={"fc1": "overridable"})),
        "l0.fc1 is a graph input, so its default may be overridden at run time",
    ),
    "computed": (Form(Layer(experts=5, homes={"fc2": "computed"})), "l0.fc2 is not a constant"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_proven_stays(name: str) -> None:
    form, reason = REASONS[name]
    model, _ = batched(form)
    count = len(list(model.graph))
    (row,) = fused(model).rows
    assert row.status == SKIPPED
    assert reason in row.reason
    assert nodes_of(model, "MoE") == []
    assert len(list(model.graph)) == count


@pytest.mark.parametrize("op_type", ["MatMul", "Squeeze", "Sigmoid", "Split", "Mul", "GatherND"])
def test_a_value_that_others_need_stays(op_type: str) -> None:
    model, _ = batched(MIXTRAL)
    # The router's own MatMul comes before the experts'.
    name = [node.outputs[0].name for node in model.graph if node.op_type == op_type][-1]
    model, _ = batched(MIXTRAL, str(name))
    (row,) = fused(model).rows
    assert row.reason == f"{name} is a graph output"
    assert nodes_of(model, "MoE") == []


@pytest.mark.parametrize("op_type", ["TopK", "Expand"])
def test_what_others_need_of_the_routing_is_kept(op_type: str) -> None:
    model, _ = batched(MIXTRAL)
    name = next(node.outputs[-1].name for node in model.graph if node.op_type == op_type)
    before, _ = batched(MIXTRAL, str(name))
    after, _ = batched(MIXTRAL, str(name))
    assert fused(after).rows == []
    feeds = inputs(MIXTRAL.layer, (4, 7))
    for old, new in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


def test_other_sums_are_none_of_its_business() -> None:
    builder = Builder(Layer())
    x = source(builder.graph, builder.layer)
    weighted = builder.op("Mul", x, builder.number(2.0))
    folded = builder.op("Reshape", weighted, builder.constant([-1, 2, 32]))
    total = builder.op("ReduceSum", folded, builder.constant([1]), keepdims=0)
    model = inferred(finished(builder, x, total))
    assert fused(model).rows == []


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_exported_models(shared: Path, name: str) -> None:
    path = shared / "models" / f"torch-{name}-batched_mm-fp32-none" / "model.onnx"
    before, after = (ir.external_data.load_to_model(ir.load(path)) for _ in range(2))
    assert fused(after).rows == []
    the_node(after, "MoE")
    agree(before, after, Layer(hidden=128), 1e-5)
