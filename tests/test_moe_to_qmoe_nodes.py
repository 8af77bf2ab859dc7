"""One node through the rule: what is written, and by which recipe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript.rewriter import rewrite

from qmoe_rules import ops
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import moe_to_qmoe_rules
from tests.moe_models import (
    Array,
    Arrays,
    Experts,
    Graph,
    expected,
    inputs_of,
    layers,
    relative_error,
    run,
    single,
    the_node,
)
from tests.moe_rewrites import EXACT, convert

WEIGHTS = {
    "fc1_experts_weights": "fc1_quantized",
    "fc1_scales": "fc1_scales",
    "fc2_experts_weights": "fc2_quantized",
    "fc2_scales": "fc2_scales",
}
BIASES = {"fc1_experts_bias": "fc1_bias", "fc2_experts_bias": "fc2_bias"}


def attributes_of(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def input_names(node: ir.Node) -> dict[str, str | None]:
    """Returns the given inputs of a QMoE by slot."""
    return {name: value.name for name, value in ops.inputs(node).items() if value is not None}


# --- What is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("as_proto", [False, True], ids=["ir.Model", "ModelProto"])
@pytest.mark.parametrize("block_size", [0, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_attribute_is_explicit(bits: int, block_size: int, as_proto: bool) -> None:
    model = single(k=2, activation_alpha=1.702, activation_beta=1.0, swiglu_limit=7.0)
    rules = [*moe_to_qmoe_rules(bits=bits, block_size=block_size)]
    if as_proto:
        proto: onnx.ModelProto = rewrite(ir.to_proto(model), rules)
        assert isinstance(proto, onnx.ModelProto)
        model = ir.from_proto(proto)
    else:
        assert rewrite(model, rules) is model
    assert attributes_of(the_node(model)) == {
        "k": 2,
        "activation_type": "swiglu",
        "activation_alpha": pytest.approx(1.702),
        "activation_beta": 1.0,
        "swiglu_fusion": 1,
        "swiglu_limit": 7.0,
        "normalize_routing_weights": 0,
        "use_sparse_mixer": 0,
        "expert_weight_bits": bits,
        "quant_type": "int",
        "weights_prepacked": 0,
    } | ({"block_size": block_size} if block_size else {})


def test_a_node_without_attributes_gets_the_defaults_of_the_schema() -> None:
    experts = Experts(activation="relu")
    graph = Graph()
    x, router_probs = inputs_of(graph, experts)
    y = graph.moe(x, router_probs, graph.weights(experts.arrays()))
    model = convert(graph.model(y))
    assert attributes_of(the_node(model)) == {
        "k": 1,
        "activation_type": "relu",
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "swiglu_fusion": 0,
        "normalize_routing_weights": 0,
        "use_sparse_mixer": 0,
        "expert_weight_bits": 4,
        "quant_type": "int",
        "weights_prepacked": 0,
    }
    feeds = experts.feeds()
    wanted = expected(
        experts.arrays(), feeds, Recipe().specs["fc1"]
    )  # the reference has its own defaults
    assert relative_error(run(model, feeds)[0], wanted) <= EXACT


def test_the_packed_layout_says_so() -> None:
    model = convert(
        single(Experts(dtype=np.float16), k=2), target="cuda", layout="cutlass_sm80", block_size=64
    )
    assert attributes_of(the_node(model))["weights_prepacked"] == 1


# What a node says of its storage, by recipe; what is None is not there.
SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero points": (
        {"block_size": 32, "symmetric": False},
        {"expert_weight_bits": 4, "block_size": 32, "quant_type": "int", "weights_prepacked": 0},
    ),
    "two widths": (
        {"bits": 2, "fc2_bits": 4, "block_size": 64, "target": "cuda"},
        {"expert_weight_bits": 2, "fc2_expert_weight_bits": 4, "weights_prepacked": 0},
    ),
    "one width, said twice": (
        {"bits": 8, "fc2_bits": 8},
        {"expert_weight_bits": 8, "fc2_expert_weight_bits": None, "block_size": None},
    ),
    "int3": (
        {"bits": 3, "block_size": 64, "target": "cpu"},
        {"expert_weight_bits": 3, "block_size": 64, "quant_type": "int", "weights_prepacked": 0},
    ),
    "mxfp4 for the CPU": (
        {"format": "mxfp4", "target": "cpu"},
        {"expert_weight_bits": 4, "block_size": None, "quant_type": "fp4", "weights_prepacked": 1},
    ),
    "nvfp4 for CUDA": (
        {"format": "nvfp4", "target": "cuda"},
        {
            "expert_weight_bits": 4,
            "block_size": None,
            "quant_type": "nvfp4",
            "weights_prepacked": 0,
        },
    ),
    "fp8": (
        {"format": "fp8", "target": "webgpu"},
        {"expert_weight_bits": 8, "block_size": 128, "quant_type": "fp8", "weights_prepacked": 0},
    ),
    "TensorRT-RTX": (
        {"block_size": 128, "target": "trt-rtx"},
        {
            "expert_weight_bits": 4,
            "block_size": 128,
            "quant_type": "int",
            "weights_prepacked": None,
            "swiglu_limit": math.inf,
        },
    ),
    "WebGPU": (
        {"block_size": 32, "target": "webgpu"},
        {"block_size": 32, "weights_prepacked": 0, "swiglu_limit": None},
    ),
}


@pytest.mark.parametrize(("fields", "said"), SAID.values(), ids=list(SAID))
def test_what_a_node_says_of_its_storage(fields: dict[str, Any], said: dict[str, Any]) -> None:
    experts = Experts(inter=256, dtype=np.float16)
    node = the_node(convert(single(experts, normalize_routing_weights=1), **fields))
    found = attributes_of(node)
    assert {name: found.get(name) for name in said} == said


@pytest.mark.parametrize(("fields", "said"), SAID.values(), ids=list(SAID))
def test_the_inputs_of_a_node_are_the_parts_that_are_stored(
    fields: dict[str, Any], said: dict[str, Any]
) -> None:
    experts = Experts(inter=256, dtype=np.float16, bias=False)
    node = the_node(convert(single(experts, normalize_routing_weights=1), **fields))
    parts = {
        slot
        for name, spec in Recipe(**fields).specs.items()
        for slot in (
            f"{name}_experts_weights",
            f"{name}_scales",
            *([] if spec.symmetric else [f"{name}_zero_points"]),
            *([f"{name}_global_scale"] if spec.format.global_scale else []),
        )
    }
    assert set(input_names(node)) == {"input", "router_probs", *parts}
    assert node.inputs[-1] is not None  # nothing trails


def test_a_limit_of_the_model_stays_where_the_target_wants_one() -> None:
    experts = Experts(inter=256, dtype=np.float16)
    model = convert(single(experts, swiglu_limit=7.0), block_size=128, target="trt-rtx")
    assert attributes_of(the_node(model))["swiglu_limit"] == 7.0


@pytest.mark.parametrize(
    "given", [set[str](), {"fc1_bias"}, {"fc2_bias"}, {"fc1_bias", "fc2_bias"}]
)
def test_inputs_keep_their_slots(given: set[str]) -> None:
    experts = Experts()
    arrays = {
        name: array
        for name, array in experts.arrays().items()
        if not name.endswith("bias") or name in given
    }
    graph = Graph()
    x, router_probs = inputs_of(graph, experts)
    weights = graph.weights(arrays)
    attributes = {**experts.attributes, "k": 2, "normalize_routing_weights": 1}
    model = convert(graph.model(graph.moe(x, router_probs, weights, **attributes)))
    biases = {slot: name for slot, name in BIASES.items() if name in given}
    node = the_node(model)
    assert input_names(node) == {"input": "x", "router_probs": "router_probs", **WEIGHTS, **biases}
    assert node.inputs[-1] is not None  # no trailing empty inputs
    feeds = experts.feeds()
    wanted = expected(arrays, feeds, Recipe().specs["fc1"], **attributes)
    assert relative_error(run(model, feeds)[0], wanted) <= EXACT


@pytest.mark.parametrize("empty", [None, ir.Value(name="")], ids=["None", "unnamed value"])
def test_empty_inputs_stay_empty(empty: ir.Value | None) -> None:
    """x, router, fc1, '', fc2, '', '', '': every optional input is there and says nothing."""
    experts = Experts(bias=False)
    graph = Graph()
    x, router_probs = inputs_of(graph, experts)
    weights = graph.weights(experts.arrays())
    attributes = {**experts.attributes, "normalize_routing_weights": 1}
    inputs = [x, router_probs, weights["fc1"], empty, weights["fc2"], empty, empty, empty]
    y = graph.op("MoE", *inputs, out="y", like=x, domain=ops.DOMAIN, **attributes)
    node = the_node(convert(model := graph.model(y)))
    assert input_names(node) == {"input": "x", "router_probs": "router_probs", **WEIGHTS}
    feeds = experts.feeds()
    wanted = expected(experts.arrays(), feeds, Recipe().specs["fc1"], **attributes)
    assert relative_error(run(model, feeds)[0], wanted) <= EXACT


@pytest.mark.parametrize(
    ("target", "normalize", "adds"),
    [
        ("portable", 0, True),
        ("cpu", 0, True),
        ("cuda", 0, False),
        ("portable", 1, False),
        ("cpu", 1, False),
        ("cuda", 1, False),
    ],
)
def test_router_weights_are_added_where_a_kernel_would_renormalize(
    target: str, normalize: int, adds: bool
) -> None:
    experts = Experts(dtype=np.float16)
    node = the_node(convert(single(experts, normalize_routing_weights=normalize), target=target))
    router_weights = ops.inputs(node)["router_weights"]
    assert (router_weights is not None) == adds
    assert attributes_of(node)["normalize_routing_weights"] == normalize
    if router_weights is not None:
        softmax = ops.producer(router_weights)
        assert softmax.op_type == "Softmax"
        assert [value.name for value in softmax.inputs if value] == ["router_probs"]
        assert softmax.attributes["axis"].as_int() == -1


def test_stored_shapes_and_types_are_declared() -> None:
    model = convert(single(Experts(dtype=np.float16)), bits=4, block_size=32)
    shapes = {
        value.name: (value.dtype, list(value.shape or ()))
        for value in ops.inputs(the_node(model)).values()
        if value is not None and value.is_initializer()
    }
    assert shapes == {
        "fc1_quantized": (ir.DataType.UINT8, [3, 384, 64]),
        "fc1_scales": (ir.DataType.FLOAT16, [3, 384, 4]),
        "fc1_bias": (ir.DataType.FLOAT16, [3, 384]),
        "fc2_quantized": (ir.DataType.UINT8, [3, 128, 96]),
        "fc2_scales": (ir.DataType.FLOAT16, [3, 128, 6]),
        "fc2_bias": (ir.DataType.FLOAT16, [3, 128]),
    }


def test_the_node_keeps_its_name_documentation_and_metadata() -> None:
    model = single()
    before = the_node(model, "MoE")
    before.doc_string = "what the node is for"
    before.metadata_props["source"] = "layer 3"
    before.outputs[0].doc_string = "what the value is"
    before.outputs[0].metadata_props["unit"] = "none"
    node = the_node(convert(model))
    (output,) = node.outputs
    assert (node.name, node.doc_string) == ("moe", "what the node is for")
    assert node.metadata_props["source"] == "layer 3"
    assert (output.name, output.doc_string) == ("y", "what the value is")
    assert output.metadata_props["unit"] == "none"
    assert output.dtype == ir.DataType.FLOAT
    assert output.shape == ir.Shape(["batch0", 128])
    assert model.graph.outputs[0] is output


def test_the_report_tells_what_was_done() -> None:
    report = Report()
    rewrite(single(), [*moe_to_qmoe_rules(block_size=32, report=report)])
    (row,) = report.rows
    assert (row.node, row.status, row.reason) == ("moe", CONVERTED, "")
    assert (row.experts, row.hidden, row.inter) == (3, 128, 192)
    assert row.stored == "int4 block 32, raw"
    weights = 3 * (384 * 128 + 128 * 192)
    assert row.bytes_before == weights * 4
    assert row.bytes_after == weights // 2 + weights // 32 * 4


# --- Recipes per node ----------------------------------------------------------------------------


def test_overrides_apply_to_the_nodes_that_they_name() -> None:
    model = layers(3, k=2)
    overrides = ("moe1:bits=8,block_size=0", "re:.*[12]:block_size=64")
    recipe = Recipe.of(block_size=32, overrides=overrides)
    convert(model, recipe)
    nodes = [node for node in model.graph if node.op_type == "QMoE"]
    stored = [
        (ops.attributes(n)["expert_weight_bits"], ops.attributes(n)["block_size"]) for n in nodes
    ]
    assert stored == [(4, 32), (8, None), (4, 64)]
    x, router = (Experts().feeds()[name] for name in ("x", "router_probs"))
    wanted: Array = x
    for index in range(3):
        own = Experts(seed=index)
        feeds: Arrays = {"x": wanted, "router_probs": router}
        spec = recipe.resolve(f"moe{index}").specs["fc1"]
        wanted = expected(own.arrays(), feeds, spec, k=2, **own.attributes)
    assert relative_error(run(model, Experts().feeds())[0], wanted) <= EXACT


def test_a_node_without_a_name_is_called_after_its_output() -> None:
    model = single()
    the_node(model, "MoE").name = None
    report = Report()
    rewrite(model, [*moe_to_qmoe_rules(nodes_to_exclude=["y"], report=report)])
    assert [(row.node, row.status) for row in report.rows] == [("y", SKIPPED)]
