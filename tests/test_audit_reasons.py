"""What the audit says where providers differ, and where the file does not tell enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import ops
from qmoe_rules.audit import Audit, audit
from qmoe_rules.kernels import GARBAGE, REFUSED, RIGHT, UNKNOWN
from qmoe_rules.providers import TARGETS
from tests.audits import INT4, INT8, MXFP4, Model, judged, replaced, the_node
from tests.contract import Cell

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
