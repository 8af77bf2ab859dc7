"""Round to nearest: two engines that must agree, a definition, and ONNX Runtime's own tool."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.strategies import SearchStrategy
from onnxruntime.capi._pybind_state import (
    quantize_matmul_2bits,
    quantize_matmul_4bits,
    quantize_matmul_8bits,
)

from qmoe_rules.errors import SourceError
from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Format, Spec, pack, unpack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers.engine import kernels
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy, smallest_scale
from qmoe_rules.testing import expert_shapes, expert_weights

Weight = npt.NDArray[np.generic]
DType = np.dtype[np.generic]
Engine = Callable[[Weight, Spec], QuantizedWeights]

DTYPES = list(SCALE_DTYPES.values())
INTEGERS = [format for format in FORMATS.values() if format.element is None]
SIGNED = [Spec(format, block) for format in INTEGERS for block in (0, 16, 32, 64, 128)]
POSITIVE = [Spec(format, 32, signed=False) for format in INTEGERS]
ASYMMETRIC = [replace(spec, symmetric=False) for spec in SIGNED]
SPECS = SIGNED + POSITIVE + ASYMMETRIC
ROWS, COLUMNS = 8, 256

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s}{'' if s.signed else ' +'}")
each_engine = pytest.mark.parametrize("engine", [rtn, rtn_numpy], ids=["compiled", "numpy"])


@pytest.fixture(autouse=True, scope="module")
def _compiled_engine() -> None:
    """Without it, every comparison of the engines would compare numpy with itself."""
    assert kernels() is not None


def assert_same(one: QuantizedWeights, other: QuantizedWeights) -> None:
    """Byte for byte: signs of zeros count."""
    assert one.spec == other.spec
    assert one.scales.dtype == other.scales.dtype
    np.testing.assert_array_equal(one.packed, other.packed, err_msg=f"codes, {one.spec}")
    ours, theirs = (q.scales.view(f"u{q.scales.itemsize}") for q in (one, other))
    np.testing.assert_array_equal(ours, theirs, err_msg=f"patterns of scales, {one.spec}")
    assert (one.zero_points is None) == (other.zero_points is None) == one.spec.symmetric
    if one.zero_points is not None and other.zero_points is not None:
        assert one.zero_points.dtype == other.zero_points.dtype == np.uint8
        np.testing.assert_array_equal(one.zero_points, other.zero_points)


def limits(dtype: DType) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def ordinary(dtype: DType, seed: int = 0) -> Weight:
    """Normally distributed weights, as a trained layer has them."""
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(dtype)


def nasty(dtype: DType) -> dict[str, Weight]:
    """Weights by what is difficult about them."""
    rng = np.random.default_rng(0)
    info = limits(dtype)
    shape = (ROWS, COLUMNS)
    heavy = np.clip(rng.standard_t(1, shape) * 0.02, -100, 100)
    zero_rows, zero_blocks = heavy.copy(), heavy.copy()
    zero_rows[[0, 3, ROWS - 1]] = 0
    zero_blocks[:, 16:48] = 0
    zero_blocks[2, 128:] = 0
    tiny = float(info.smallest_subnormal)
    found = {
        "ordinary": rng.standard_normal(shape),
        "heavy tails": heavy,
        "rows of zeros": zero_rows,
        "blocks of zeros": zero_blocks,
        "negative zeros": np.full(shape, -0.0),
        "zeros of both signs": rng.choice([0.0, -0.0], shape),
        "subnormals": rng.integers(-300, 301, shape) * tiny,
        "the smallest subnormal alone": np.where(rng.random(shape) < 0.01, tiny, 0.0),
        "its negative alone": np.where(rng.random(shape) < 0.01, -tiny, 0.0),
        "the largest finite": rng.choice([1.0, -1.0, 0.0, 0.4], shape) * float(info.max),
        "ties of +m and -m": rng.choice([3.0, -3.0, 1.5, 0.0], shape),
        "ties between codes": rng.integers(-16, 16, shape) * 0.5,
        "scales around their smallest": rng.standard_normal(shape)
        * float(smallest_scale(dtype))
        * 2.0 ** rng.integers(-4, 9, (ROWS, 1)),
    }
    return {name: weight.astype(dtype) for name, weight in found.items()}


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


# Algebra.


@each_dtype
@each_spec
def test_a_power_of_two_goes_into_the_scales_and_leaves_the_codes(dtype: DType, spec: Spec) -> None:
    weight = (np.random.default_rng(0).integers(-512, 513, (ROWS, COLUMNS)) / 64).astype(dtype)
    base = rtn(weight, spec)
    for exponent in (-6, -1, 1, 6):
        factor = np.float32(2.0**exponent)  # nothing is rounded on the way back to dtype
        scaled, scales = (
            (a.astype(np.float32) * factor).astype(dtype) for a in (weight, base.scales)
        )
        assert_same(rtn(scaled, spec), replace(base, scales=scales))


@settings(max_examples=100)
@given(st.data())
def test_any_power_of_two_that_neither_overflows_nor_underflows(data: st.DataObject) -> None:
    dtype, spec = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(SPECS))
    whole = data.draw(hnp.arrays(np.int16, (2, 128), elements=st.integers(-255, 255)))
    # The smallest scale is that of a 1, a 255th of it.
    exponent = st.integers(-6, 7) if dtype == np.float16 else st.integers(-100, 100)
    one, other = data.draw(exponent), data.draw(exponent)
    base, moved = (rtn(np.ldexp(whole, power).astype(dtype), spec) for power in (one, other))
    scales = np.ldexp(base.scales.astype(np.float64), other - one).astype(dtype)
    assert_same(moved, replace(base, scales=scales))


@each_dtype
@pytest.mark.parametrize("spec", SIGNED, ids=str)
def test_quantizing_what_was_quantized_changes_nothing(dtype: DType, spec: Spec) -> None:
    """Wherever a group holds code 0, as every block does and every row with a negative peak."""
    weight = ordinary(dtype)
    if not spec.block_size:
        weight[:, 7] = -8
    once = rtn(weight, spec)
    assert (once.codes.reshape(ROWS, spec.blocks(COLUMNS), -1).min(axis=2) == 0).all()
    assert_same(rtn(once.dequantize().astype(dtype), spec), once)


@each_dtype
@pytest.mark.parametrize("spec", ASYMMETRIC, ids=str)
def test_quantizing_what_was_quantized_with_zero_points_keeps_the_codes(
    dtype: DType, spec: Spec
) -> None:
    """Wherever a group reaches both ends of the codes, and so spans as many steps as before.

    Its scale may be another one by the rounding of the range, which moves no code, except in
    bfloat16, whose 8 bits of significand can just tell 255 steps of one size apart.
    """
    once = rtn(ordinary(dtype), spec)
    twice = rtn(once.dequantize().astype(dtype), spec)
    groups = (ROWS, spec.blocks(COLUMNS), -1)
    before, after = (each.codes.reshape(groups) for each in (once, twice))
    one, other = (each.scales.reshape(groups[:2]).astype(float) for each in (once, twice))
    whole = (before.min(axis=2) == 0) & (before.max(axis=2) == spec.format.max_code)
    np.testing.assert_allclose(one[whole], other[whole], rtol=float(limits(dtype).eps))
    if (dtype.name, spec.format.name) == ("bfloat16", "int8"):
        whole &= one == other
    assert whole.mean() > 0.4
    np.testing.assert_array_equal(before[whole], after[whole])


@each_dtype
@each_spec
def test_rows_are_independent(dtype: DType, spec: Spec) -> None:
    weight, order = ordinary(dtype), np.random.default_rng(1).permutation(ROWS)
    base = rtn(weight, spec)
    points = None if base.zero_points is None else base.zero_points[order]
    permuted = QuantizedWeights(base.packed[order], base.scales[order], spec, points)
    assert_same(rtn(weight[order], spec), permuted)


@each_dtype
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.block_size], ids=str)
def test_blocks_are_independent(dtype: DType, spec: Spec) -> None:
    weight, blocks = ordinary(dtype), spec.blocks(COLUMNS)
    order = np.random.default_rng(1).permutation(blocks)
    base = rtn(weight, spec)
    codes = base.codes.reshape(ROWS, blocks, -1)[:, order].reshape(ROWS, COLUMNS)
    points = None if base.zero_points is None else base.zero_points[:, order]
    packed = pack(codes, spec.format.bits)
    moved = weight.reshape(ROWS, blocks, -1)[:, order].reshape(ROWS, COLUMNS)
    assert_same(rtn(moved, spec), QuantizedWeights(packed, base.scales[:, order], spec, points))


@each_dtype
@pytest.mark.parametrize("spec", ASYMMETRIC, ids=str)
def test_zero_has_a_code_of_its_own_beside_any_weights(dtype: DType, spec: Spec) -> None:
    for shift in (-3.0, 0.0, 3.0):  # all weights on one side of zero, or on both
        weight = (ordinary(dtype).astype(np.float32) + np.float32(shift)).astype(dtype)
        weight[:, ::16] = 0
        assert (rtn(weight, spec).dequantize()[:, ::16] == 0).all()


# What comes in.


@each_engine
@each_dtype
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("column", [0, 100, COLUMNS - 1])
def test_weights_that_are_not_finite_are_refused_with_the_first_such_row(
    engine: Engine, dtype: DType, value: float, column: int
) -> None:
    weight = ordinary(dtype)
    weight[5, column] = value
    weight[6, 0] = np.inf
    for spec in SPECS:
        with pytest.raises(SourceError, match=r"^row 5 holds an infinity or a NaN$"):
            engine(weight, spec)


@each_engine
@each_dtype
def test_the_way_weights_lie_in_memory_does_not_matter(engine: Engine, dtype: DType) -> None:
    weight = ordinary(dtype)
    wide = np.repeat(weight, 2, axis=1)
    read_only = weight.copy()
    read_only.flags.writeable = False
    views = [np.asfortranarray(weight), wide[:, ::2], weight[::-1, ::-1][::-1, ::-1], read_only]
    for spec in (Spec(FORMATS["int4"]), Spec(FORMATS["int8"], 32)):
        for view in views:
            assert_same(engine(view, spec), engine(weight, spec))


@each_engine
@each_dtype
def test_the_weights_are_left_alone(engine: Engine, dtype: DType) -> None:
    weight = nasty(dtype)["heavy tails"]
    before = weight.tobytes()
    for spec in SPECS:
        engine(weight, spec)
    assert weight.tobytes() == before


@each_dtype
def test_threads_and_repetitions_give_the_same_bytes(dtype: DType) -> None:
    weights = [ordinary(dtype, seed) for seed in range(8)] * 4
    spec = Spec(FORMATS["int4"], 32)
    expected = [rtn(weight, spec) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(lambda w: rtn(w, spec), weights), expected, strict=True):
            assert_same(one, other)


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


# ONNX Runtime's own tool.

Codes = npt.NDArray[np.uint8]


def quantized_by_onnxruntime(
    weight: npt.NDArray[np.float32], spec: Spec
) -> tuple[Codes, npt.NDArray[np.float32], Codes]:
    """Returns (codes [N, K], scales, zero points [N, K/block]) of the tool behind MatMulNBits.

    It leaves the zero points of symmetric codes at 0, for the one in the middle.
    """
    rows, columns = weight.shape
    bits, block, blocks = spec.format.bits, spec.block_size, spec.blocks(columns)
    packed = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    scales = np.zeros((rows, blocks), np.float32)
    points = np.zeros((rows, (blocks * bits + 7) // 8), np.uint8)
    tool = {2: quantize_matmul_2bits, 4: quantize_matmul_4bits, 8: quantize_matmul_8bits}[bits]
    transposed = np.ascontiguousarray(weight.T)
    tool(packed, transposed, scales, points, block, rows, columns, spec.symmetric)
    return unpack(packed.reshape(rows, -1), bits), scales, unpack(points, bits)[:, :blocks]


each_width = pytest.mark.parametrize("bits", [2, 4, 8])
each_block = pytest.mark.parametrize("block", [16, 32, 64, 128])


@each_width
@each_block
@pytest.mark.parametrize("name", ["ordinary", "heavy tails", "blocks of zeros"])
def test_blocks_equal_those_of_the_tool_of_onnxruntime(bits: int, block: int, name: str) -> None:
    weight = nasty(DTYPES[0])[name].astype(np.float32)
    ours = rtn(weight, Spec(FORMATS[f"int{bits}"], block))
    codes, scales, _ = quantized_by_onnxruntime(weight, ours.spec)
    np.testing.assert_array_equal(ours.scales, scales)
    np.testing.assert_array_equal(ours.codes, codes)


@each_width
@pytest.mark.parametrize("name", ["ties between codes", "ties of +m and -m"])
def test_only_exact_ties_may_round_unlike_the_tool_of_onnxruntime(bits: int, name: str) -> None:
    """It rounds them away from zero after adding the zero point, which is up; here, to even."""
    weight = nasty(DTYPES[0])[name].astype(np.float32)
    ours = rtn(weight, Spec(FORMATS[f"int{bits}"], 32))
    codes, scales, _ = quantized_by_onnxruntime(weight, ours.spec)
    np.testing.assert_array_equal(ours.scales, scales)
    steps = weight / np.repeat(scales, 32, axis=1)
    tied = (steps - np.floor(steps) == 0.5) & (steps < 2 ** (bits - 1) - 1)  # and not clipped
    np.testing.assert_array_equal(ours.codes[~tied], codes[~tied])
    np.testing.assert_array_equal(ours.codes[tied] % 2, 0)
    assert np.isin(codes[tied].astype(int) - ours.codes[tied], (0, 1)).all()


@each_width
@each_block
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("name", ["ordinary", "heavy tails", "blocks of zeros"])
def test_blocks_of_one_sign_equal_those_of_the_tool_with_zero_points(
    bits: int, block: int, sign: int, name: str
) -> None:
    """Their range is one number, so that there is one way to compute the scale."""
    weight = sign * np.abs(nasty(DTYPES[0])[name].astype(np.float32))
    ours = rtn(weight, Spec(FORMATS[f"int{bits}"], block, symmetric=False))
    codes, scales, points = quantized_by_onnxruntime(weight, ours.spec)
    assert ours.zero_points is not None
    np.testing.assert_array_equal(ours.scales, scales)
    np.testing.assert_array_equal(ours.zero_points, points)
    np.testing.assert_array_equal(ours.codes, codes)


@each_width
@each_block
@pytest.mark.parametrize("name", ["ordinary", "heavy tails", "blocks of zeros"])
def test_blocks_with_zero_points_nearly_equal_those_of_the_tool(
    bits: int, block: int, name: str
) -> None:
    """It subtracts before it divides, and so the scales differ in the last places.

    It also multiplies where it divides, and rounds code and zero point as one number, ties away
    from zero, where they are rounded one by one here, ties to even. So a weight within those last
    places of the middle between two codes may take either.
    """
    weight = nasty(DTYPES[0])[name].astype(np.float32)
    ours = rtn(weight, Spec(FORMATS[f"int{bits}"], block, symmetric=False))
    codes, scales, points = quantized_by_onnxruntime(weight, ours.spec)
    assert ours.zero_points is not None
    np.testing.assert_array_max_ulp(ours.scales.astype(np.float32), scales, 2)
    np.testing.assert_array_equal(ours.zero_points, points)
    steps = weight / np.repeat(np.where(scales == 0, 1, scales), block, axis=1).astype(float)
    tied = np.abs(steps - np.floor(steps) - 0.5) < 2**bits * 2.0**-21
    np.testing.assert_array_equal(ours.codes[~tied], codes[~tied])
    assert np.isin(codes[tied].astype(int) - ours.codes[tied], (-1, 0, 1)).all()
    assert tied.mean() < 1e-3
