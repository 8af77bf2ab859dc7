"""Round to nearest into floating-point codes, against definitions of their own in float64."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qmoe_rules.errors import SourceError
from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec, pack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers import floats
from qmoe_rules.quantizers.floats import float_rtn, float_rtn_numpy
from qmoe_rules.quantizers.rtn import rtn

Weight = npt.NDArray[np.generic]
Float64 = npt.NDArray[np.float64]
DType = np.dtype[np.generic]

MXFP4 = Spec(FORMATS["mxfp4"], 32)
NVFP4 = Spec(FORMATS["nvfp4"], 16)
FP8 = [Spec(FORMATS["fp8"], block) for block in (128, 32, 0)]
SPECS = [MXFP4, NVFP4, *FP8]
DTYPES = list(SCALE_DTYPES.values())
ROWS, COLUMNS = 40, 96  # neither fills squares of 128, and N does not fill those of 32

each_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

both_engines = pytest.mark.usefixtures("_each_engine")


@pytest.fixture(params=["compiled", "numpy"])
def _each_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the compiled kernels and without them."""
    if request.param == "numpy":
        monkeypatch.setattr(floats, "kernels", lambda: None)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([math.ldexp(c % 8 + 8 * (c > 7), max(c // 8, 1) - 10) for c in range(127)])


def nearest(values: Float64, table: Float64) -> Float64:
    """The nearest numbers of a table of magnitudes, ties to the even place, signs kept."""
    sizes = np.minimum(np.abs(values), table[-1])
    above = np.clip(np.searchsorted(table, sizes), 1, len(table) - 1)
    middle = (table[above] + table[above - 1]) / 2
    up = (sizes > middle) | ((sizes == middle) & (above % 2 == 0))
    return np.asarray(np.copysign(table[np.where(up, above, above - 1)], values))


def assert_nearest(found: Float64, values: Float64, table: Float64) -> None:
    """Holds numbers of a table against values known to float32's precision, so but for ties."""
    assert np.isin(np.abs(found), table).all()
    best = np.abs(nearest(values, table) - values)
    assert (np.abs(found - values) <= best + np.abs(values) * 2**-21).all()


def ordinary(dtype: DType, seed: int = 0) -> Weight:
    """Normally distributed weights whose rows differ in size."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** rng.integers(-4, 5, (ROWS, 1))
    return (rng.standard_normal((ROWS, COLUMNS)) * sizes).astype(dtype)


def in_blocks(weight: npt.NDArray[Any], spec: Spec) -> Float64:
    return weight.astype(np.float64).reshape(len(weight), -1, spec.block_size)


def in_squares(array: npt.NDArray[Any], spec: Spec) -> list[tuple[tuple[int, ...], Float64]]:
    """The squares of an array, cut at its edges, by the place of their scale."""
    wide, size = array.astype(np.float64), spec.block_size
    if not size:
        return [((), wide)]
    return [
        ((n, k), wide[n * size : (n + 1) * size, k * size : (k + 1) * size])
        for n in range(-(-array.shape[0] // size))
        for k in range(-(-array.shape[1] // size))
    ]


def patterns(quantized: QuantizedWeights) -> tuple[bytes, ...]:
    return tuple(part.tobytes() for part in quantized.parts().values())


# The definitions.


@both_engines
@each_dtype
def test_mxfp4_is_the_definition_of_the_microscaling_specification(dtype: DType) -> None:
    """Scale 2^(floor(log2(max|w|)) - 2), codes to nearest even, saturating."""
    weight = ordinary(dtype)
    quantized = rtn(weight, MXFP4)
    blocks = in_blocks(weight, MXFP4)
    scales = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(axis=2))) - 2)
    assert quantized.scales.dtype.name == "float8_e8m0fnu"
    np.testing.assert_array_equal(quantized.scales.astype(np.float64), scales)
    meant = nearest(blocks / scales[..., None], E2M1) * scales[..., None]
    np.testing.assert_array_equal(in_blocks(quantized.dequantize(), MXFP4), meant)
    assert quantized.global_scale == 1


@both_engines
@each_dtype
def test_nvfp4_is_two_levels_of_scales(dtype: DType) -> None:
    """The expert's scale gives the block of its peak the largest scale, 448, and code 6."""
    weight = ordinary(dtype)
    quantized = rtn(weight, NVFP4)
    blocks = in_blocks(weight, NVFP4)
    peak = np.abs(blocks).max(axis=2)
    assert quantized.global_scale is not None
    assert quantized.global_scale.dtype == np.float32
    whole = float(quantized.global_scale)
    assert whole == pytest.approx(peak.max() / (6 * 448), rel=2**-23)
    scales = quantized.scales.astype(np.float64)
    assert quantized.scales.dtype.name == "float8_e4m3fn"
    assert_nearest(scales, peak / 6 / whole, E4M3)
    assert scales.max() == 448
    values = in_blocks(quantized.spec.format.decode(quantized.codes), NVFP4)
    assert_nearest(values, blocks / (scales * whole)[..., None], E2M1)


@both_engines
@each_dtype
@pytest.mark.parametrize("spec", FP8, ids=str)
def test_fp8_gives_the_peak_of_every_square_the_largest_code(dtype: DType, spec: Spec) -> None:
    weight = ordinary(dtype)
    quantized = rtn(weight, spec)
    assert quantized.scales.dtype == np.float32
    squares = in_squares(weight, spec)
    assert quantized.scales.size == len(squares)
    values = spec.format.decode(quantized.codes)
    for (place, square), (_, found) in zip(squares, in_squares(values, spec), strict=True):
        scale = float(quantized.scales[place])
        assert scale == pytest.approx(np.abs(square).max() / 448, rel=2**-23)
        assert_nearest(found, square / scale, E4M3)
        assert np.abs(found).max() == 448


def gaps(values: Float64, table: Float64) -> Float64:
    """The distance between the two neighbours in a table of magnitudes that hold each value."""
    above = np.clip(np.searchsorted(table, np.abs(values)), 1, len(table) - 1)
    return np.asarray(table[above] - table[above - 1])


@st.composite
def finite_weights(draw: st.DrawFn) -> Weight:
    """Weights of any normal size, and zeros, that leave their scales normal too."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = (draw(st.integers(1, 3)), 32 * draw(st.integers(1, 3)))
    largest = 2.0**10 if dtype == np.float16 else 2.0**100
    sizes = st.floats(1 / largest, largest) | st.just(0.0)
    signs = draw(hnp.arrays(np.int8, shape, elements=st.sampled_from([-1, 1])))
    return np.asarray(draw(hnp.arrays(np.float64, shape, elements=sizes)) * signs).astype(dtype)


@settings(max_examples=100)
@given(finite_weights(), st.sampled_from(SPECS))
def test_the_engines_write_the_same_bytes(weight: Weight, spec: Spec) -> None:
    assert patterns(float_rtn(weight, spec)) == patterns(float_rtn_numpy(weight, spec))


@settings(max_examples=100)
@given(finite_weights(), st.sampled_from(SPECS))
def test_no_weight_within_reach_is_further_off_than_half_the_gap(
    weight: Weight, spec: Spec
) -> None:
    quantized = rtn(weight, spec)
    steps = step_of(quantized)
    wide, found = weight.astype(np.float64), quantized.dequantize().astype(np.float64)
    table = E4M3 if spec.format.bits == 8 else E2M1
    values = np.divide(wide, steps, where=steps > 0, out=np.zeros_like(wide))
    within = np.abs(values) <= table[-1]
    worst = gaps(values, table) / 2 * steps + np.abs(wide) * 2**-21
    assert (np.abs(found - wide) <= worst)[within].all()
    # What is beyond takes the last code of its sign.
    last = np.sign(wide) * table[-1] * steps
    np.testing.assert_allclose(found[~within], last[~within], rtol=2**-21)
    if spec is MXFP4:
        assert (np.abs(values) < 8).all()


def step_of(quantized: QuantizedWeights) -> Float64:
    """What a code of 1 means at every place, [N, K]."""
    format = quantized.spec.format
    ones = format.encode(np.ones(quantized.codes.shape, np.float32))
    of_ones = replace(quantized, packed=pack(ones, format.bits))
    return np.asarray(of_ones.dequantize().astype(np.float64))


@both_engines
@each_dtype
def test_a_worked_example_of_mxfp4(dtype: DType) -> None:
    """A peak of 7 has a scale of 1, and is cut to 6; a peak of 8 has a scale of 2."""
    values = [0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0]
    weight = np.zeros((2, 32), dtype)
    weight[0, :9], weight[1, :9] = values, np.array(values) * -8 / 7
    quantized = rtn(weight, MXFP4)
    assert quantized.scales.astype(float).tolist() == [[1.0], [2.0]]
    assert quantized.codes[0, :9].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 7]  # ties to even
    assert quantized.codes[1, 8] == 8 + 6  # -8 / 2 = -4


# Weights that are what they become already.


@settings(max_examples=150)
@given(st.data())
def test_weights_that_are_mxfp4_already_come_through_exactly(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    codes = data.draw(hnp.arrays(np.uint8, (rows, 32 * blocks), elements=st.integers(0, 15)))
    # 6 * 2^13 is the largest, and 0.5 * 2^-23 the smallest number of float16.
    least, most = {"float16": (-23, 13), "bfloat16": (-126, 125), "float32": (-126, 125)}[
        dtype.name
    ]
    exponents = st.integers(least, most)
    powers = data.draw(hnp.arrays(np.int16, (rows, blocks), elements=exponents))
    meant = MXFP4.format.decode(codes) * np.exp2(np.repeat(powers, 32, axis=1).astype(np.float32))
    weight = meant.astype(dtype)
    np.testing.assert_array_equal(weight.astype(np.float32), meant)
    found = rtn(weight, MXFP4).dequantize()
    np.testing.assert_array_equal(found.view(np.uint32), meant.view(np.uint32))  # zeros' signs too


@each_dtype
@each_spec
def test_quantizing_what_was_quantized_keeps_the_codes(dtype: DType, spec: Spec) -> None:
    """And the scales; float32 scales may differ in the last place, by the rounding of the peak."""
    weight = ordinary(dtype)
    once = rtn(weight, spec)
    meant = once.dequantize()
    exact = dtype.itemsize == 4 or spec is MXFP4  # where the type holds what the codes mean
    twice = rtn(meant.astype(dtype) if exact else meant, spec)
    np.testing.assert_array_equal(twice.codes, once.codes)
    if spec.block_size and not spec.format.square:
        np.testing.assert_array_equal(twice.scales, once.scales)
    np.testing.assert_allclose(twice.dequantize(), meant, rtol=2**-22)


# Algebra.


@settings(max_examples=100)
@given(st.data())
def test_a_power_of_two_goes_into_the_scales_and_leaves_the_codes(data: st.DataObject) -> None:
    dtype, spec = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(SPECS))
    whole = data.draw(hnp.arrays(np.int16, (2, 64), elements=st.integers(-255, 255)))
    exponent = st.integers(-10, 7) if dtype == np.float16 else st.integers(-80, 80)
    one, other = data.draw(exponent), data.draw(exponent)
    base, moved = (rtn(np.ldexp(whole, power).astype(dtype), spec) for power in (one, other))
    np.testing.assert_array_equal(moved.codes, base.codes)
    if spec is NVFP4:  # the expert's scale takes it
        np.testing.assert_array_equal(moved.scales, base.scales)
    meant = np.ldexp(base.dequantize().astype(np.float64), other - one)
    np.testing.assert_array_equal(moved.dequantize(), meant)


@each_dtype
def test_rows_of_mxfp4_are_independent(dtype: DType) -> None:
    weight, order = ordinary(dtype), np.random.default_rng(1).permutation(ROWS)
    base, moved = rtn(weight, MXFP4), rtn(weight[order], MXFP4)
    permuted = QuantizedWeights(
        base.packed[order], base.scales[order], MXFP4, global_scale=base.global_scale
    )
    assert patterns(moved) == patterns(permuted)


@both_engines
@each_dtype
@each_spec
def test_the_opposite_weights_have_the_same_scales(dtype: DType, spec: Spec) -> None:
    weight = ordinary(dtype)
    one, other = rtn(weight, spec), rtn(np.negative(weight), spec)
    np.testing.assert_array_equal(one.codes ^ (1 << (spec.format.bits - 1)), other.codes)
    np.testing.assert_array_equal(one.scales, other.scales)


# What comes in.


@both_engines
@each_dtype
@each_spec
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_stay_zeros(dtype: DType, spec: Spec, zero: float) -> None:
    assert (rtn(np.full((ROWS, COLUMNS), zero, dtype), spec).dequantize() == 0).all()


@each_dtype
@each_spec
def test_a_block_of_zeros_beside_others_stays_zero(dtype: DType, spec: Spec) -> None:
    weight = ordinary(dtype)
    weight[:32, 32:64] = 0
    assert (rtn(weight, spec).dequantize()[:32, 32:64] == 0).all()


@both_engines
@each_dtype
@each_spec
def test_the_ends_of_the_type_have_finite_codes_and_scales(dtype: DType, spec: Spec) -> None:
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    for size in (info.max, info.smallest_normal, info.smallest_subnormal):
        weight = np.zeros((ROWS, COLUMNS), dtype)
        weight[::3, ::5] = size
        weight[1::3, ::5] = -size
        quantized = rtn(weight, spec)
        for part in quantized.parts().values():
            assert np.isfinite(part.astype(np.float32)).all() or part.dtype == np.uint8
        meant = quantized.dequantize()
        assert np.isfinite(meant).all()
        assert (np.sign(meant) * np.sign(weight.astype(np.float32)) >= 0).all()


@both_engines
def test_a_small_block_beside_a_large_one_is_not_erased_by_nvfp4() -> None:
    """Its scale would be 0 in float8e4m3fn; it takes the smallest one."""
    weight = np.zeros((1, 32), np.float32)
    weight[0, 0], weight[0, 16] = 6 * 448 * 512, 6
    quantized = rtn(weight, NVFP4)
    assert quantized.global_scale == 512
    assert quantized.scales.astype(float).tolist() == [[448, 2**-9]]
    assert quantized.dequantize()[0, [0, 16]].tolist() == [6 * 448 * 512, 6]


@both_engines
@each_dtype
@each_spec
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_are_refused_with_the_first_such_row(
    dtype: DType, spec: Spec, value: float
) -> None:
    weight = ordinary(dtype)
    weight[5, 17] = value
    weight[6, 0] = np.inf
    with pytest.raises(SourceError, match=r"^row 5 holds an infinity or a NaN$"):
        rtn(weight, spec)


@each_dtype
@each_spec
def test_the_way_weights_lie_in_memory_does_not_matter(dtype: DType, spec: Spec) -> None:
    weight = ordinary(dtype)
    wide, before = np.repeat(weight, 2, axis=1), weight.tobytes()
    read_only = weight.copy()
    read_only.flags.writeable = False
    for view in (np.asfortranarray(weight), wide[:, ::2], read_only):
        assert patterns(rtn(view, spec)) == patterns(rtn(weight, spec))
    assert weight.tobytes() == before


@each_spec
def test_what_is_quantized_is_what_the_spec_lists(spec: Spec) -> None:
    found = rtn(ordinary(DTYPES[1]), spec).parts()
    listed = spec.parts(ROWS, COLUMNS, DTYPES[1])
    assert {part: (array.shape, array.dtype) for part, array in found.items()} == listed


@pytest.mark.parametrize(
    ("weight", "spec", "reason"),
    [
        (np.zeros((2, 32)), MXFP4, "weights are float64; they may be float32, float16, bfloat16"),
        (
            np.zeros((2, 48), np.float32),
            MXFP4,
            "K=48 is not divisible by block_size=32",
        ),
        (
            np.zeros((2, 64), np.float32),
            Spec(FORMATS["mxfp4"], 16),
            "mxfp4 has blocks of 32 columns, not block_size=16",
        ),
        (np.zeros((0, 32), np.float32), FP8[0], "weight [N=0, K=32] is empty"),
    ],
)
def test_what_a_spec_cannot_hold_is_an_error(weight: Weight, spec: Spec, reason: str) -> None:
    for engine in (rtn, float_rtn):
        with pytest.raises(ValueError, match=re.escape(reason)):
            engine(weight, spec)
