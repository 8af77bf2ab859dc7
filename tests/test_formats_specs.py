"""Shapes and types of what is stored in a format, and what cannot be."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Format, Spec

INT2, INT3, INT4, INT8 = (FORMATS[f"int{bits}"] for bits in (2, 3, 4, 8))
MXFP4, NVFP4, FP8 = FORMATS["mxfp4"], FORMATS["nvfp4"], FORMATS["fp8"]
INTEGERS = [format for format in FORMATS.values() if format.element is None]


@pytest.mark.parametrize(
    ("spec", "packed", "scales", "blocks"),
    [
        (Spec(INT4), (96, 64), (96,), 1),
        (Spec(INT4, 32), (96, 64), (96, 4), 4),
        (Spec(INT4, 128), (96, 64), (96, 1), 1),  # one block keeps its axis, unlike one row
        (Spec(INT8), (96, 128), (96,), 1),
        (Spec(INT8, 16), (96, 128), (96, 8), 8),
        (Spec(INT2, 64), (96, 32), (96, 2), 2),
        (Spec(INT3, 32), (96, 48), (96, 4), 4),
        (Spec(MXFP4, 32), (96, 64), (96, 4), 4),
        (Spec(NVFP4, 16), (96, 64), (96, 8), 8),
        (Spec(FP8, 128), (96, 128), (1, 1), 1),
        (Spec(FP8, 64), (96, 128), (2, 2), 2),  # the last square is half full
        (Spec(FP8), (96, 128), (), 1),
    ],
)
def test_stored_shapes_of_a_96_by_128_weight(
    spec: Spec, packed: tuple[int, int], scales: tuple[int, ...], blocks: int
) -> None:
    assert spec.refuse() is None
    assert spec.refuse_shape(96, 128) is None
    assert spec.packed_shape(96, 128) == packed
    assert spec.scales_shape(96, 128) == scales
    assert spec.blocks(128) == blocks


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (Spec(INT4), {"weights": ((96, 80), "uint8"), "scales": ((96,), "float16")}),
        (
            # Points of rows are packed along the rows, points of blocks along the blocks.
            Spec(INT4, symmetric=False),
            {
                "weights": ((96, 80), "uint8"),
                "scales": ((96,), "float16"),
                "zero_points": ((48,), "uint8"),
            },
        ),
        (
            Spec(INT4, 32, symmetric=False),
            {
                "weights": ((96, 80), "uint8"),
                "scales": ((96, 5), "float16"),
                "zero_points": ((96, 3), "uint8"),
            },
        ),
        (
            Spec(INT2, 32, symmetric=False),
            {
                "weights": ((96, 40), "uint8"),
                "scales": ((96, 5), "float16"),
                "zero_points": ((96, 2), "uint8"),
            },
        ),
        (
            Spec(INT3, 32, symmetric=False),
            {
                "weights": ((96, 60), "uint8"),
                "scales": ((96, 5), "float16"),
                "zero_points": ((96, 2), "uint8"),
            },
        ),
        (
            Spec(INT8, 32, symmetric=False),
            {
                "weights": ((96, 160), "uint8"),
                "scales": ((96, 5), "float16"),
                "zero_points": ((96, 5), "uint8"),
            },
        ),
        (
            Spec(MXFP4, 32),
            {
                "weights": ((96, 80), "uint8"),
                "scales": ((96, 5), "float8_e8m0fnu"),
                "global_scale": ((), "float32"),
            },
        ),
        (
            Spec(NVFP4, 16),
            {
                "weights": ((96, 80), "uint8"),
                "scales": ((96, 10), "float8_e4m3fn"),
                "global_scale": ((), "float32"),
            },
        ),
        (Spec(FP8, 128), {"weights": ((96, 160), "float8_e4m3fn"), "scales": ((1, 2), "float32")}),
        (Spec(FP8), {"weights": ((96, 160), "float8_e4m3fn"), "global_scale": ((), "float32")}),
    ],
    ids=str,
)
def test_what_is_stored_of_a_96_by_160_weight_in_float16(
    spec: Spec, parts: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    found = spec.parts(96, 160, np.dtype(np.float16))
    assert {part: (shape, dtype.name) for part, (shape, dtype) in found.items()} == parts


@pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=str)
@pytest.mark.parametrize("format", INTEGERS, ids=lambda f: f.name)
def test_scales_of_integers_have_the_activations_type(format: Format, dtype: np.dtype) -> None:
    assert Spec(format, 32).parts(8, 64, dtype)["scales"] == ((8, 2), dtype)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (Spec(MXFP4), "mxfp4 has blocks of 32 columns, not block_size=0"),
        (Spec(MXFP4, 16), "mxfp4 has blocks of 32 columns, not block_size=16"),
        (Spec(NVFP4, 32), "nvfp4 has blocks of 16 columns, not block_size=32"),
        (
            Spec(FP8, 128, symmetric=False),
            "fp8 has floating-point codes, which have no zero points",
        ),
        (
            Spec(MXFP4, 32, symmetric=False),
            "mxfp4 has floating-point codes, which have no zero points",
        ),
    ],
)
def test_specs_that_mean_nothing_are_refused_with_the_reason(spec: Spec, reason: str) -> None:
    assert spec.refuse() == reason


@pytest.mark.parametrize(
    ("spec", "rows", "columns", "reason"),
    [
        (Spec(INT4), 0, 64, "weight [N=0, K=64] is empty"),
        (Spec(INT8, 32), 64, 0, "weight [N=64, K=0] is empty"),
        (Spec(FP8), 0, 0, "weight [N=0, K=0] is empty"),
        (
            Spec(INT4),
            8,
            33,
            "K=33 does not fill whole bytes of 4-bit codes (a multiple of 2 would)",
        ),
        (
            Spec(INT2),
            8,
            34,
            "K=34 does not fill whole bytes of 2-bit codes (a multiple of 4 would)",
        ),
        (
            Spec(INT3),
            8,
            36,
            "K=36 does not fill whole bytes of 3-bit codes (a multiple of 8 would)",
        ),
        (Spec(INT4, 32), 8, 48, "K=48 is not divisible by block_size=32"),
        (Spec(INT8, 64), 8, 96, "K=96 is not divisible by block_size=64"),
        (Spec(MXFP4, 32), 8, 48, "K=48 is not divisible by block_size=32"),
        (Spec(NVFP4, 16), 8, 24, "K=24 is not divisible by block_size=16"),
    ],
)
def test_shapes_that_cannot_be_stored_are_refused_with_the_reason(
    spec: Spec, rows: int, columns: int, reason: str
) -> None:
    assert spec.refuse_shape(rows, columns) == reason


@pytest.mark.parametrize(
    ("spec", "rows", "columns"),
    [
        (Spec(INT4), 1, 2),
        (Spec(INT4, 16), 3, 48),
        (Spec(INT8), 5, 33),
        (Spec(INT8, 32), 1, 32),
        (Spec(INT2), 1, 4),
        (Spec(INT3), 1, 8),
        (Spec(FP8, 128), 1, 1),
        (Spec(FP8, 128), 129, 131),
    ],
)
def test_smallest_and_odd_shapes_that_fit_are_taken(spec: Spec, rows: int, columns: int) -> None:
    assert spec.refuse_shape(rows, columns) is None


def test_a_spec_reads_as_users_would_say_it() -> None:
    said = {
        Spec(INT4): "int4 row",
        Spec(INT8, 64): "int8 block 64",
        Spec(INT2, 32, symmetric=False): "int2 asymmetric block 32",
        Spec(MXFP4, 32): "mxfp4 block 32",
        Spec(FP8, 128): "fp8 block 128",
        Spec(FP8): "fp8 expert",
    }
    assert {spec: str(spec) for spec in said} == said


def test_formats_and_specs_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        INT4.bits = 8  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Spec(INT4).block_size = 32  # type: ignore[misc]
