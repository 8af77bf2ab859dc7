"""`QuantizedWeights.dequantize` against the definition, one element at a time."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec, pack
from qmoe_rules.quantized import QuantizedWeights, pack_zero_points, unpack_zero_points

ROWS, COLUMNS = 20, 64
INTEGERS = [format for format in FORMATS.values() if format.element is None]
SYMMETRIC = [Spec(format, block) for format in INTEGERS for block in (0, 16, 64)]
ASYMMETRIC = [Spec(spec.format, spec.block_size, symmetric=False) for spec in SYMMETRIC]
# 16 rows to a square: the last ones are cut.
FLOATS = [
    Spec(FORMATS["mxfp4"], 32),
    Spec(FORMATS["nvfp4"], 16),
    Spec(FORMATS["fp8"], 16),
    Spec(FORMATS["fp8"], 128),
    Spec(FORMATS["fp8"]),
]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random_weights(
    spec: Spec, dtype: np.dtype[np.generic], shape: tuple[int, ...], seed: int = 0
) -> QuantizedWeights:
    """Random codes, signed scales and zero points for weights of `shape`."""
    rng = np.random.default_rng(seed)
    format, experts = spec.format, shape[:-2]
    codes = rng.integers(0, format.max_code + 1, shape, dtype=np.uint8)
    if format.bits == 8 and format.element is not None:
        codes[codes & 0x7F == 0x7F] = 0  # NaN
    places = (*experts, *spec.scales_shape(*shape[-2:]))
    scales = rng.standard_normal(places)
    if format.scale is not None:  # a type of its own, which may have no sign
        scales = np.exp2(rng.integers(-5, 6, places))
        dtype = format.scale
    points = rng.integers(0, format.max_code + 1, places, dtype=np.uint8)
    factor = rng.standard_normal(experts).astype(np.float32)
    return QuantizedWeights(
        pack(codes, format.bits),
        np.asarray(scales.astype(dtype)),
        spec,
        None if spec.symmetric else points,
        np.asarray(factor) if format.global_scale else None,
    )


def by_the_definition(weights: QuantizedWeights) -> npt.NDArray[np.float64]:
    """(code - zero point) * scale, or value * scale * global scale, in float64, one by one."""
    spec, codes = weights.spec, weights.codes
    meant = np.empty(codes.shape)
    for index in np.ndindex(codes.shape):
        *expert, n, k = index
        size = spec.block_size
        place = (*expert, n, k // size) if size else (*expert, n)
        if spec.format.square:
            place = (*expert, n // size, k // size) if size else tuple(expert)
        zero = 2 ** (spec.format.bits - 1)
        if weights.zero_points is not None:
            zero = int(weights.zero_points[place])
        value = value_of(int(codes[index]), spec.format.name, zero)
        factor = 1.0 if weights.global_scale is None else float(weights.global_scale[tuple(expert)])
        meant[index] = value * float(weights.scales[place]) * factor
    return meant


def value_of(code: int, format: str, zero: int) -> float:
    if format in ("mxfp4", "nvfp4"):
        return E2M1[code % 8] * (-1.0 if code >= 8 else 1.0)
    if format == "fp8":
        exponent, mantissa = code // 8 % 16, code % 8
        magnitude = math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)
        return -magnitude if code >= 128 else magnitude
    return code - zero


each_dtype = pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=str)
each_stack = pytest.mark.parametrize(
    "experts", [(), (3,), (2, 3)], ids=["one", "experts", "layers"]
)


@each_stack
@each_dtype
@pytest.mark.parametrize("spec", SYMMETRIC + ASYMMETRIC, ids=str)
def test_integers_mean_code_minus_zero_point_times_scale(
    spec: Spec, dtype: np.dtype[np.generic], experts: tuple[int, ...]
) -> None:
    quantized = random_weights(spec, dtype, (*experts, 5, COLUMNS))
    meant = by_the_definition(quantized)
    weight = quantized.dequantize()
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, meant.astype(np.float32))  # one correct rounding
    if dtype.itemsize == 2:
        np.testing.assert_array_equal(weight.astype(np.float64), meant)  # and none here: exact


@each_stack
@pytest.mark.parametrize("spec", FLOATS, ids=str)
def test_floating_point_codes_mean_value_times_scale_times_global_scale(
    spec: Spec, experts: tuple[int, ...]
) -> None:
    quantized = random_weights(spec, np.dtype(np.float32), (*experts, ROWS, COLUMNS))
    weight = quantized.dequantize()
    assert weight.dtype == np.float32
    meant = by_the_definition(quantized)  # scales are powers of two: one rounding is left at most
    np.testing.assert_array_equal(weight, meant.astype(np.float32))
    assert len(np.unique(np.abs(weight))) > 16  # scales differ from place to place


def test_a_worked_example() -> None:
    spec = Spec(FORMATS["int4"], 16)
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    scales = np.array([[0.5, -2.0]], np.float16)
    weight = QuantizedWeights(pack(codes, 4), scales, spec).dequantize()
    assert weight[0, [0, 8, 15, 16, 24, 31]].tolist() == [-4.0, 0.0, 3.5, 16.0, 0.0, -14.0]


def test_a_worked_example_with_zero_points() -> None:
    spec = Spec(FORMATS["int2"], 16, symmetric=False)
    codes = np.arange(32, dtype=np.uint8)[None] % 4
    scales, points = np.array([[0.5, 2.0]], np.float16), np.array([[0, 3]], np.uint8)
    weight = QuantizedWeights(pack(codes, 2), scales, spec, points).dequantize()
    assert weight[0, [0, 1, 3, 16, 17, 19]].tolist() == [0.0, 0.5, 1.5, -6.0, -4.0, 0.0]


@pytest.mark.parametrize("spec", SYMMETRIC + ASYMMETRIC + FLOATS, ids=str)
def test_a_stack_of_experts_means_what_its_experts_mean(spec: Spec) -> None:
    stack = random_weights(spec, np.dtype(np.float32), (4, ROWS, COLUMNS))
    points, factors = stack.zero_points, stack.global_scale
    for expert, weight in enumerate(stack.dequantize()):
        alone = QuantizedWeights(
            stack.packed[expert],
            stack.scales[expert],
            spec,
            None if points is None else points[expert],
            None if factors is None else factors[expert],
        )
        np.testing.assert_array_equal(weight, alone.dequantize())


@pytest.mark.parametrize("spec", SYMMETRIC, ids=str)
def test_the_middle_as_a_zero_point_means_what_none_means(spec: Spec) -> None:
    symmetric = random_weights(spec, np.dtype(np.float32), (2, 6, COLUMNS))
    stated = QuantizedWeights(
        symmetric.packed,
        symmetric.scales,
        Spec(spec.format, spec.block_size, symmetric=False),
        np.full(symmetric.scales.shape, 2 ** (spec.format.bits - 1), np.uint8),
    )
    np.testing.assert_array_equal(stated.dequantize(), symmetric.dequantize())


@settings(max_examples=60)
@given(st.data())
def test_codes_come_back_from_what_they_mean(data: st.DataObject) -> None:
    """encode(weight / scale + zero point) is the code, whatever codes, zero points and shape."""
    format = data.draw(st.sampled_from(INTEGERS))
    block = data.draw(st.sampled_from([0, 8]))
    spec = Spec(format, block, symmetric=False)
    rows, columns = data.draw(st.integers(1, 4)), 8 * data.draw(st.integers(1, 3))
    every = st.integers(0, format.max_code)
    codes = data.draw(hnp.arrays(np.uint8, (rows, columns), elements=every))
    places = spec.scales_shape(rows, columns)
    points = data.draw(hnp.arrays(np.uint8, places, elements=every))
    exponents = data.draw(hnp.arrays(np.int8, places, elements=st.integers(-9, 9)))
    scales = np.exp2(exponents).astype(np.float32)
    weights = QuantizedWeights(pack(codes, format.bits), scales, spec, points)
    np.testing.assert_array_equal(weights.codes, codes)
    steps, zeros = (
        np.repeat(each.reshape(rows, -1), columns // spec.blocks(columns), axis=1)
        for each in (scales, points)
    )
    np.testing.assert_array_equal(format.encode(weights.dequantize() / steps + zeros), codes)


@pytest.mark.parametrize("spec", SYMMETRIC + ASYMMETRIC + FLOATS, ids=str)
def test_what_is_stored_is_what_the_spec_lists(spec: Spec) -> None:
    weights = random_weights(spec, np.dtype(np.float16), (ROWS, COLUMNS))
    found = weights.parts()
    listed = spec.parts(ROWS, COLUMNS, np.dtype(np.float16))
    assert {part: (array.shape, array.dtype) for part, array in found.items()} == listed
    assert found["weights"].tobytes() == weights.packed.tobytes()


# Zero points in bytes.


@settings(max_examples=80)
@given(st.data())
def test_zero_points_come_back_whatever_their_number(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([format.bits for format in INTEGERS]))
    leading = data.draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=1, max_side=3))
    count = data.draw(st.integers(1, 9))
    elements = st.integers(0, 2**bits - 1)
    points = data.draw(hnp.arrays(np.uint8, (*leading, count), elements=elements))
    packed = pack_zero_points(points, bits)
    assert packed.shape == (*leading, math.ceil(count * bits / 8))
    np.testing.assert_array_equal(unpack_zero_points(packed, bits, count), points)


@pytest.mark.parametrize(
    ("bits", "points", "packed"),
    [
        (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b11]),
        (3, [1, 2, 7, 0, 5], [0b11_010_001, 0b0_101_000_1]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (8, [1, 2, 255], [1, 2, 255]),
    ],
)
def test_zero_points_fill_their_last_byte_with_zeros(
    bits: int, points: list[int], packed: list[int]
) -> None:
    assert pack_zero_points(np.array(points, np.uint8), bits).tolist() == packed
