"""Number formats: the meaning of codes, their order in bytes, and the shapes that follow."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Format, Spec, format_of, pack, unpack

Codes = npt.NDArray[np.uint8]

INT2, INT3, INT4, INT8 = (FORMATS[f"int{bits}"] for bits in (2, 3, 4, 8))
MXFP4, NVFP4, FP8 = FORMATS["mxfp4"], FORMATS["nvfp4"], FORMATS["fp8"]
INTEGERS = [format for format in FORMATS.values() if format.element is None]
FLOATS = [format for format in FORMATS.values() if format.element is not None]
WIDTHS = (1, 2, 3, 4, 8)

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[Codes, int]:
    """Codes of some width whose last axis fills whole bytes, with any leading axes."""
    bits = draw(st.sampled_from(WIDTHS))
    leading = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    row_bytes = draw(st.integers(0, 9)) * (3 if bits == 3 else 1)
    shape = (*leading, row_bytes * 8 // bits)
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))), bits


def float_code(code: int, format: Format) -> float:
    """The value of a sign, exponent and mantissa, from the definition of the format."""
    exponent_bits, mantissa_bits, bias = {4: (2, 1, 1), 8: (4, 3, 7)}[format.bits]
    mantissa = code % 2**mantissa_bits
    exponent = code // 2**mantissa_bits % 2**exponent_bits
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    if format.bits == 8 and (exponent, mantissa) == (15, 7):
        return math.nan
    significand = mantissa / 2**mantissa_bits + (exponent > 0)
    return math.copysign(math.ldexp(significand, max(exponent, 1) - bias), sign)


def finite_codes(format: Format) -> list[int]:
    return [c for c in range(2**format.bits) if not math.isnan(meaning(c, format))]


def meaning(code: int, format: Format) -> float:
    return float(code) if format.element is None else float_code(code, format)


def test_the_formats() -> None:
    facts = {
        name: (f.name, f.quant_type, f.bits, f.codes_per_group, f.block_size, f.square)
        for name, f in FORMATS.items()
    }
    assert facts == {
        "int2": ("int2", "int", 2, 4, None, False),
        "int3": ("int3", "int", 3, 8, None, False),
        "int4": ("int4", "int", 4, 2, None, False),
        "int8": ("int8", "int", 8, 1, None, False),
        "mxfp4": ("mxfp4", "fp4", 4, 2, 32, False),
        "nvfp4": ("nvfp4", "nvfp4", 4, 2, 16, False),
        "fp8": ("fp8", "fp8", 8, 1, None, True),
    }


def test_the_symmetric_zero_point_is_the_middle_code() -> None:
    assert {f.bits: (f.zero_point, f.max_code) for f in INTEGERS} == {
        2: (2, 3),
        3: (4, 7),
        4: (8, 15),
        8: (128, 255),
    }


@each_format
def test_a_format_is_known_by_what_a_node_says(format: Format) -> None:
    assert format_of(format.quant_type, format.bits) is format


@pytest.mark.parametrize(
    ("quant_type", "bits"), [("int", 1), ("int", 5), ("int", 16), ("wfp4afp8", 4), ("", 4)]
)
def test_what_a_node_may_say_that_is_no_format(quant_type: str, bits: int) -> None:
    assert format_of(quant_type, bits) is None


# Codes and what they mean.


@each_format
def test_every_code_means_what_the_format_defines(format: Format) -> None:
    codes = np.arange(2**format.bits).astype(np.uint8)
    decoded = format.decode(codes)
    assert decoded.dtype == np.float32
    meant = np.array([meaning(code, format) for code in codes.tolist()], np.float32)
    np.testing.assert_array_equal(decoded, meant)
    finite = np.isfinite(meant)
    np.testing.assert_array_equal(np.signbit(decoded[finite]), np.signbit(meant[finite]))


@settings(max_examples=100)
@given(st.data())
def test_encode_inverts_decode_for_all_finite_codes_of_any_shape(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(list(FORMATS.values())))
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    elements = st.sampled_from(finite_codes(format))
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=elements))
    encoded = format.encode(format.decode(codes))
    assert (encoded.dtype, encoded.shape) == (np.dtype(np.uint8), shape)
    np.testing.assert_array_equal(encoded, codes)


@each_format
def test_encode_inverts_decode_for_every_single_code(format: Format) -> None:
    codes = np.array(finite_codes(format), np.uint8)
    assert codes.size == {"fp8": 254}.get(format.name, 2**format.bits)
    np.testing.assert_array_equal(format.encode(format.decode(codes)), codes)


@pytest.mark.parametrize("format", FLOATS, ids=lambda f: f.name)
def test_the_zeros_of_both_signs_are_codes_of_their_own(format: Format) -> None:
    negative = 2 ** (format.bits - 1)
    assert format.encode(np.array([0.0, -0.0])).tolist() == [0, negative]
    decoded = format.decode(np.array([0, negative], np.uint8))
    assert np.signbit(decoded).tolist() == [False, True]


def nearest_codes(values: npt.NDArray[np.float64], format: Format) -> Codes:
    """The nearest code by search, ties to the even code, beyond the ends the last one."""
    codes = np.array(sorted(finite_codes(format), key=lambda code: meaning(code, format)))
    meant = np.array([meaning(code, format) for code in codes.tolist()])
    gaps = np.abs(np.clip(values, meant[0], meant[-1])[:, None] - meant)
    tied = gaps == gaps.min(axis=1, keepdims=True)
    # Of two neighbours one code is even; of the two zeros, it is the one of the value's sign.
    same_sign = (codes > format.max_code // 2) == np.signbit(values)[:, None]
    preference = tied * (1 + (codes % 2 == 0)) * (1 + (same_sign | (format.element is None)))
    return np.asarray(codes[preference.argmax(axis=1)], np.uint8)


@each_format
def test_values_go_to_the_nearest_code_and_ties_to_the_even_one(format: Format) -> None:
    meant = np.sort([meaning(code, format) for code in finite_codes(format)])
    middles = (meant[1:] + meant[:-1]) / 2  # exact in float32, as the neighbours are
    near = [np.nextafter(middles.astype(np.float32), np.float32(way)) for way in (-1e9, 1e9)]
    far = [np.array([-1e9, 1e9, -1.0, 2 * meant[0], 2 * meant[-1]])]
    values = np.concatenate([meant, middles, *near, *far]).astype(np.float32)
    expected = nearest_codes(values.astype(np.float64), format)
    np.testing.assert_array_equal(format.encode(values), expected)


def test_the_largest_values() -> None:
    assert {f.name: f.max_value for f in FLOATS} == {"mxfp4": 6, "nvfp4": 6, "fp8": 448}
    for format in FLOATS:
        meant = [abs(meaning(code, format)) for code in finite_codes(format)]
        assert max(meant) == format.max_value
    with pytest.raises(ValueError, match="int4 has integer codes"):
        _ = INT4.max_value


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


# Shapes.


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
