"""The audit and the layout of the bytes, which their shape tells where the file does not."""

from __future__ import annotations

import pytest

from qmoe_rules.kernels import GARBAGE, REFUSED, RIGHT, UNKNOWN
from tests.audits import INT4, INT8, MXFP4, NVFP4, RELU, SQUARE, judged, replaced
from tests.contract import Cell

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
