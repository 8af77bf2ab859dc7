"""Number formats: what a node says of them, and the meaning of their codes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Format, format_of

Codes = npt.NDArray[np.uint8]

INTEGERS = [format for format in FORMATS.values() if format.element is None]
FLOATS = [format for format in FORMATS.values() if format.element is not None]

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


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
        _ = FORMATS["int4"].max_value


def test_scale_dtypes_carry_their_own_names_and_sizes() -> None:
    assert {name: dtype.itemsize for name, dtype in SCALE_DTYPES.items()} == {
        "float32": 4,
        "float16": 2,
        "bfloat16": 2,
    }
    assert all(dtype.name == name for name, dtype in SCALE_DTYPES.items())
