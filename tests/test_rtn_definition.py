"""Round to nearest: two engines that agree byte for byte, and meet the definition."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from qmoe_rules.formats import FORMATS, Format, Spec
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy, smallest_scale
from qmoe_rules.testing import expert_shapes, expert_weights
from tests.rounding import (
    COLUMNS,
    DTYPES,
    INTEGERS,
    ROWS,
    SIGNED,
    SPECS,
    DType,
    Engine,
    Weight,
    assert_same,
    each_dtype,
    each_engine,
    limits,
    nasty,
)

pytestmark = pytest.mark.usefixtures("compiled_engine")


def finite_weights() -> SearchStrategy[Weight]:
    """Weights [N, K] of any finite numbers, with K a multiple of 32."""
    shapes = expert_shapes(max_experts=1, max_rows=3, max_columns=64, column_step=32)
    return expert_weights(shapes=shapes).map(lambda weight: weight[0])


SMALL_SPECS = st.sampled_from([spec for spec in SPECS if spec.block_size <= 32])


# The two engines.


@each_dtype
@pytest.mark.parametrize("name", list(nasty(DTYPES[0])))
def test_the_engines_write_the_same_bytes(name: str, dtype: DType) -> None:
    weight = nasty(dtype)[name]
    for spec in SPECS:
        assert_same(rtn(weight, spec), rtn_numpy(weight, spec))


@settings(max_examples=150)
@given(finite_weights(), SMALL_SPECS)
def test_the_engines_write_the_same_bytes_for_any_finite_patterns(
    weight: Weight, spec: Spec
) -> None:
    assert_same(rtn(weight, spec), rtn_numpy(weight, spec))


# The definition.


def assert_meets_the_definition(quantized: QuantizedWeights, weight: Weight) -> None:
    """Holds scales, zero points and codes against the definition in float64.

    A symmetric row's scale is max|w| / 2^(bits-1); a block's takes the sign that sends its peak
    (the negative one of a tie) to the lowest code, where the spec lets it. With zero points, the
    steps reach from the least weight, or zero, to the greatest, or zero. A code is the nearest one
    that exists, so that a weight within reach is at most half a step off.
    """
    spec, dtype = quantized.spec, weight.dtype
    blocks = weight.astype(np.float64).reshape(len(weight), spec.blocks(weight.shape[1]), -1)
    scales = quantized.scales.reshape(blocks.shape[:2]).astype(np.float64)
    assert quantized.scales.dtype == dtype
    if spec.symmetric:
        np.testing.assert_array_equal(scales, defined_scales(blocks, spec, dtype))
        points = np.full(scales.shape, spec.format.zero_point)
    else:
        points = assert_ranges_meet_the_definition(quantized, blocks, scales)
    steps = np.divide(blocks, scales[..., None], where=scales[..., None] != 0, out=blocks * 0)
    codes = quantized.codes.reshape(blocks.shape).astype(np.int64)
    reachable = np.clip(steps, -points[..., None], (spec.format.max_code - points)[..., None])
    # Half a step, and what a float32 product with a float32 reciprocal may add to it.
    worst = np.abs(codes - points[..., None] - reachable).max()
    assert worst <= 0.5 + spec.format.max_code * 2.0**-23


def defined_scales(
    blocks: npt.NDArray[np.float64], spec: Spec, dtype: DType
) -> npt.NDArray[np.float64]:
    size = np.abs(blocks).max(axis=2)
    signed = spec.block_size > 0 and spec.signed
    sign = np.where(blocks.min(axis=2) == -size, 1, -1) if signed else 1
    rounded = (size / spec.format.zero_point).astype(dtype).astype(np.float64)
    scales: npt.NDArray[np.float64] = sign * np.maximum(rounded, least_scales(size, dtype))
    return scales


def least_scales(size: npt.NDArray[np.float64], dtype: DType) -> npt.NDArray[np.float64]:
    return np.where(size > 0, float(smallest_scale(dtype)), 0)


def assert_ranges_meet_the_definition(
    quantized: QuantizedWeights, blocks: npt.NDArray[np.float64], scales: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Returns the zero points; a scale is (high - low) / (2^bits - 1), rounded to its type."""
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    exact, info = (high - low) / quantized.spec.format.max_code, limits(quantized.scales.dtype)
    # Half a unit of the last place, and three float32 operations before it.
    slack = exact * (float(info.eps) / 2 + 3 * 2.0**-24) + float(info.smallest_subnormal)
    floor = least_scales(high - low, quantized.scales.dtype)
    assert (np.abs(scales - exact) <= slack)[exact > floor].all()
    np.testing.assert_array_equal(scales[exact <= floor], floor[exact <= floor])
    assert quantized.zero_points is not None
    points = quantized.zero_points.reshape(scales.shape).astype(np.int64)
    wanted = np.divide(-low, scales, where=scales != 0, out=scales * 0)
    wanted = np.clip(wanted, 0, quantized.spec.format.max_code)
    assert np.abs(points - wanted).max() <= 0.5 + quantized.spec.format.max_code * 2.0**-23
    return points


@each_engine
@each_dtype
@pytest.mark.parametrize("name", list(nasty(DTYPES[0])))
def test_scales_and_codes_meet_the_definition(engine: Engine, name: str, dtype: DType) -> None:
    weight = nasty(dtype)[name]
    for spec in SPECS:
        assert_meets_the_definition(engine(weight, spec), weight)


@each_engine
@settings(max_examples=100)
@given(weight=finite_weights(), spec=SMALL_SPECS)
def test_any_finite_patterns_meet_the_definition(
    engine: Engine, weight: Weight, spec: Spec
) -> None:
    assert_meets_the_definition(engine(weight, spec), weight)


@each_engine
@each_dtype
def test_a_worked_example(engine: Engine, dtype: DType) -> None:
    """Peaks 4 and -4 with 4 bits: steps of a half."""
    block = [4.0, 3.6, 0.5, 0.2, 0.0, -0.3, -3.5, -3.9]
    weight = np.array([block * 2, [-w for w in block] * 2], dtype)
    by_row = engine(weight, Spec(FORMATS["int4"]))
    assert by_row.scales.tolist() == [0.5, 0.5]
    assert by_row.codes[:, :8].tolist() == [
        [15, 15, 9, 8, 8, 7, 1, 0],  # the positive peak has no code of its own
        [0, 1, 7, 8, 8, 9, 15, 15],
    ]
    by_block = engine(weight, Spec(FORMATS["int4"], 16))
    assert by_block.scales.tolist() == [[-0.5], [0.5]]
    assert by_block.codes[:, :8].tolist() == [[0, 1, 7, 8, 8, 9, 15, 15]] * 2


@each_engine
@each_dtype
@pytest.mark.parametrize("spec", SIGNED, ids=str)
def test_the_peak_of_every_block_is_kept_exactly(engine: Engine, dtype: DType, spec: Spec) -> None:
    """With code 0; a row keeps a negative peak, and cuts a positive one by exactly one step."""
    weight = nasty(dtype)["heavy tails"]
    quantized = engine(weight, spec)
    groups = (ROWS, spec.blocks(COLUMNS), -1)
    blocks = weight.astype(np.float64).reshape(groups)
    place = np.abs(blocks).argmax(axis=2)[..., None]
    peak = np.take_along_axis(blocks, place, 2)
    code = np.take_along_axis(quantized.codes.reshape(groups), place, 2)
    meant = np.take_along_axis(quantized.dequantize().reshape(groups), place, 2)
    kept = (peak < 0) | (spec.block_size > 0)
    cut = np.abs(quantized.scales.astype(np.float64)).reshape(peak.shape)
    assert kept.any()
    np.testing.assert_array_equal(code, np.where(kept, 0, spec.format.max_code))
    np.testing.assert_array_equal(meant, np.where(kept, peak, peak - cut).astype(np.float32))


@each_engine
@each_dtype
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_stay_zeros(engine: Engine, dtype: DType, zero: float) -> None:
    weight = np.full((2, COLUMNS), zero, dtype)
    for spec in SPECS:
        quantized = engine(weight, spec)
        assert (quantized.codes == (spec.format.zero_point if spec.symmetric else 0)).all()
        assert quantized.zero_points is None or (quantized.zero_points == 0).all()
        assert (quantized.scales.astype(np.float32) == 0).all()
        assert (quantized.dequantize() == 0).all()


@each_engine
@each_dtype
def test_a_scale_that_would_underflow_does_not_erase_its_block(
    engine: Engine, dtype: DType
) -> None:
    """A peak of the smallest scale is one step, whichever sign it has."""
    least = float(smallest_scale(dtype))
    for spec in SPECS:
        for peak in (least, -least):
            weight = np.zeros((1, COLUMNS), dtype)
            weight[:, ::16] = peak
            quantized = engine(weight, spec)
            np.testing.assert_array_equal(quantized.dequantize(), weight.astype(np.float32))


@pytest.mark.parametrize("columns", [2, 6, 10, 4098])
@pytest.mark.parametrize("format", INTEGERS, ids=lambda f: f.name)
def test_rows_of_odd_lengths_fill_their_bytes(format: Format, columns: int) -> None:
    columns *= format.codes_per_group // math.gcd(columns, format.codes_per_group)
    weight = np.random.default_rng(0).standard_normal((3, columns)).astype(np.float32)
    for spec in (Spec(format), Spec(format, symmetric=False)):
        quantized = rtn(weight, spec)
        assert quantized.packed.shape == spec.packed_shape(3, columns)
        assert_same(quantized, rtn_numpy(weight, spec))
        assert_meets_the_definition(quantized, weight)
