"""The order of codes in bytes: a stream of bits, lowest first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qmoe_rules.formats import pack, unpack

Codes = npt.NDArray[np.uint8]
WIDTHS = (1, 2, 3, 4, 8)


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[Codes, int]:
    """Codes of some width whose last axis fills whole bytes, with any leading axes."""
    bits = draw(st.sampled_from(WIDTHS))
    leading = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    row_bytes = draw(st.integers(0, 9)) * (3 if bits == 3 else 1)
    shape = (*leading, row_bytes * 8 // bits)
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))), bits


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1], [0b00000001, 0b10000110]),
        (2, [1, 0, 2, 3, 3, 2, 1, 0], [0b11_10_00_01, 0b00_01_10_11]),
        # The stream of bits of 1, 2, 7, 0, 5, 4, 3, 6, lowest first, cut into bytes.
        (3, [1, 2, 7, 0, 5, 4, 3, 6], [0b11_010_001, 0b0_101_000_1, 0b110_011_10]),
        (4, [0x1, 0x2, 0x3, 0xF, 0x0, 0x8], [0x21, 0xF3, 0x80]),
        (8, [0, 7, 255], [0, 7, 255]),
    ],
)
def test_the_low_bits_of_a_byte_hold_the_lower_k(
    bits: int, codes: list[int], packed: list[int]
) -> None:
    assert pack(np.array(codes, np.uint8), bits).tolist() == packed
    assert unpack(np.array(packed, np.uint8), bits).tolist() == codes


@settings(max_examples=80)
@given(codes_and_bits())
def test_unpack_inverts_pack(drawn: tuple[Codes, int]) -> None:
    codes, bits = drawn
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (*codes.shape[:-1], codes.shape[-1] * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits), codes)


def packed_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """Bit j of code k is bit i = bits * k + j of the stream, which is bit i % 8 of byte i // 8."""
    packed = [0] * (len(codes) * bits // 8)
    for k, code in enumerate(codes):
        for j in range(bits):
            place = bits * k + j
            packed[place // 8] |= (code >> j & 1) << place % 8
    return packed


@settings(max_examples=80)
@given(codes_and_bits())
def test_codes_are_a_stream_of_bits_lowest_first(drawn: tuple[Codes, int]) -> None:
    codes, bits = drawn
    packed = pack(codes, bits)
    for row in np.ndindex(codes.shape[:-1]):
        assert packed[row].tolist() == packed_bit_by_bit(codes[row].tolist(), bits)


@settings(max_examples=80)
@given(st.data())
def test_pack_inverts_unpack(data: st.DataObject) -> None:
    """Any whole bytes that hold whole codes, so that no bit is left over."""
    bits = data.draw(st.sampled_from(WIDTHS))
    *leading, groups = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))
    shape = (*leading, groups * (3 if bits == 3 else 1))
    packed = data.draw(hnp.arrays(np.uint8, shape))
    codes = unpack(packed, bits)
    assert codes.size == packed.size * 8 // bits
    assert codes.max(initial=0) < 2**bits
    np.testing.assert_array_equal(pack(codes, bits), packed)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_byte_holds_its_own_codes(bits: int) -> None:
    """All 256 bytes: unpacking gives the base-2^bits digits, lowest first, and packs back."""
    every_byte = np.arange(256, dtype=np.uint8)[:, None]
    codes = unpack(every_byte, bits)
    digits = [[byte >> shift & (2**bits - 1) for shift in range(0, 8, bits)] for byte in range(256)]
    assert codes.tolist() == digits
    np.testing.assert_array_equal(pack(codes, bits), every_byte)


@pytest.mark.parametrize(
    ("packed", "codes"),
    [([0b11_010_001], [1, 2]), ([0b11_010_001, 0b1_101_000_1], [1, 2, 7, 0, 5])],
)
def test_bits_that_fill_no_code_are_left_out(packed: list[int], codes: list[int]) -> None:
    """As at the end of a row of 3-bit zero points."""
    assert unpack(np.array(packed, np.uint8), 3).tolist() == codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_reads_strided_codes_and_leaves_them_alone(bits: int) -> None:
    base = np.random.default_rng(0).integers(0, 2**bits, (16, 6), dtype=np.uint8)
    before = base.copy()
    packed = pack(base.T, bits)  # the packed axis is the strided one
    np.testing.assert_array_equal(packed, pack(np.ascontiguousarray(base.T), bits))
    packed[:] = 0xAA
    np.testing.assert_array_equal(base, before)
