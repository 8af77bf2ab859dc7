"""Remedies: what the audit says would mend a node does mend it."""

from __future__ import annotations

import functools
from typing import Any

import onnx_ir as ir
import pytest

from qmoe_rules.kernels import GARBAGE, REFUSED, RIGHT
from qmoe_rules.passes import QuantizeMoEPass
from qmoe_rules.rules import (
    apply_rules,
    normalize_moe_rules,
    qmoe_to_moe_rules,
    relayout_qmoe_rules,
)
from tests.audits import (
    INT4,
    INT8,
    MXFP4,
    NVFP4,
    RELU,
    SQUARE,
    Alter,
    Model,
    judged,
    outcome,
    routed,
    softmax,
    the_node,
)
from tests.contract import Cell


@pytest.mark.parametrize(
    ("cell", "layout", "prepacked", "target", "call", "rules"),
    [
        (
            INT4,
            "raw",
            None,
            "portable",
            "relayout_qmoe_rules('raw', source_layout='raw')",
            functools.partial(relayout_qmoe_rules, "raw", source_layout="raw"),
        ),
        (
            INT4,
            "cutlass_sm80",
            None,
            "cpu",
            "relayout_qmoe_rules('raw', source_layout='cutlass_sm80')",
            functools.partial(relayout_qmoe_rules, "raw", source_layout="cutlass_sm80"),
        ),
        (
            INT8,
            "cutlass_sm80",
            1,
            "portable",
            "relayout_qmoe_rules('raw')",
            functools.partial(relayout_qmoe_rules, "raw"),
        ),
        (
            SQUARE,
            "raw",
            None,
            "portable",
            "relayout_qmoe_rules('raw', source_layout='raw') where a CPU build wrote the weights, "
            "or source_layout='cutlass_sm80' where a CUDA build did",
            functools.partial(relayout_qmoe_rules, "raw", source_layout="raw"),
        ),
    ],
)
def test_the_call_that_moves_the_bytes_mends_them(
    cell: Cell, layout: str, prepacked: int | None, target: str, call: str, rules: Any
) -> None:
    model = cell.direct(layout, weights_prepacked=prepacked)
    found = judged(model, target)
    assert found.remedy.partition("; or ")[0] == call
    apply_rules(model, rules())
    assert judged(model, target).verdict == RIGHT
    assert outcome(model, cell, cell.expected()) == RIGHT


def test_a_wrong_attribute_is_to_be_set_right() -> None:
    model = INT4.direct("raw", weights_prepacked=1)
    found = judged(model, "cuda")
    assert found.remedy.startswith("set weights_prepacked=0, as the shape of the weights says")
    the_node(model).attributes["weights_prepacked"] = ir.AttrInt64("weights_prepacked", 0)
    assert judged(model, "cuda").verdict == RIGHT


def set_attribute(model: Model, name: str, value: int) -> None:
    the_node(model).attributes[name] = ir.AttrInt64(name, value)


NO_SCALES = dict.fromkeys(("fc1_global_scale", "fc2_global_scale"))


@pytest.mark.parametrize(
    ("model", "target", "remedy", "mend"),
    [
        (
            RELU.direct(swiglu_fusion=1),
            "cpu",
            "set swiglu_fusion=0",
            lambda model: set_attribute(model, "swiglu_fusion", 0),
        ),
        (
            INT4.direct(swiglu_fusion=0),
            "cpu",
            "set swiglu_fusion to 1 (interleaved) or 2 (halves), as the rows of fc1 lie",
            lambda model: set_attribute(model, "swiglu_fusion", 1),
        ),
        (
            INT4.direct(swiglu_fusion=0),
            "cuda",
            "set swiglu_fusion to 1 (interleaved) or 2 (halves), as the rows of fc1 lie",
            lambda model: set_attribute(model, "swiglu_fusion", 2),
        ),
        (
            INT8.direct(block_size=-1),
            "cpu",
            "leave block_size out",
            lambda model: the_node(model).attributes.pop("block_size"),
        ),
    ],
)
def test_what_is_mended_by_hand(model: Model, target: str, remedy: str, mend: Alter) -> None:
    found = judged(model, target)
    assert found.verdict != RIGHT
    assert found.remedy.partition("; or ")[0] == remedy
    mend(model)
    assert judged(model, target).verdict == RIGHT


def test_missing_global_scales() -> None:
    """The CPU provider takes them for ones with mxfp4, and for nothing with nvfp4."""
    mxfp4 = MXFP4.direct("k_packed", extra=NO_SCALES)
    assert judged(mxfp4, "cpu").verdict == outcome(mxfp4, MXFP4, MXFP4.expected()) == RIGHT
    nvfp4 = NVFP4.direct("k_packed", extra=NO_SCALES)
    found = judged(nvfp4, "cpu")
    assert found.verdict == outcome(nvfp4, NVFP4, NVFP4.expected()) == REFUSED
    assert found.remedy == "add fc1_global_scale and fc2_global_scale, all ones"


def test_router_weights_mend_the_routing_of_the_cpu() -> None:
    found = judged(INT4.but(normalize=0).direct(), "portable")
    assert found.remedy == (
        "add the input router_weights = Softmax(router_probs); or it is right as it stands for cuda"
    )
    model, cell = routed(softmax), INT4.but(normalize=0)
    assert judged(model, "portable").verdict == RIGHT
    assert outcome(model, cell, cell.expected()) == RIGHT


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (Cell(dtype="float32").float_model(separate=True), "cpu"),
        (Cell(dtype="float32", fusion=2).float_model(), "portable"),
        (Cell(fusion=2).float_model(), "cuda"),
    ],
    ids=["fc3", "halves", "halves on CUDA"],
)
def test_a_moe_with_its_gate_apart_is_mended_by_interleaving(model: Model, target: str) -> None:
    found = judged(model, target)
    assert found.verdict != RIGHT
    assert found.remedy.startswith("normalize_moe_rules() interleaves gate and linear rows; or ")
    apply_rules(model, normalize_moe_rules())
    assert judged(model, target).verdict == RIGHT


@pytest.mark.parametrize(
    ("cell", "target", "remedy", "fields"),
    [
        (
            INT4.but(block_size=16),
            "portable",
            "qmoe_to_moe_rules(), then quantize with bits=4, block_size=32, target='portable'",
            {"bits": 4, "block_size": 32},
        ),
        (
            Cell("int4", block_size=64, symmetric=False),
            "cuda",
            "qmoe_to_moe_rules(), then quantize with bits=4, block_size=32, symmetric=False, "
            "target='cuda'",
            {"bits": 4, "block_size": 32, "symmetric": False},
        ),
        (
            INT4.but(fc2_format="int8"),
            "portable",
            "qmoe_to_moe_rules(), then quantize with bits=4, block_size=32, target='portable'",
            {"bits": 4, "block_size": 32},
        ),
        (
            INT4.but(fusion=2),
            "cpu",
            "qmoe_to_moe_rules(), then quantize with bits=4, block_size=32, target='cpu'",
            {"bits": 4, "block_size": 32},
        ),
    ],
)
def test_what_is_stored_unfit_can_be_stored_again(
    cell: Cell, target: str, remedy: str, fields: dict[str, Any]
) -> None:
    model = cell.direct()
    found = judged(model, target)
    assert found.verdict != RIGHT
    assert found.remedy.partition("; or ")[0] == remedy
    apply_rules(model, qmoe_to_moe_rules())
    QuantizeMoEPass(target=target, **fields)(model)
    assert judged(model, target).verdict == RIGHT


def test_another_target_may_take_it_as_it_is() -> None:
    found = judged(INT4.but(dtype="bfloat16").direct(), "cpu")
    assert found.remedy == "it is right as it stands for cuda"


def test_floating_point_codes_are_made_anew_from_the_float_model() -> None:
    found = judged(MXFP4.direct("k_packed"), "cuda")
    assert found.verdict == GARBAGE
    assert found.remedy == (
        "quantize with format='mxfp4', target='cuda' from the float model; or it is right as it "
        "stands for cpu"
    )
