"""Number formats: the meaning of codes, their order in bytes, and the shapes that follow."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec, pack, unpack

Codes = npt.NDArray[np.uint8]

INT4, INT8 = FORMATS["int4"], FORMATS["int8"]
WIDTHS = (1, 2, 4, 8)


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[Codes, int]:
    """Codes of some width whose last axis fills whole bytes, with any leading axes."""
    bits = draw(st.sampled_from(WIDTHS))
    leading = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    row_bytes = draw(st.integers(0, 9))
    shape = (*leading, row_bytes * 8 // bits)
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))), bits


def test_the_formats_are_int4_and_int8() -> None:
    facts = {
        name: (f.name, f.bits, f.zero_point, f.max_code, f.codes_per_byte)
        for name, f in FORMATS.items()
    }
    assert facts == {"int4": ("int4", 4, 8, 15, 2), "int8": ("int8", 8, 128, 255, 1)}


def test_scale_dtypes_carry_their_own_names_and_sizes() -> None:
    assert {name: dtype.itemsize for name, dtype in SCALE_DTYPES.items()} == {
        "float32": 4,
        "float16": 2,
        "bfloat16": 2,
    }
    assert all(dtype.name == name for name, dtype in SCALE_DTYPES.items())


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1], [0b00000001, 0b10000110]),
        (2, [1, 0, 2, 3, 3, 2, 1, 0], [0b11_10_00_01, 0b00_01_10_11]),
        (4, [0x1, 0x2, 0x3, 0xF, 0x0, 0x8], [0x21, 0xF3, 0x80]),
        (8, [0, 7, 255], [0, 7, 255]),
    ],
)
def test_the_low_bits_of_a_byte_hold_the_lower_k(
    bits: int, codes: list[int], packed: list[int]
) -> None:
    assert pack(np.array(codes, np.uint8), bits).tolist() == packed
    assert unpack(np.array(packed, np.uint8), bits).tolist() == codes


@settings(max_examples=80, deadline=None)
@given(codes_and_bits())
def test_unpack_inverts_pack(drawn: tuple[Codes, int]) -> None:
    codes, bits = drawn
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (*codes.shape[:-1], codes.shape[-1] * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_holds_its_own_codes(bits: int) -> None:
    """All 256 bytes: unpacking gives the base-2^bits digits, lowest first, and packs back."""
    every_byte = np.arange(256, dtype=np.uint8)[:, None]
    codes = unpack(every_byte, bits)
    digits = [[byte >> shift & (2**bits - 1) for shift in range(0, 8, bits)] for byte in range(256)]
    assert codes.tolist() == digits
    np.testing.assert_array_equal(pack(codes, bits), every_byte)


@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_reads_strided_codes_and_leaves_them_alone(bits: int) -> None:
    base = np.random.default_rng(0).integers(0, 2**bits, (16, 6), dtype=np.uint8)
    before = base.copy()
    packed = pack(base.T, bits)  # the packed axis is the strided one
    np.testing.assert_array_equal(packed, pack(np.ascontiguousarray(base.T), bits))
    packed[:] = 0xAA
    np.testing.assert_array_equal(base, before)


@pytest.mark.parametrize(
    ("spec", "packed", "scales", "blocks"),
    [
        (Spec(INT4), (96, 64), (96,), 1),
        (Spec(INT4, 32), (96, 64), (96, 4), 4),
        (Spec(INT4, 128), (96, 64), (96, 1), 1),  # one block keeps its axis, unlike one row
        (Spec(INT8), (96, 128), (96,), 1),
        (Spec(INT8, 16), (96, 128), (96, 8), 8),
    ],
)
def test_stored_shapes_of_a_96_by_128_weight(
    spec: Spec, packed: tuple[int, int], scales: tuple[int, ...], blocks: int
) -> None:
    assert spec.packed_shape(96, 128) == packed
    assert spec.scales_shape(96, 128) == scales
    assert spec.blocks(128) == blocks


@pytest.mark.parametrize(
    ("spec", "rows", "columns", "reason"),
    [
        (Spec(INT4), 0, 64, "weight [N=0, K=64] is empty"),
        (Spec(INT8, 32), 64, 0, "weight [N=64, K=0] is empty"),
        (
            Spec(INT4),
            8,
            33,
            "K=33 does not fill whole bytes of 4-bit codes (a multiple of 2 would)",
        ),
        (Spec(INT4, 32), 8, 48, "K=48 is not divisible by block_size=32"),
        (Spec(INT8, 64), 8, 96, "K=96 is not divisible by block_size=64"),
    ],
)
def test_shapes_that_cannot_be_stored_are_refused_with_the_reason(
    spec: Spec, rows: int, columns: int, reason: str
) -> None:
    assert spec.refuse_shape(rows, columns) == reason


@pytest.mark.parametrize(
    ("spec", "rows", "columns"),
    [(Spec(INT4), 1, 2), (Spec(INT4, 16), 3, 48), (Spec(INT8), 5, 33), (Spec(INT8, 32), 1, 32)],
)
def test_smallest_and_odd_shapes_that_fit_are_taken(spec: Spec, rows: int, columns: int) -> None:
    assert spec.refuse_shape(rows, columns) is None


def test_a_spec_reads_as_users_would_say_it() -> None:
    assert [str(Spec(INT4)), str(Spec(INT8, 64))] == ["int4 row", "int8 block 64"]


def test_formats_and_specs_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        INT4.bits = 8  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Spec(INT4).block_size = 32  # type: ignore[misc]
