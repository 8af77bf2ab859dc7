"""The audit's verdict on a node is what the CPU provider makes of it, and CUDA was measured to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.kernels import GARBAGE, REFUSED, RIGHT, UNKNOWN
from tests.audits import INT4, INT8, MXFP4, NVFP4, RELU, Model, judged, outcome, replaced, the_node
from tests.contract import Cell
from tests.gpu import case as gpu
from tests.gpu.cases import cases

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
