"""Round to nearest: its algebra, and weights of every kind and place in memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qmoe_rules.errors import SourceError
from qmoe_rules.formats import FORMATS, Spec, pack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers.rtn import rtn
from tests.rounding import (
    ASYMMETRIC,
    COLUMNS,
    DTYPES,
    ROWS,
    SIGNED,
    SPECS,
    DType,
    Engine,
    assert_same,
    each_dtype,
    each_engine,
    each_spec,
    limits,
    nasty,
    ordinary,
)

pytestmark = pytest.mark.usefixtures("compiled_engine")


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
