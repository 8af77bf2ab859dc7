"""The audit: its verdict on a node is what ONNX Runtime then makes of it, and its remedies mend."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_rules import ops
from qmoe_rules.audit import Audit, audit
from qmoe_rules.kernels import GARBAGE, REFUSED, RIGHT, UNKNOWN
from qmoe_rules.loading import load, locate
from qmoe_rules.providers import TARGETS
from tests.contract import Cell, serialized
from tests.gpu import case as gpu
from tests.gpu.cases import cases
from tests.moe_models import Array, Graph, relative_error

Model = ir.Model
Alter = Callable[[Model], None]

INT4, INT8 = Cell("int4", block_size=32), Cell("int8")
MXFP4, NVFP4 = Cell("mxfp4", block_size=32), Cell("nvfp4", block_size=16)
RELU = INT4.but(activation="relu")
# H == I and no gate: the weights have one shape in every layout.
SQUARE = RELU.but(hidden=128, inter=128)


def the_node(model: Model) -> ir.Node:
    (node,) = ops.nodes(model, "MoE", "QMoE")
    return node


def judged(model: Model, target: str) -> Audit:
    return audit(the_node(model), target)


def replaced(model: Model, slot: str, change: Callable[[Array], Array]) -> Model:
    """Returns the model with one initializer changed."""
    value = model.graph.initializers[slot]
    assert value.const_value is not None
    array = np.ascontiguousarray(change(value.const_value.numpy()))
    tensor = ir.tensor(array, name=slot)
    value.const_value, value.shape, value.dtype = tensor, ir.Shape(array.shape), tensor.dtype
    return model


# --- The models of other exporters ---------------------------------------------------------------

ON_EVERY_PROVIDER = {"portable": RIGHT, "cpu": RIGHT, "cuda": RIGHT, "webgpu": RIGHT}
MOE = {**ON_EVERY_PROVIDER, "trt-rtx": UNKNOWN}
CUDA_MOE = {
    "portable": REFUSED,
    "cpu": REFUSED,
    "cuda": RIGHT,
    "webgpu": REFUSED,
    "trt-rtx": UNKNOWN,
}
SHARED: dict[str, dict[str, str]] = {
    "bytelm-swiglu16-fp16": MOE,
    "bytelm-swiglu16-fp32": MOE,
    "bytelm-tiny8-fp16": MOE,
    "bytelm-tiny8-fp32": MOE,
    "genai-gemma4-fp16-cuda": CUDA_MOE,  # geglu
    "genai-gptoss-bf16-cuda": CUDA_MOE,
    "genai-gptoss-fp16-cuda": MOE,
    "genai-gptoss-fp32-cpu": MOE,
    # float32 runs on the CPU in a session for CUDA, and the CPU takes unstated bytes for raw ones.
    "genai-gptoss-int4-cpu": {**ON_EVERY_PROVIDER, "trt-rtx": UNKNOWN},
    "genai-gptoss-int4-cuda": {
        "portable": GARBAGE,
        "cpu": GARBAGE,
        "cuda": RIGHT,
        "webgpu": GARBAGE,
        "trt-rtx": GARBAGE,
    },
    "genai-phimoe-int4-cuda-raw": dict.fromkeys(TARGETS, REFUSED),
    "genai-qwen3_5_moe-fp16-cuda": MOE,
    "mobius-deepseek_v3-fp32-cpu": {},
    "mobius-gemma4-fp32-cpu": MOE,
    "mobius-gptoss-fp16-cuda": {},
    "mobius-gptoss-fp32-cpu": {},
    "mobius-mixtral-fp32-cpu": {},
    "mobius-phimoe-fp32-cpu": {},
    "torch-deepseek_v3-batched_mm-fp32-none": {},
    "torch-mixtral-batched_mm-fp32-none": {},
}


@pytest.mark.parametrize("name", SHARED)
def test_the_models_of_exporters(name: str, shared: Path) -> None:
    nodes = list(ops.nodes(load(locate(shared / "models" / name).model), "MoE", "QMoE"))
    verdicts = {
        target: {audit(node, target).verdict for node in nodes} for target in TARGETS if nodes
    }
    assert verdicts == {target: {verdict} for target, verdict in SHARED[name].items()}


def test_every_shared_model_has_its_verdicts(shared: Path) -> None:
    assert {path.name for path in (shared / "models").iterdir() if path.is_dir()} == set(SHARED)


# --- What the CPU provider really does -----------------------------------------------------------

FORMS = {
    "int2": (Cell("int2", block_size=64, hidden=128, inter=192), "raw"),
    "int3": (Cell("int3", block_size=32), "raw"),
    "int4": (INT4, "raw"),
    "int4 row": (Cell("int4"), "raw"),
    "int8": (Cell("int8", block_size=64), "raw"),
    "int8 row": (INT8, "raw"),
    "mxfp4": (MXFP4, "k_packed"),
    "mxfp4 of CUDA": (MXFP4, "n_packed"),
    "nvfp4": (NVFP4, "k_packed"),
    "packed int8": (INT8, "cutlass_sm80"),
}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "weights_prepacked=-1": ({}, {"weights_prepacked": -1}),
    "weights_prepacked=0": ({}, {"weights_prepacked": 0}),
    "weights_prepacked=2": ({}, {"weights_prepacked": 2}),
    "float32": ({"dtype": "float32"}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {}),
    "zero points": ({"symmetric": False}, {}),
    "without biases": ({"bias": False}, {}),
    "mixed widths": ({"fc2_format": "int8"}, {}),
    "relu": ({"activation": "relu"}, {}),
    "geglu": ({"activation": "geglu"}, {}),
    "halves": ({"fusion": 2}, {}),
    "no fusion": ({}, {"swiglu_fusion": 0}),
    "normalize=0": ({"normalize": 0}, {}),
    "normalize=0 of all experts": ({"normalize": 0, "k": 4}, {}),
    "limit after activation": ({"limit": 0.5}, {"swiglu_limit_after_activation": 1}),
    "negative limit without a gate": ({"activation": "relu"}, {"swiglu_limit": -1.0}),
    "block_size=-1": ({}, {"block_size": -1}),
    "block_size=64": ({}, {"block_size": 64}),
    "k=0": ({}, {"k": 0}),
    "k=9": ({}, {"k": 9}),
    "5 bits": ({}, {"expert_weight_bits": 5}),
    "an unheard-of attribute": ({}, {"num_shared_experts": 1}),
}


COMBINATIONS = [
    (form, change)
    for form, change in itertools.product(FORMS, CHANGES)
    # Floating-point codes have neither zero points nor mixed widths.
    if "fp4" not in form or not {"symmetric", "fc2_format"} & CHANGES[change][0].keys()
]


@pytest.mark.parametrize(("form", "change"), COMBINATIONS)
def test_the_cpu_provider_does_what_the_audit_says(form: str, change: str) -> None:
    (cell, layout), (fields, attributes) = FORMS[form], CHANGES[change]
    cell = cell.but(**fields)
    model = cell.direct(layout, **attributes)
    verdict = judged(model, "cpu").verdict
    if change == "block_size=64" and not cell.block_size:
        assert verdict == UNKNOWN  # which of the two the CPU provider believes is its own affair
    else:
        assert verdict == outcome(model, cell, cell.expected())


def outcome(model: Model, cell: Cell, expected: Array) -> str:
    """Returns what the CPU provider makes of a model, in the words of the audit."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            serialized(model), options, providers=["CPUExecutionProvider"]
        )
        (actual,) = session.run(None, cell.feeds())
    except Exception:  # whatever the runtime throws is a refusal
        return REFUSED
    return RIGHT if relative_error(np.asarray(actual), expected) < 0.03 else GARBAGE


@pytest.mark.parametrize(
    ("alter", "verdict"),
    [
        (lambda m: replaced(m, "fc1_scales", lambda a: a[..., :-1]), REFUSED),
        (lambda m: replaced(m, "fc1_scales", lambda a: a[:, :-1]), REFUSED),
        (lambda m: replaced(m, "fc2_experts_weights", lambda a: a[:, :-1]), REFUSED),
        (lambda m: replaced(m, "fc2_experts_weights", lambda a: a[:-1]), REFUSED),
        (lambda m: replaced(m, "fc1_experts_bias", lambda a: a[:, :-1]), REFUSED),
        (lambda m: replaced(m, "fc1_experts_weights", lambda a: a.astype(np.float16)), REFUSED),
    ],
    ids=["blocks", "rows", "fc2", "experts", "bias", "type"],
)
def test_shapes_and_types_are_those_that_the_cpu_provider_takes(
    alter: Callable[[Model], Model], verdict: str
) -> None:
    model = alter(INT4.direct())
    assert judged(model, "cpu").verdict == outcome(model, INT4, INT4.expected()) == verdict


def test_scales_may_have_another_type_than_the_input_on_the_cpu_alone() -> None:
    model = INT4.direct()
    for slot in ("fc1_scales", "fc2_scales"):
        replaced(model, slot, lambda a: a.astype(np.float32))
    assert judged(model, "cpu").verdict == outcome(model, INT4, INT4.expected()) == RIGHT
    found = judged(model, "cuda")
    assert (found.verdict, found.reason) == (
        REFUSED,
        "the CUDA provider does not honour scales of another type than the input's",
    )


def test_one_scale_per_row_may_have_an_axis_of_its_own() -> None:
    cell = Cell("int4")
    model = cell.direct()
    for slot in ("fc1_scales", "fc2_scales"):
        replaced(model, slot, lambda a: a[..., None])
    assert judged(model, "cpu").verdict == outcome(model, cell, cell.expected()) == RIGHT


@pytest.mark.parametrize(
    ("fields", "attributes", "verdict"),
    [
        ({}, {}, RIGHT),
        ({"dtype": "float16"}, {}, RIGHT),
        ({"dtype": "bfloat16"}, {}, REFUSED),
        ({"activation": "gelu"}, {}, RIGHT),
        ({"activation": "geglu"}, {}, REFUSED),
        ({"activation": "relu2"}, {}, REFUSED),
        ({"fusion": 2}, {}, REFUSED),
        ({"normalize": 0}, {}, RIGHT),
        # Unlike QMoE's kernel, that of MoE minds the activation first.
        ({"activation": "relu"}, {"swiglu_fusion": 1}, RIGHT),
        ({"limit": 0.5}, {"swiglu_limit_after_activation": 1}, REFUSED),
        ({}, {"k": 9}, REFUSED),
    ],
)
def test_the_cpu_provider_does_to_moe_what_the_audit_says(
    fields: Mapping[str, Any], attributes: Mapping[str, int], verdict: str
) -> None:
    cell = Cell(dtype="float32").but(**fields)
    model = cell.but(activation="relu").float_model() if "relu2" in str(fields) else None
    model = model or cell.float_model()
    for name, value in attributes.items():
        the_node(model).attributes[name] = ir.AttrInt64(name, value)
    the_node(model).attributes["activation_type"] = ir.AttrString(
        "activation_type", cell.activation
    )
    expected = np.ones((6, 128)) if verdict == REFUSED else cell.expected_float()
    assert judged(model, "cpu").verdict == outcome(model, cell, expected) == verdict


def test_moe_with_an_fc3_is_refused_by_the_cpu() -> None:
    cell = Cell(dtype="float32")
    model = cell.float_model(separate=True)
    found = judged(model, "cpu")
    assert found.verdict == outcome(model, cell, cell.expected_float()) == REFUSED
    assert found.reason == "the CPU provider does not honour a separate fc3"


@pytest.mark.parametrize("model", [INT4.direct(use_sparse_mixer=1), Cell().float_model()])
def test_the_cpu_provider_ignores_the_sparse_mixer(model: Model) -> None:
    the_node(model).attributes["use_sparse_mixer"] = ir.AttrInt64("use_sparse_mixer", 1)
    is_moe = the_node(model).op_type == "MoE"
    cell = Cell() if is_moe else INT4
    ordinary = cell.expected_float() if is_moe else cell.expected()
    assert outcome(model, cell, ordinary) == RIGHT  # it routes as if nothing were asked
    found = judged(model, "cpu")
    assert found.verdict == GARBAGE
    assert found.reason == (
        "the CPU provider ignores use_sparse_mixer=1 and would route differently"
    )


def test_a_fusion_without_a_gate_is_garbage() -> None:
    """It reads out of bounds, so it is not run here."""
    for fusion, verdict in ((0, RIGHT), (1, GARBAGE), (2, GARBAGE)):
        assert judged(RELU.direct(swiglu_fusion=fusion), "cpu").verdict == verdict
    assert judged(RELU.direct(swiglu_fusion=1), "cuda").verdict == REFUSED


def test_a_negative_limit_ends_the_process() -> None:
    """It is not run here."""
    found = judged(INT4.direct(swiglu_limit=-1.0), "cpu")
    assert (found.verdict, found.reason) == (
        REFUSED,
        "swiglu_limit=-1 is negative, which ends the whole process",
    )


# --- What the CUDA provider was measured to do ---------------------------------------------------

# What a file cannot tell, or what the case asked otherwise: parts of its name, and the verdict.
_OTHERWISE = (
    (("cutlass-sm90",), RIGHT),  # the shape is that of cutlass_sm80
    (("mxfp4", "k-packed-bytes-declared-e-k-n-2"), RIGHT),  # the shape is that of n_packed
    (("nvfp4", "packed", "weights-prepacked=1"), UNKNOWN),  # 1.32 reads it as k_packed
    (("swiglu-fusion=0",), UNKNOWN),  # the case was made interleaved
    (("sparse-mixer=1",), GARBAGE),  # the case expects ordinary routing
    (("router-weights-given",), GARBAGE),  # the case expects them to be passed over
    (("activation=geglu",), RIGHT),  # from 1.32 on, says a note
    # By default a session hands float32 to the CPU provider, and these may not.
    (("types-int", "dtype=float32"), RIGHT),
    (("cutlass-sm80-fallback",), UNKNOWN),  # 1.32's CPU provider reads it
)


def test_the_cuda_provider_did_what_the_audit_says() -> None:
    meant = {
        gpu.RIGHT: RIGHT,
        gpu.REFUSED: REFUSED,
        gpu.GARBAGE: GARBAGE,
        gpu.BY_CHANCE: GARBAGE,  # it may be, and that is too much
    }
    wrong = {}
    for case in cases():
        expected = meant[case.verdicts]
        for marks, otherwise in _OTHERWISE:
            if all(mark in case.name for mark in marks):
                expected = otherwise
        found = judged(case.made()[0], "cuda")
        if found.verdict != expected:
            wrong[case.name] = (found.verdict, found.reason, case.verdicts)
    assert wrong == {}
    assert len(cases()) > 200


# --- The layout of the bytes ---------------------------------------------------------------------

CPU_RAW = "the CPU provider takes the bytes for raw ones, as "
CUDA_SM80 = "the CUDA provider takes the bytes for cutlass_sm80 ones, as "
SILENT = "weights_prepacked is not stated; "


@pytest.mark.parametrize(
    ("cell", "layout", "prepacked", "target", "verdict", "reason"),
    [
        (INT4, "raw", None, "cpu", RIGHT, ""),
        (INT4, "raw", None, "webgpu", RIGHT, ""),
        (INT4, "raw", None, "cuda", GARBAGE, f"{CUDA_SM80}{SILENT}their shape says raw"),
        (INT4, "raw", -1, "cuda", GARBAGE, f"{CUDA_SM80}{SILENT}their shape says raw"),
        (INT4, "raw", -1, "portable", GARBAGE, f"{CUDA_SM80}{SILENT}their shape says raw"),
        (INT4, "raw", 0, "portable", RIGHT, ""),
        (INT4, "raw", 1, "cuda", GARBAGE, f"{CUDA_SM80}weights_prepacked=1; their shape says raw"),
        (INT4, "cutlass_sm80", None, "cuda", RIGHT, ""),
        (INT4, "cutlass_sm80", 1, "cuda", RIGHT, ""),
        (
            INT4,
            "cutlass_sm80",
            None,
            "cpu",
            GARBAGE,
            f"{CPU_RAW}{SILENT}their shape says cutlass_sm80",
        ),
        (
            INT8,
            "cutlass_sm80",
            1,
            "cpu",
            GARBAGE,
            f"{CPU_RAW}weights_prepacked=1; their shape says cutlass_sm80",
        ),
        (
            INT4,
            "cutlass_sm80",
            0,
            "cuda",
            GARBAGE,
            "the CUDA provider takes the bytes for raw ones, as weights_prepacked=0; "
            "their shape says cutlass_sm80",
        ),
        (
            INT4,
            "cutlass_sm80",
            1,
            "webgpu",
            REFUSED,
            "the WebGPU provider wants weights_prepacked=-1, 0 with int4, and weights_prepacked=1",
        ),
        # One shape for both: it is as it was said, or nobody can know.
        (SQUARE, "raw", 0, "portable", RIGHT, ""),
        (SQUARE, "cutlass_sm80", 1, "cuda", RIGHT, ""),
        (
            SQUARE,
            "raw",
            None,
            "cpu",
            UNKNOWN,
            f"{CPU_RAW}{SILENT}they may be cutlass_sm80 or raw",
        ),
        (
            SQUARE,
            "raw",
            None,
            "cuda",
            UNKNOWN,
            f"{CUDA_SM80}{SILENT}they may be cutlass_sm80 or raw",
        ),
        # Floating-point codes of 4 bits.
        (MXFP4, "k_packed", 1, "cpu", RIGHT, ""),
        (MXFP4, "n_packed", None, "cuda", RIGHT, ""),
        (MXFP4, "n_packed", 1, "cuda", RIGHT, ""),  # it is ignored
        (
            MXFP4,
            "n_packed",
            1,
            "cpu",
            GARBAGE,
            "the CPU provider takes the bytes for k_packed ones, as weights_prepacked=1; "
            "their shape says n_packed",
        ),
        (
            MXFP4,
            "k_packed",
            0,
            "cpu",
            REFUSED,
            "the CPU provider wants weights_prepacked=1 with mxfp4, and weights_prepacked=0",
        ),
        (
            NVFP4,
            "n_packed",
            1,
            "cuda",
            UNKNOWN,
            "the CUDA provider takes the bytes for k_packed or n_packed ones, as "
            "weights_prepacked=1; they may be k_packed or n_packed",
        ),
        (
            Cell("int3", block_size=32),
            "raw",
            None,
            "cpu",
            REFUSED,
            "the CPU provider wants weights_prepacked=0 with int3, and weights_prepacked is not "
            "stated",
        ),
    ],
)
def test_shapes_tell_the_layout_that_a_file_does_not_state(
    cell: Cell, layout: str, prepacked: int | None, target: str, verdict: str, reason: str
) -> None:
    found = judged(cell.direct(layout, weights_prepacked=prepacked), target)
    assert (found.verdict, found.reason) == (verdict, reason)


def test_projections_in_two_layouts() -> None:
    model = INT4.direct()
    other = INT4.direct("cutlass_sm80").graph.initializers["fc2_experts_weights"].const_value
    assert other is not None
    replaced(model, "fc2_experts_weights", lambda _: other.numpy())
    found = judged(model, "cuda")
    assert (found.verdict, found.reason) == (
        GARBAGE,
        "the CUDA provider takes the bytes for raw ones, as weights_prepacked=0; "
        "their shape says one layout in fc1 and another in fc2",
    )


@pytest.mark.parametrize(
    ("cell", "layout", "verdict", "before", "after"),
    [
        (
            INT4,
            "cutlass_sm80",
            UNKNOWN,
            f"{CPU_RAW}weights_prepacked=1; their shape says cutlass_sm80",
            "it is right",
        ),
        (
            INT4,
            "raw",
            UNKNOWN,
            "it is right",
            "the CPU provider takes the bytes for cutlass_sm80 ones, as weights_prepacked=1; "
            "their shape says raw",
        ),
        (
            RELU,
            "cutlass_sm80",
            GARBAGE,
            f"{CPU_RAW}weights_prepacked=1; their shape says cutlass_sm80",
            "the CPU provider has no kernel for activation 'relu' (it has swiglu)",
        ),
    ],
)
def test_packed_integers_depend_on_the_version_of_the_cpu_provider(
    cell: Cell, layout: str, verdict: str, before: str, after: str
) -> None:
    """The first of them is computed with 1.32, the second was with 1.31."""
    found = judged(cell.direct(layout, weights_prepacked=1), "cpu")
    assert found.verdict == verdict
    assert found.reason == f"before ONNX Runtime 1.32, {before}; from then on, {after}"


# --- Routing -------------------------------------------------------------------------------------


def routed(make: Callable[[Graph, ir.Value], ir.Value]) -> Model:
    """Returns a QMoE whose `router_weights` are made from `router_probs`."""
    model = INT4.but(normalize=0).direct()
    node, graph = the_node(model), Graph()
    logits = node.inputs[1]
    assert logits is not None
    given = {**ops.inputs(node), "router_weights": make(graph, logits)}
    twin = ir.node("QMoE", ops.slots("QMoE", given), domain=ops.DOMAIN)
    twin.attributes.update(node.attributes)
    twin.outputs[0].name = "routed"
    ir.convenience.replace_nodes_and_values(
        model.graph, node, [node], [*graph.nodes, twin], node.outputs, twin.outputs
    )
    return model


def softmax(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.op("Softmax", logits, out="weights", axis=-1)


def cast_softmax(graph: Graph, logits: ir.Value) -> ir.Value:
    wide = graph.op("Cast", logits, out="wide", to=ir.DataType.FLOAT)
    weights = graph.op("Softmax", wide, out="wide_weights", axis=1)
    return graph.op("Cast", weights, out="weights", to=ir.DataType.FLOAT16)


def softmax_of_experts(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.op("Softmax", logits, out="weights", axis=0)


def sigmoid(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.op("Sigmoid", logits, out="weights")


def constant(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.weight("weights", np.ones((6, 4), np.float16))


def from_outside(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.input("weights", np.float16, ("tokens", 4))


@pytest.mark.parametrize(
    ("make", "cuda"),
    [
        (softmax, RIGHT),
        (cast_softmax, RIGHT),
        (softmax_of_experts, GARBAGE),
        (sigmoid, GARBAGE),
        (constant, GARBAGE),
        (from_outside, UNKNOWN),
    ],
)
def test_router_weights_that_cuda_never_reads(make: Any, cuda: str) -> None:
    model = routed(make)
    assert judged(model, "cuda").verdict == cuda
    assert judged(model, "cpu").verdict == RIGHT
    assert judged(model, "portable").verdict == cuda


@pytest.mark.parametrize(
    ("format", "layout", "verdict"),
    [("int4", "raw", GARBAGE), ("mxfp4", "k_packed", RIGHT), ("int3", "raw", RIGHT)],
)
def test_only_the_old_kernel_of_the_cpu_ignores_normalize(
    format: str, layout: str, verdict: str
) -> None:
    cell = Cell(format, block_size=32, normalize=0)
    assert judged(cell.direct(layout), "cpu").verdict == verdict
    every_expert = cell.but(k=4)  # all of them together: there is nothing to renormalize
    assert judged(every_expert.direct(layout), "cpu").verdict == RIGHT


def test_a_softmax_in_front_of_the_router_is_noted() -> None:
    model = INT4.direct()
    node = the_node(model)
    logits = node.inputs[1]
    assert logits is not None
    node.replace_input_with(1, ir.node("Softmax", [logits]).outputs[0])
    found = judged(model, "portable")
    assert found.verdict == RIGHT
    assert found.notes[-1].startswith("router_probs comes from a Softmax")


# --- What providers differ in --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "changes", "target", "verdict", "reason"),
    [
        (
            INT4.but(block_size=16),
            {},
            "portable",
            REFUSED,
            "the CUDA provider does not take block_size=16 with int4 (it takes 0, 32, 64, 128, "
            "256)",
        ),
        (
            Cell("int4", block_size=64, symmetric=False, hidden=128, inter=192),
            {},
            "cuda",
            GARBAGE,
            "the CUDA provider misreads the zero points of an odd number of blocks, and K=192 has "
            "3 of block_size=64",
        ),
        (
            INT4.but(fc2_format="int8"),
            {},
            "portable",
            REFUSED,
            "the CPU provider does not take int4 in fc1 and int8 in fc2",
        ),
        (INT4.but(fc2_format="int8"), {}, "cuda", RIGHT, ""),
        (
            INT4.but(fc2_format="int8", fusion=2),
            {},
            "cuda",
            GARBAGE,
            "the CUDA provider may misread swiglu_fusion=2 with float16 and int4 and int8, by the "
            "kernel it picks",
        ),
        (INT8, {"block_size": -1}, "cuda", RIGHT, ""),
        (
            INT8,
            {"block_size": -1},
            "webgpu",
            GARBAGE,
            "the WebGPU provider takes block_size=-1 for the size of a block",
        ),
        (
            INT4.but(block_size=512, hidden=512, inter=512),
            {},
            "cuda",
            UNKNOWN,
            "the CUDA provider does not take block_size=512 with int4 (it takes 0, 32, 64, 128, "
            "256)",
        ),
        (
            INT4.but(block_size=128, hidden=128, inter=128, limit=7.0),
            {"weights_prepacked": None},
            "trt-rtx",
            UNKNOWN,  # its scales are signed, as this library's are
            "the TensorRT-RTX provider does not honour negative scales, as far as is known",
        ),
    ],
)
def test_reasons(
    cell: Cell, changes: Mapping[str, Any], target: str, verdict: str, reason: str
) -> None:
    found = judged(cell.direct(**changes), target)
    assert (found.verdict, found.reason) == (verdict, reason)


def test_cuda_misreads_mxfp4_of_other_sizes() -> None:
    found = judged(MXFP4.but(hidden=96).direct("n_packed"), "cuda")
    assert (found.verdict, found.reason) == (
        GARBAGE,
        "the CUDA provider needs hidden and inter sizes divisible by 64, and they are 96 and 192",
    )


def test_positive_scales_are_known_to_tensorrt_rtx() -> None:
    cell = Cell("int4", block_size=128, hidden=128, inter=128, limit=7.0)
    model = cell.direct(weights_prepacked=None)
    for slot in ("fc1_scales", "fc2_scales"):
        replaced(model, slot, np.abs)
    assert judged(model, "trt-rtx").verdict == RIGHT
    del the_node(model).attributes["swiglu_limit"]
    found = judged(model, "trt-rtx")
    assert found.verdict == UNKNOWN
    assert found.remedy == (
        "set swiglu_limit to infinity; or it is right as it stands for cpu, webgpu"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"fusion": 2}, {"activation": "geglu"}])
@pytest.mark.parametrize("target", ["cuda", "webgpu"])
def test_moe(target: str, fields: dict[str, Any], dtype: str) -> None:
    found = judged(Cell(dtype=dtype, **fields).float_model(), target)
    if target == "webgpu":
        refused = dtype == "bfloat16" or "activation" in fields
        assert found.verdict == (REFUSED if refused else RIGHT)
    else:
        halves = "fusion" in fields and dtype != "float32"
        assert found.verdict == (GARBAGE if halves else RIGHT)


def test_moe_of_tensorrt_rtx_is_unknown() -> None:
    found = judged(Cell().float_model(), "trt-rtx")
    assert (found.verdict, found.reason) == (
        UNKNOWN,
        "what the TensorRT-RTX provider does with MoE is not known",
    )


@pytest.mark.parametrize(
    ("model", "notes"),
    [
        (INT4.direct(), ()),
        (
            INT4.but(dtype="float32").direct(),
            ("the CUDA provider has no float32 kernel: ONNX Runtime runs such nodes on the CPU",),
        ),
        (
            INT4.but(activation="geglu").direct(),
            ("the CUDA provider loads geglu from ONNX Runtime 1.32 on",),
        ),
        (Cell(dtype="float32").float_model(), ()),
    ],
    ids=["int4", "float32", "geglu", "MoE"],
)
def test_notes(model: Model, notes: tuple[str, ...]) -> None:
    assert judged(model, "cuda") == Audit(RIGHT, notes=notes)


# --- What the file does not tell -----------------------------------------------------------------


def in_a_function() -> ir.Node:
    """Returns a QMoE whose inputs have neither shapes nor types."""
    inputs = [ir.val(f"v{index}") for index in range(8)]
    return ir.node("QMoE", inputs, {"k": 2}, domain=ops.DOMAIN)


def test_a_node_whose_shapes_are_not_known() -> None:
    for target in TARGETS:
        found = audit(in_a_function(), target)
        assert (found.verdict, found.reason) == (
            UNKNOWN,
            "fc1_experts_weights: its shape is not known",
        )


def test_an_attribute_that_the_caller_gives() -> None:
    node = the_node(INT4.direct())
    node.attributes["k"] = ir.RefAttr("k", "experts_per_token", ir.AttributeType.INT)
    found = audit(node, "cpu")
    assert (found.verdict, found.reason) == (
        UNKNOWN,
        "attribute k is what the caller of the function gives",
    )


def test_a_node_whose_type_is_not_known() -> None:
    node = the_node(MXFP4.but(bias=False).direct("n_packed"))
    for value in (*node.inputs[:2], *node.outputs):
        assert value is not None
        value.type = None
    node.inputs[3].type = None  # type: ignore[union-attr]
    found = audit(node, "cuda")
    assert (found.verdict, found.reason) == (UNKNOWN, "the type of its input is not known")


def test_the_scales_of_integers_tell_the_type() -> None:
    node = the_node(INT4.but(dtype="bfloat16", bias=False).direct())
    for value in (*node.inputs[:2], *node.outputs):
        assert value is not None
        value.type = None
    assert audit(node, "cuda").verdict == RIGHT
    assert "has no bfloat16 kernel" in audit(node, "cpu").reason


def test_weights_that_other_nodes_compute() -> None:
    """CUDA repacks raw ones at load time, and cannot where they are not there yet."""
    model = INT4.direct()
    node = the_node(model)
    stored = node.inputs[2]
    assert stored is not None
    computed = ir.node("Abs", [stored]).outputs[0]
    computed.type, computed.shape = stored.type, stored.shape
    node.replace_input_with(2, computed)
    assert audit(node, "cpu").verdict == RIGHT
    found = audit(node, "cuda")
    assert found.verdict == REFUSED
    assert found.remedy.startswith("fold the weights into constants")


# --- The library's own nodes ---------------------------------------------------------------------

CELLS = st.builds(
    Cell,
    format=st.sampled_from(["int2", "int3", "int4", "int8"]),
    fc2_format=st.sampled_from([None, None, "int8", "int4"]),
    block_size=st.sampled_from([0, 16, 32, 64]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    activation=st.sampled_from(["swiglu", "geglu", "silu"]),
    fusion=st.sampled_from([1, 2]),
    bias=st.booleans(),
    normalize=st.sampled_from([0, 1]),
    sparse_mixer=st.sampled_from([0, 0, 0, 1]),
    limit=st.sampled_from([None, 7.0]),
    hidden=st.sampled_from([64, 96, 128]),
    inter=st.sampled_from([64, 192]),
) | st.builds(
    lambda form, **fields: form.but(**fields),
    st.sampled_from([MXFP4, NVFP4, Cell("fp8", block_size=128), Cell("fp8")]),
    dtype=st.sampled_from(["float32", "float16"]),
    hidden=st.sampled_from([64, 96, 128]),
)


@given(cell=CELLS, target=st.sampled_from(sorted(TARGETS)))
@settings(max_examples=150)
def test_whatever_the_rules_make_for_a_target_is_right_there(cell: Cell, target: str) -> None:
    made = cell.convert(target)
    if not isinstance(made, str):
        found = judged(made, target)
        assert (found.verdict, found.reason) == (RIGHT, "")


def test_the_property_sees_both_sides() -> None:
    assert isinstance(INT4.convert("portable"), ir.Model)
    assert isinstance(INT4.but(block_size=16).convert("portable"), str)
