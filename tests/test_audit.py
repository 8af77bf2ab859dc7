"""The audit: its verdict on a node is what ONNX Runtime then makes of it, and its remedies mend."""

from __future__ import annotations

import dataclasses
import functools
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
from qmoe_rules.formats import FORMATS
from qmoe_rules.kernels import GARBAGE, REFUSED, RIGHT, UNKNOWN
from qmoe_rules.loading import load, locate
from qmoe_rules.passes import QuantizeMoEPass
from qmoe_rules.providers import TARGETS
from qmoe_rules.rules import (
    apply_rules,
    normalize_moe_rules,
    qmoe_to_moe_rules,
    relayout_qmoe_rules,
)
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
    tensor = ir.tensor(np.ascontiguousarray(change(value.const_value.numpy())), name=slot)
    value.const_value, value.shape, value.dtype = tensor, ir.Shape(tensor.shape), tensor.dtype
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
        (lambda m: replaced(m, "fc1_scales", lambda a: a.astype(np.float32)), RIGHT),
    ],
    ids=["blocks", "rows", "fc2", "experts", "bias", "type", "type of scales"],
)
def test_shapes_and_types_are_those_that_the_cpu_provider_takes(
    alter: Callable[[Model], Model], verdict: str
) -> None:
    model = alter(INT4.direct())
    scales = model.graph.initializers["fc1_scales"], model.graph.initializers["fc2_scales"]
    if verdict == RIGHT:  # the schema wants the scales of both projections alike
        replaced(model, "fc2_scales", lambda a: a.astype(scales[0].const_value.numpy().dtype))
    assert judged(model, "cpu").verdict == outcome(model, INT4, INT4.expected()) == verdict


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

# What a file cannot tell, or where the table was measured with another question.
_UNTOLD = {
    "cutlass-sm90": RIGHT,  # the same shape as cutlass_sm80
    "k-packed-bytes-declared-e-k-n-2": {"mxfp4": RIGHT, "nvfp4": UNKNOWN},  # that of n_packed
    "nvfp4-block-16-n-packed-weights-prepacked=1": UNKNOWN,  # 1.32 reads it as k_packed
    "nvfp4-block-16-k-packed-bytes-declared-e-n-k-2": UNKNOWN,
    "swiglu-fusion=0": UNKNOWN,  # interleaved, as the case was made
    "sparse-mixer=1": GARBAGE,  # the case expects ordinary routing
    "router-weights-given": GARBAGE,  # the case expects them to be passed over
    "activation=geglu": RIGHT,  # from 1.32 on, says a note
    # The session of these may not hand nodes to the CPU provider; by default it does.
    "dtype=float32": {"types": RIGHT},
    # Right from 1.32's CPU provider on.
    "cutlass-sm80-fallback": UNKNOWN,
}


def test_the_cuda_provider_did_what_the_audit_says() -> None:
    meant = {gpu.RIGHT: RIGHT, gpu.REFUSED: REFUSED, gpu.GARBAGE: GARBAGE}
    wrong = {}
    for case in cases():
        said = [value for mark, value in _UNTOLD.items() if mark in case.name]
        untold = [
            verdict
            for value in said
            for verdict in (
                [value]
                if isinstance(value, str)
                else [v for part, v in value.items() if part in case.name]
            )
        ]
        found = judged(case.made()[0], "cuda")
        if found.verdict not in (untold or [meant[case.verdicts]]):
            wrong[case.name] = (found.verdict, found.reason, case.verdicts)
    assert wrong == {}
    assert len(cases()) > 200
