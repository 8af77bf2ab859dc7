"""One node through the rule: what is written, what it computes, and what is refused and why."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
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

EXACT = 1e-5
FP16 = 2e-3
INT8_BLOCKS = 5e-2  # the CPU kernel rounds activations to int8 there
INT2_BLOCKS = 3e-2  # and looks int2 products up
BFLOAT16 = 1e-2  # and rounds fp4's scales to bfloat16, which matters unless they are powers of two

WEIGHTS = {
    "fc1_experts_weights": "fc1_quantized",
    "fc1_scales": "fc1_scales",
    "fc2_experts_weights": "fc2_quantized",
    "fc2_scales": "fc2_scales",
}
BIASES = {"fc1_experts_bias": "fc1_bias", "fc2_experts_bias": "fc2_bias"}


def convert(model: ir.Model, recipe: Recipe | None = None, **fields: Any) -> ir.Model:
    return rewrite(model, [*moe_to_qmoe_rules(recipe, **fields)])


def attributes_of(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def input_names(node: ir.Node) -> dict[str, str | None]:
    """Returns the given inputs of a QMoE by slot."""
    return {name: value.name for name, value in ops.inputs(node).items() if value is not None}


def converted_error(
    experts: Experts, recipe: Recipe, shape: tuple[int, ...] = (6,), **attributes: Any
) -> float:
    """Converts a node, runs it and returns how far it is from the reference."""
    model = convert(single(experts, shape=shape, **attributes), recipe)
    assert the_node(model)
    feeds = experts.feeds(shape)
    wanted = expected(experts.arrays(), feeds, recipe.specs, **{**experts.attributes, **attributes})
    return relative_error(run(model, feeds)[0], wanted)


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


# --- What it computes ----------------------------------------------------------------------------

RECIPES = [(4, 0), (4, 32), (4, 64), (8, 0), (8, 32)]


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "identity", "swiglu"])
@pytest.mark.parametrize(("bits", "block_size"), RECIPES)
def test_converted_model_matches_the_reference(bits: int, block_size: int, activation: str) -> None:
    bound = INT8_BLOCKS if (bits, block_size) == (8, 32) else EXACT
    recipe = Recipe(bits=bits, block_size=block_size)
    assert converted_error(Experts(activation=activation), recipe, k=2) <= bound


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize(("bits", "block_size"), RECIPES)
def test_float16_matches_the_reference(bits: int, block_size: int, activation: str) -> None:
    bound = INT8_BLOCKS if (bits, block_size) == (8, 32) else FP16
    recipe = Recipe(bits=bits, block_size=block_size)
    experts = Experts(activation=activation, dtype=np.float16)
    assert converted_error(experts, recipe, k=2) <= bound


@pytest.mark.parametrize(
    ("fields", "dtype", "bound"),
    [
        ({"bits": 2, "target": "cpu"}, np.float32, EXACT),
        ({"bits": 2, "block_size": 16, "target": "cpu"}, np.float32, EXACT),
        ({"bits": 2, "block_size": 64}, np.float16, INT2_BLOCKS),
        ({"bits": 3, "block_size": 32, "target": "cpu"}, np.float16, FP16),
        ({"bits": 3, "block_size": 64, "target": "cpu"}, np.float16, FP16),
        ({"symmetric": False, "target": "cpu"}, np.float32, EXACT),
        ({"symmetric": False, "block_size": 32}, np.float32, EXACT),
        ({"symmetric": False, "block_size": 32}, np.float16, FP16),
        ({"symmetric": False, "bits": 2, "target": "cpu"}, np.float32, EXACT),
        ({"symmetric": False, "bits": 8, "target": "cpu"}, np.float32, EXACT),
        ({"symmetric": False, "bits": 8, "block_size": 64}, np.float32, INT8_BLOCKS),
        ({"format": "mxfp4", "target": "cpu"}, np.float32, EXACT),
        ({"format": "mxfp4", "target": "cpu"}, np.float16, FP16),
        ({"format": "nvfp4", "target": "cpu"}, np.float32, BFLOAT16),
        ({"format": "nvfp4", "target": "cpu"}, np.float16, FP16),
    ],
    ids=str,
)
def test_every_format_of_the_cpu_matches_the_reference(
    fields: dict[str, Any], dtype: Any, bound: float
) -> None:
    assert converted_error(Experts(dtype=dtype, bias=False), Recipe(**fields), k=2) <= bound


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("shape", [(1, 128), (6,), (2, 5)], ids=["one batch", "2-D", "3-D"])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_routing_matches_the_reference(
    k: int, normalize: int, shape: tuple[int, ...], target: str
) -> None:
    experts, recipe = Experts(experts=5), Recipe(block_size=32, target=target)
    error = converted_error(experts, recipe, shape, k=k, normalize_routing_weights=normalize)
    assert error <= EXACT


def test_normalization_makes_a_difference() -> None:
    """Guards the test above: its tolerance tells the two kinds of routing apart."""
    experts = Experts(experts=5)
    feeds = experts.feeds()
    outputs = [
        expected(
            experts.arrays(), feeds, None, k=2, normalize_routing_weights=on, **experts.attributes
        )
        for on in (0, 1)
    ]
    assert relative_error(outputs[0], outputs[1]) > 0.05


@pytest.mark.parametrize("limit", [None, 7.0, 0.5])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.702, 1.0)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_swiglu_parameters_survive(
    bias: bool, alpha: float, beta: float, limit: float | None
) -> None:
    attributes: dict[str, Any] = {"activation_alpha": alpha, "activation_beta": beta, "k": 2}
    if limit is not None:
        attributes["swiglu_limit"] = limit
    error = converted_error(Experts(bias=bias), Recipe(block_size=64), **attributes)
    assert error <= EXACT


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_packed_bytes_run_through_the_cpu_path_for_them(block_size: int) -> None:
    """The CPU provider of onnxruntime 1.32 reads int4 bytes with weights_prepacked=1 as CUDA."""
    recipe = Recipe(block_size=block_size, target="cuda", layout="cutlass_sm80")
    error = converted_error(
        Experts(inter=256, dtype=np.float16), recipe, k=2, normalize_routing_weights=1
    )
    assert error <= FP16


def test_packed_bytes_are_not_the_raw_ones() -> None:
    """Guards the test above: the CPU does tell the layouts apart."""
    experts = Experts(inter=256, dtype=np.float16)
    recipe = Recipe(block_size=64, target="cuda")
    attributes = {**experts.attributes, "k": 2, "normalize_routing_weights": 1}
    model = convert(single(experts, **attributes), recipe)
    the_node(model).attributes.add(ir.AttrInt64("weights_prepacked", 1))
    for value in list(model.graph.initializers.values()):
        if value.name in ("fc1_quantized", "fc2_quantized"):
            experts_, rows, row_bytes = value.const_value.numpy().shape  # type: ignore[union-attr]
            stored = value.const_value.numpy().reshape(experts_, row_bytes * 2, rows // 2)  # type: ignore[union-attr]
            value.const_value = ir.tensor(stored)
            value.shape = ir.Shape(stored.shape)
    feeds = experts.feeds()
    wanted = expected(experts.arrays(), feeds, recipe.specs["fc1"], **attributes)
    assert relative_error(run(model, feeds)[0], wanted) > 0.5


def test_softmax_is_right_without_an_import_of_the_default_domain() -> None:
    experts = Experts()
    attributes = {**experts.attributes, "k": 2}
    model = convert(single(opsets={"com.microsoft": 1}, **attributes))
    feeds = experts.feeds()
    wanted = expected(experts.arrays(), feeds, Recipe().specs["fc1"], **attributes)
    assert relative_error(run(model, feeds)[0], wanted) <= EXACT


# --- What is refused -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A node that must stay, by how it differs from an ordinary one, and the exact reason."""

    reason: str
    experts: Experts = field(default_factory=Experts)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    good: Experts = field(default_factory=lambda: Experts(activation="relu"))
    router: int = 0  # columns of router_probs, where they are wrong


def zeros(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


FC3 = "fc3_experts_{} is present; QMoE kernels want gate and up interleaved in fc1"
CPU_ACTIVATIONS = "(it has gelu, identity, relu, silu, swiglu); target='cuda' takes it"
GATE_MISSING = "with swiglu_fusion=0 and no fc3: the gate is missing"
DIVISOR = "the CUDA provider needs hidden and inter sizes divisible by 64, and they are"

# CUDA has 16-bit kernels only.
HALF = Experts(dtype=np.float16)

REFUSALS = {
    "fc3": Refusal(FC3.format("weights"), arrays={"fc3": zeros(3, 192, 128)}),
    "fc3 bias": Refusal(FC3.format("bias"), arrays={"fc3_bias": zeros(3, 192)}),
    "computed fc1": Refusal(
        "fc1_experts_weights: bad_fc1 is not a constant", homes={"fc1": "computed"}
    ),
    "computed fc2": Refusal(
        "fc2_experts_weights: bad_fc2 is not a constant", homes={"fc2": "computed"}
    ),
    "graph input": Refusal(
        "fc1_experts_weights: bad_fc1 is a graph input, so its default may be overridden at run "
        "time",
        homes={"fc1": "input"},
    ),
    "overridable": Refusal(
        "fc2_experts_weights: bad_fc2 is a graph input, so its default may be overridden at run "
        "time",
        homes={"fc2": "overridable"},
    ),
    "2-D fc1": Refusal(
        "fc1_experts_weights: bad_fc1 has shape [384, 128], not [E, N, K]",
        arrays={"fc1": zeros(384, 128)},
    ),
    "4-D fc2": Refusal(
        "fc2_experts_weights: bad_fc2 has shape [3, 1, 128, 192], not [E, N, K]",
        arrays={"fc2": zeros(3, 1, 128, 192)},
    ),
    "float64": Refusal(
        "fc1_experts_weights: bad_fc1 is DOUBLE, not FLOAT, FLOAT16 or BFLOAT16",
        arrays={"fc1": zeros(3, 384, 128, dtype=np.float64)},
    ),
    "two types": Refusal(
        "fc1_experts_weights is float32, fc2_experts_weights is float16",
        arrays={"fc2": zeros(3, 128, 192, dtype=np.float16)},
    ),
    "fc1 against fc2": Refusal(
        "fc1_experts_weights is [3, 192, 128]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 384, 128]",
        arrays={"fc1": zeros(3, 192, 128)},
    ),
    "transposed fc1": Refusal(
        "fc1_experts_weights is [3, 128, 384]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 384, 128]",
        arrays={"fc1": zeros(3, 128, 384)},
    ),
    "other experts": Refusal(
        "fc1_experts_weights is [4, 384, 128]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 384, 128]",
        arrays={"fc1": zeros(4, 384, 128)},
    ),
    "fc1 bias": Refusal(
        "fc1_experts_bias is [3, 192]; the weights ask for [3, 384]",
        arrays={"fc1_bias": zeros(3, 192)},
    ),
    "fc2 bias": Refusal(
        "fc2_experts_bias is [3, 192]; the weights ask for [3, 128]",
        arrays={"fc2_bias": zeros(3, 192)},
    ),
    "router": Refusal("router_probs is [?, 4]; the weights ask for [?, 3]", router=4),
    "fusion without gate": Refusal(
        "swiglu_fusion=1 with activation 'relu', which has no gate to fuse",
        experts=Experts(activation="relu"),
        attributes={"swiglu_fusion": 1},
    ),
    "gate without fusion": Refusal(
        f"activation 'swiglu' {GATE_MISSING}", attributes={"swiglu_fusion": 0}
    ),
    "fc2 columns against the block": Refusal(
        "fc2_experts_weights: K=192 is not divisible by block_size=128; block_size=32 would do",
        recipe={"block_size": 128},
        good=Experts(activation="relu", inter=256),
    ),
    "fc1 columns against the block": Refusal(
        "fc1_experts_weights: K=192 is not divisible by block_size=128; block_size=32 would do",
        experts=Experts(hidden=192, inter=128),
        recipe={"block_size": 128},
        good=Experts(activation="relu", inter=256),
    ),
    "odd columns": Refusal(
        "fc2_experts_weights: K=33 does not fill whole bytes of 4-bit codes (a multiple of 2 "
        "would)",
        experts=Experts(inter=33),
        recipe={"target": "cpu"},
    ),
    "unknown attribute": Refusal("MoE has no attribute 'made_up'", attributes={"made_up": 1}),
    "an attribute of QMoE": Refusal(
        "MoE has no attribute 'expert_weight_bits'", attributes={"expert_weight_bits": 4}
    ),
    "negative limit": Refusal(
        "swiglu_limit=-1 is negative, which ends the whole process",
        attributes={"swiglu_limit": -1.0},
    ),
    "limit after activation": Refusal(
        "the CPU provider does not honour swiglu_limit_after_activation=1; target='cuda' takes it",
        attributes={"swiglu_limit_after_activation": 1},
        experts=HALF,
        good=HALF,
    ),
    "sparse mixer": Refusal(
        "the CPU provider ignores use_sparse_mixer=1 and would route differently",
        attributes={"use_sparse_mixer": 1},
    ),
    "geglu": Refusal(
        f"the CPU provider has no kernel for activation 'geglu' {CPU_ACTIVATIONS}",
        experts=Experts(activation="geglu", dtype=np.float16),
        good=HALF,
    ),
    "unknown activation": Refusal(
        "the CPU provider has no kernel for activation 'relu2' "
        "(it has gelu, identity, relu, silu, swiglu)",
        experts=Experts(activation="relu2"),
    ),
    "bfloat16": Refusal(
        "the CPU provider has no bfloat16 kernel (it has float16, float32); target='cuda' takes it",
        experts=Experts(dtype=ml_dtypes.bfloat16),
        good=HALF,
    ),
    "halves": Refusal(
        "the CPU provider does not take swiglu_fusion=2 (it takes 1); target='cuda' takes it",
        attributes={"swiglu_fusion": 2},
        experts=HALF,
        good=HALF,
    ),
    "hidden size": Refusal(
        f"{DIVISOR} 96 and 192; target='cpu' takes it", experts=Experts(hidden=96, dtype=np.float16)
    ),
    "inter size": Refusal(
        f"{DIVISOR} 128 and 96; target='cpu' takes it", experts=Experts(inter=96, dtype=np.float16)
    ),
    "size for cuda": Refusal(
        f"{DIVISOR} 128 and 96; target='cpu' takes it",
        experts=Experts(inter=96, dtype=np.float16),
        good=HALF,
        recipe={"target": "cuda"},
    ),
    "size for the packed layout": Refusal(
        f"{DIVISOR} 96 and 192",
        experts=Experts(hidden=96, dtype=np.float16),
        good=HALF,
        recipe={"target": "cuda", "layout": "cutlass_sm80"},
    ),
    "excluded by name": Refusal("excluded by the recipe", recipe={"nodes_to_exclude": ["bad"]}),
    "excluded by pattern": Refusal("excluded by the recipe", recipe={"nodes_to_exclude": ["b*"]}),
    "excluded by expression": Refusal(
        "excluded by the recipe", recipe={"nodes_to_exclude": ["goo", "re:ba[dt]"]}
    ),
}


def model_with(case: Refusal) -> ir.Model:
    """Returns a model of the node of the case, `bad`, beside an ordinary one, `good`."""
    graph = Graph()
    outputs = []
    for prefix, experts in (("bad", case.experts), ("good", case.good)):
        arrays, homes, attributes = experts.arrays(), {}, experts.attributes
        x, router_probs = inputs_of(graph, experts, prefix=f"{prefix}_")
        if prefix == "bad":
            arrays.update(case.arrays)
            homes, attributes = dict(case.homes), {**attributes, **case.attributes}
            if case.router:
                router_probs.shape = ir.Shape(["tokens", case.router])
        weights = graph.weights(arrays, f"{prefix}_", homes)
        out = f"{prefix}_y"
        outputs.append(graph.moe(x, router_probs, weights, out=out, name=prefix, **attributes))
    return graph.model(*outputs)


@pytest.mark.parametrize("case", REFUSALS.values(), ids=list(REFUSALS))
def test_a_refused_node_stays_as_it_was(case: Refusal, caplog: pytest.LogCaptureFixture) -> None:
    model = model_with(case)
    bad = the_named(model, "bad")
    inputs, attributes = list(bad.inputs), dict(bad.attributes)
    report = Report()
    rewrite(model, [*moe_to_qmoe_rules(report=report, **case.recipe)])

    assert the_named(model, "bad") is bad
    assert bad.op_type == "MoE"
    assert list(bad.inputs) == inputs
    assert dict(bad.attributes) == attributes
    assert all(value.graph is model.graph for value in inputs if value is not None)
    assert the_named(model, "good").op_type == "QMoE"

    rows = {row.node: row for row in report.rows}
    assert len(report.rows) == 2
    assert (rows["bad"].status, rows["bad"].reason) == (SKIPPED, case.reason)
    assert rows["bad"].bytes_after == rows["bad"].bytes_before
    assert rows["good"].status == CONVERTED
    assert caplog.record_tuples == [
        (
            "qmoe_rules.rules.moe_to_qmoe",
            logging.WARNING,
            f"bad stays in float: {case.reason}",
        )
    ]
    onnx.checker.check_model(ir.to_proto(model))


def the_named(model: ir.Model, name: str) -> ir.Node:
    (node,) = [node for node in model.graph if node.name == name]
    return node


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("bfloat16", "cuda"),
        ("geglu", "cuda"),
        ("halves", "cuda"),
        ("limit after activation", "cuda"),
        ("hidden size", "cpu"),
        ("inter size", "cpu"),
    ],
)
def test_the_target_that_the_reason_names_does_take_the_node(name: str, target: str) -> None:
    model = model_with(REFUSALS[name])
    rewrite(model, [*moe_to_qmoe_rules(target=target)])
    assert [node.op_type for node in model.graph if node.domain == ops.DOMAIN] == ["QMoE", "QMoE"]


@pytest.mark.parametrize("empty", [None, ir.Value(name="")], ids=["None", "unnamed value"])
def test_a_missing_fc2_is_a_reason(empty: ir.Value | None) -> None:
    graph, report = Graph(), Report()
    x, router_probs = inputs_of(graph, Experts())
    fc1 = graph.weight("fc1", Experts().arrays()["fc1"])
    y = graph.op("MoE", x, router_probs, fc1, empty, empty, out="y", domain=ops.DOMAIN)
    rewrite(graph.model(y), [*moe_to_qmoe_rules(report=report)])
    assert [row.reason for row in report.rows] == ["fc2_experts_weights: it is missing"]


def test_an_input_that_the_schema_does_not_know_is_a_reason() -> None:
    """Newer runtimes append inputs; what is not understood must not be lost."""
    model = single()
    node = the_node(model, "MoE")
    node.resize_inputs(9)
    node.replace_input_with(8, model.graph.inputs[0])
    report = Report()
    rewrite(model, [*moe_to_qmoe_rules(report=report)])
    assert [row.status for row in report.rows] == [SKIPPED]


def test_the_warning_of_an_inexact_kernel_is_logged_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    report, experts = Report(), Experts(dtype=np.float16)
    with caplog.at_level(logging.INFO, "qmoe_rules"):
        rewrite(single(experts), [*moe_to_qmoe_rules(bits=8, block_size=32, report=report)])
    (row,) = report.rows
    warning = "the CPU provider rounds activations to int8 with blockwise int8, 1 to 2 % off"
    assert row.warnings == (warning,)
    assert caplog.messages == [f"moe: {warning}"]


def test_probabilities_instead_of_logits_are_converted_faithfully_and_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    experts = Experts()
    graph, report = Graph(), Report()
    x, logits = inputs_of(graph, experts)
    probabilities = graph.op("Softmax", logits, out="probabilities", like=logits, axis=-1)
    attributes = {**experts.attributes, "k": 2}
    y = graph.moe(x, probabilities, graph.weights(experts.arrays()), **attributes)
    model = graph.model(y)
    with caplog.at_level(logging.INFO, "qmoe_rules"):
        rewrite(model, [*moe_to_qmoe_rules(report=report)])
    assert report.rows[0].warnings[-1].startswith("router_probs comes from a Softmax")
    assert caplog.messages == [f"moe: {warning}" for warning in report.rows[0].warnings]
    feeds = experts.feeds()
    powers = np.exp(feeds["router_probs"].astype(np.float64))
    twice = feeds | {"router_probs": powers / powers.sum(axis=-1, keepdims=True)}
    wanted = expected(experts.arrays(), twice, Recipe().specs["fc1"], **attributes)
    assert relative_error(run(model, feeds)[0], wanted) <= EXACT


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
