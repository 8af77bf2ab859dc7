"""Reading a QMoE node back: whatever the layout, and no guess where the node does not state it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.recipe import Recipe
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from qmoe_rules.stored import StoredProjection, layout_of, stored_projections
from tests.moe_models import Experts, single, the_node
from tests.qmoe_models import Codes, meant, spec_of

SILENT = (
    "weights_prepacked is not stated, so the layout of its bytes is unknown; "
    "source_layout='raw' says that a CPU build wrote them, 'cutlass_sm80' a CUDA build"
)


def read(codes: Codes, source_layout: str | None = None, **attributes: Any) -> Any:
    return stored_projections(the_node(codes.model(**attributes)), source_layout)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize(
    ("bits", "block", "layout"),
    [(bits, block, "raw") for bits in (2, 3, 4, 8) for block in (0, 32, 64)]
    + [(bits, block, "cutlass_sm80") for bits in (2, 4, 8) for block in (0, 32, 64)],
)
def test_every_expert_is_read_back(
    bits: int, block: int, layout: str, zero_points: bool, dtype: Any
) -> None:
    codes = Codes(Experts(dtype=dtype), spec_of(bits, block), None, zero_points, layout)
    found = read(codes)
    for name, weight in codes.weights().items():
        projection = found[name]
        assert isinstance(projection, StoredProjection)
        assert (projection.shape, projection.bits) == (weight.codes.shape, bits)
        assert (projection.spec, projection.layout) == (weight.spec, LAYOUTS[layout])
        for index in range(projection.shape[0]):
            expert = projection.expert(index)
            np.testing.assert_array_equal(expert.packed, weight.packed[index])
            np.testing.assert_array_equal(expert.scales, weight.scales[index])
            assert (expert.zero_points is None) is (weight.zero_points is None)
            if weight.zero_points is not None:
                np.testing.assert_array_equal(expert.zero_points, weight.zero_points[index])
            projection.release(index)
        assert projection.dtype == np.dtype(dtype)
        dequantized = projection.dequantized(np.dtype(dtype))
        np.testing.assert_array_equal(dequantized.read(1, 3), meant(weight)[1:3])
        dequantized.release(1, 3)


@pytest.mark.parametrize(
    "codes",
    [
        # 97 rows of fc2: its columns must fill bytes, its rows need not.
        Codes(Experts(hidden=97, activation="relu"), spec_of(8), spec_of(4), zero_points=True),
        # 3 and 5 blocks in a row.
        Codes(Experts(hidden=96, inter=160), spec_of(4, 32), zero_points=True),
    ],
    ids=["rows", "blocks"],
)
def test_zero_points_that_end_inside_a_byte(codes: Codes) -> None:
    found = read(codes)
    for name, weight in codes.weights().items():
        dequantized = found[name].dequantized(np.dtype(np.float32))
        np.testing.assert_array_equal(dequantized.read(0, 3), meant(weight))


FLOATING = [
    (Spec(FORMATS["mxfp4"], 32), "n_packed"),
    (Spec(FORMATS["mxfp4"], 32), "k_packed"),
    (Spec(FORMATS["nvfp4"], 16), "n_packed"),
    (Spec(FORMATS["nvfp4"], 16), "k_packed"),
    (Spec(FORMATS["fp8"], 128), "raw"),
    (Spec(FORMATS["fp8"], 32), "raw"),
    (Spec(FORMATS["fp8"]), "raw"),
]


@pytest.mark.parametrize(("spec", "layout"), FLOATING, ids=str)
def test_every_expert_of_floating_point_codes_is_read_back(spec: Spec, layout: str) -> None:
    codes = Codes(Experts(dtype=np.float16), spec, layout=layout)
    found = read(codes)
    for name, weight in codes.weights().items():
        projection = found[name]
        assert isinstance(projection, StoredProjection)
        assert (projection.shape, projection.bits) == (weight.codes.shape, spec.format.bits)
        assert (projection.spec, projection.layout) == (spec, LAYOUTS[layout])
        assert projection.dtype is None  # the scales do not tell
        for index in range(projection.shape[0]):
            expert = projection.expert(index)
            np.testing.assert_array_equal(expert.packed, weight.packed[index])
            np.testing.assert_array_equal(expert.dequantize(), weight.dequantize()[index])
        dequantized = projection.dequantized(np.dtype(np.float16)).read(1, 3)
        assert dequantized.dtype == np.float16
        np.testing.assert_array_equal(dequantized, weight.dequantize()[1:3].astype(np.float16))


@pytest.mark.parametrize(
    ("codes", "attributes", "reason"),
    [
        (
            Codes(fc1=Spec(FORMATS["mxfp4"], 32), layout="n_packed"),
            {"quant_type": "wfp4afp8"},
            "fc1 has 4-bit codes of quant_type='wfp4afp8'; known are "
            "int2, int3, int4, int8, mxfp4, nvfp4, fp8",
        ),
        (
            Codes(),
            {"expert_weight_bits": 5},
            "fc1 has 5-bit codes of quant_type='int'; known are "
            "int2, int3, int4, int8, mxfp4, nvfp4, fp8",
        ),
        (
            Codes(fc1=Spec(FORMATS["fp8"], 128)),
            {"weights_prepacked": 1},
            "weights_prepacked=1 with quant_type='fp8' is unknown",
        ),
        (
            Codes(fc1=Spec(FORMATS["mxfp4"], 32), layout="n_packed"),
            {"quant_type": "nvfp4"},
            "fc1_scales is [3, 384, 4]; weights [N=384, K=128] stored as nvfp4 block 16 in layout "
            "n_packed ask for [3, 384, 8]",
        ),
        (
            Codes(fc1=Spec(FORMATS["mxfp4"], 32), layout="n_packed"),
            {"weights_prepacked": 1},
            "fc1_scales is [3, 384, 4]; weights [N=128, K=384] stored as mxfp4 block 32 in layout "
            "k_packed ask for [3, 128, 12]",
        ),
    ],
)
def test_what_a_node_says_must_fit_what_it_holds(
    codes: Codes, attributes: dict[str, Any], reason: str
) -> None:
    assert read(codes, **attributes) == reason


def test_a_planned_node_is_read_expert_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    model = single(Experts(experts=5))
    recipe = Recipe(block_size=32)
    apply_rules(model, moe_to_qmoe_rules(recipe))
    projection = StoredProjection.of(the_node(model), "fc1")
    assert isinstance(projection, StoredProjection)

    def refuse(self: ir.LazyTensor) -> None:
        raise AssertionError("the whole tensor was computed")

    monkeypatch.setattr(ir.LazyTensor, "numpy", refuse)
    expert = projection.expert(3)
    assert expert.packed.shape == (384, 64)
    projection.release(3)
    assert projection.slices["weights"].tensors  # the float weights, for whoever guards their file


@pytest.mark.parametrize(
    ("stated", "source_layout", "expected"),
    [
        (0, None, "raw"),
        (1, None, "cutlass_sm80"),
        (0, "raw", "raw"),
        (1, "cutlass_sm80", "cutlass_sm80"),
        (None, "raw", "raw"),
        (-1, "cutlass_sm80", "cutlass_sm80"),
    ],
)
def test_the_layout_is_stated_by_the_node_or_by_the_caller(
    stated: int | None, source_layout: str | None, expected: str
) -> None:
    node = the_node(Codes().model(weights_prepacked=stated))
    assert layout_of(node, source_layout) is LAYOUTS[expected]


@pytest.mark.parametrize(
    ("stated", "source_layout", "reason"),
    [
        (None, None, SILENT),
        (-1, None, SILENT),
        (2, "raw", "weights_prepacked=2 is unknown"),
        (0, "cutlass_sm80", "weights_prepacked=0 says raw, and source_layout='cutlass_sm80'"),
        (1, "raw", "weights_prepacked=1 says cutlass_sm80, and source_layout='raw'"),
    ],
)
def test_no_layout_is_guessed(stated: int | None, source_layout: str | None, reason: str) -> None:
    node = the_node(Codes().model(weights_prepacked=stated))
    assert layout_of(node, source_layout) == reason
    assert StoredProjection.of(node, "fc2", source_layout) == reason
    assert stored_projections(node, source_layout) == reason


@pytest.mark.parametrize(
    ("written", "claimed", "reason"),
    [
        (
            "raw",
            "cutlass_sm80",
            "fc1_scales is [3, 384]; weights [N=128, K=384] stored as int4 row in layout "
            "cutlass_sm80 ask for [3, 128]",
        ),
        (
            "cutlass_sm80",
            "raw",
            "fc1_scales is [3, 384]; weights [N=128, K=384] stored as int4 row in layout raw "
            "ask for [3, 128]",
        ),
    ],
)
def test_shapes_that_contradict_the_claim(written: str, claimed: str, reason: str) -> None:
    assert read(Codes(layout=written), claimed, weights_prepacked=None) == reason


def test_square_weights_are_believed() -> None:
    """Their shape is the same in both layouts, so that only the caller can know."""
    square = Codes(Experts(hidden=128, inter=128, activation="relu"))
    for layout in ("raw", "cutlass_sm80"):
        assert read(square, layout, weights_prepacked=None)["fc1"].layout.name == layout
