"""The compiled engine rounds to the bytes that numpy writes, whatever comes in.

`test_rtn_definition`, `test_floats` and `test_layouts` hold what the numbers mean; here, that it
does not matter who computes them.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from qmoe_rules.errors import SourceError
from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers import engine
from qmoe_rules.quantizers.floats import float_rtn_numpy
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy
from qmoe_rules.testing import expert_shapes, expert_weights
from tests.engines import (
    COLUMNS,
    DTYPES,
    FLOAT_SPECS,
    SPECS,
    Weight,
    assert_same,
    each_dtype,
    in_numpy,
    weights,
)

pytestmark = pytest.mark.usefixtures("compiled_engine")


def every_finite_pattern(name: str) -> Weight:
    """All finite numbers of a 16-bit type in rows of 32: neighbours share a block."""
    patterns = np.arange(2**16, dtype=np.uint16).view(SCALE_DTYPES[name])
    finite = patterns[np.isfinite(patterns.astype(np.float32))]
    return finite.reshape(-1, 32)


def finite_weights(spec: Spec) -> SearchStrategy[Weight]:
    """Weights [N, K] of any finite numbers, of many shapes that a spec takes."""
    step = spec.format.codes_per_group
    if spec.block_size and not spec.format.square:
        step = int(np.lcm(step, spec.block_size))
    largest = max(200 // step, 1) * step
    shapes = expert_shapes(max_experts=1, max_rows=4, max_columns=largest, column_step=step)
    return expert_weights(shapes=shapes).map(lambda weight: weight[0])


# The same bytes.


@each_dtype
@pytest.mark.parametrize("seed", range(3))
def test_the_engine_writes_what_numpy_does(dtype: np.dtype, seed: int) -> None:
    weight = weights(dtype, seed)
    for spec in SPECS:
        assert_same(rtn(weight, spec), in_numpy(weight, spec))


@settings(max_examples=300)
@given(st.data(), st.sampled_from(SPECS))
def test_the_engine_writes_what_numpy_does_of_any_patterns(data: st.DataObject, spec: Spec) -> None:
    weight = data.draw(finite_weights(spec))
    assert_same(rtn(weight, spec), in_numpy(weight, spec))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("columns", [32, 31])
def test_every_16_bit_number_is_read_right(name: str, columns: int) -> None:
    """In whole vectors of a row and in what they leave over."""
    weight = every_finite_pattern(name)[:, :columns]
    for spec in (Spec(FORMATS["int8"], columns), Spec(FORMATS["int8"], columns, symmetric=False)):
        assert_same(rtn(weight, spec), rtn_numpy(weight, spec))
    for size in (1, 8):
        spec = Spec(FORMATS["fp8"], size)
        assert_same(rtn(weight, spec), float_rtn_numpy(weight, spec))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_scales_are_rounded_to_16_bits_as_numpy_rounds(name: str) -> None:
    """Float32 peaks at and beside the middle of neighbours, from subnormals to the largest."""
    instructions = importlib.import_module("qmoe_rules.quantizers._kernels.instructions")
    nearest, dtype = instructions.nearest, SCALE_DTYPES[name]

    def one_by_one(values: Any, least: Any, found: Any) -> None:
        for i in range(values.size):
            found[i] = nearest(values[i], least)

    rounded = importlib.import_module("numba").njit(one_by_one)
    last = int(np.array(np.inf, dtype).view(np.uint16)) - 1
    below = np.arange(0, last, 7, dtype=np.uint16)
    low, high = (each.view(dtype).astype(np.float64) for each in (below, below + np.uint16(1)))
    middle = ((low + high) / 2).astype(np.float32)
    near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
    values = np.concatenate([*near, low.astype(np.float32)])
    values = np.concatenate([values, -values])
    found = np.empty(values.shape, engine.patterns(np.zeros(1, dtype)).dtype)
    rounded(values, found.dtype.type(0), found)
    np.testing.assert_array_equal(found.view(np.uint16), values.astype(dtype).view(np.uint16))
    rounded(values, found.dtype.type(5), found)
    least = np.array([5], np.uint16).view(dtype)[0]
    expected = values.astype(dtype)
    small = np.abs(expected.astype(np.float32)) < np.float32(least)
    expected[small] = np.copysign(np.float32(least), values[small]).astype(dtype)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("name", ["e2m1", "e4m3"])
@each_dtype
def test_floating_point_codes_are_ml_dtypes_own(name: str, dtype: np.dtype) -> None:
    """Every 16-bit number, and float32 numbers at and beside the middle of neighbours."""
    format = FORMATS[{"e2m1": "mxfp4", "e4m3": "fp8"}[name]]
    if dtype.itemsize == 2:
        weight = every_finite_pattern(dtype.name)
    else:
        codes = np.arange(2 ** (format.bits - 1) - 1, dtype=np.uint8)
        middle = (format.decode(codes) + format.decode(codes + np.uint8(1))) / 2
        middle = middle[np.isfinite(middle)]
        beside = [np.nextafter(middle, np.float32(end)) for end in (0, np.inf)]
        values = np.concatenate([middle, *beside, np.array([0, 1e-45, 1e38, 3e38], np.float32)])
        weight = np.resize(np.concatenate([values, -values]), (32, 32))
    kernels: Any = engine.kernels()
    packed = np.empty((len(weight), 32 * format.bits // 8), np.uint8)
    steps = np.ones((len(weight), 1), np.float32)
    kernels.round_floats(engine.patterns(weight), steps, 32, 1, format.bits, packed)
    quantized = QuantizedWeights(packed, steps, Spec(format, 32))
    np.testing.assert_array_equal(quantized.codes, format.encode(weight.astype(np.float32)))


@each_dtype
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_the_first_row_that_is_not_finite_is_told(dtype: np.dtype, value: float) -> None:
    for spec in SPECS:
        for column in (0, 15, 16, COLUMNS - 1):
            weight = weights(dtype)
            weight[11, column] = value
            weight[12, 0] = np.inf
            with pytest.raises(SourceError, match=r"^row 11 holds an infinity or a NaN$"):
                rtn(weight, spec)


# What comes in and what is touched.


@each_dtype
def test_it_does_not_matter_how_weights_lie_in_memory(dtype: np.dtype) -> None:
    weight = weights(dtype)
    read_only = weight.copy()
    read_only.flags.writeable = False
    shifted = np.empty(weight.nbytes + 1, np.uint8)[1:]
    shifted[:] = weight.view(np.uint8).ravel()
    unaligned = shifted.view(dtype).reshape(weight.shape)
    assert not unaligned.flags.aligned
    views = {
        "Fortran": np.asfortranarray(weight),
        "every other column": np.repeat(weight, 2, axis=1)[:, ::2],
        "backwards": weight[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": read_only,
        "unaligned": unaligned,
    }
    for spec in (Spec(FORMATS["int4"], 32), Spec(FORMATS["int3"]), *FLOAT_SPECS):
        for view in views.values():
            assert_same(rtn(view, spec), rtn(weight, spec))


def test_sources_of_every_kind_meet_the_same_compiled_code() -> None:
    kernels: Any = engine.kernels()
    weight, spec = weights(DTYPES[0]), Spec(FORMATS["int4"], 32)
    rtn(weight, spec)
    compiled = len(kernels.round_integers.signatures)
    read_only = weight.copy()
    read_only.flags.writeable = False
    for each in (read_only, np.asfortranarray(weight), weight[::2]):
        rtn(each, spec)
    assert len(kernels.round_integers.signatures) == compiled


@pytest.mark.parametrize("columns", [2, 6, 14, 16, 18, 34])
def test_nothing_is_written_beside_the_bytes_of_an_array(columns: int) -> None:
    """A vector or an integer may reach beyond a row: into buffers, and nowhere else."""
    kernels: Any = engine.kernels()
    for bits in (2, 3, 4, 8):
        width = columns * 8  # fills whole bytes of any width
        weight = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
        whole = np.full((5, width * bits // 8), 0xA5, np.uint8)
        scales = np.full((5, 1), 7, np.uint32)
        kernels.round_integers(
            engine.patterns(weight),
            engine.infinity(weight.dtype),
            np.uint32(1),
            bits,
            width,
            True,
            whole[1:-1],
            scales[1:-1],
            None,
        )
        assert (whole[[0, -1]] == 0xA5).all()
        assert (scales[[0, -1]] == 7).all()
        expected = rtn_numpy(weight, Spec(FORMATS[f"int{bits}"], width))
        np.testing.assert_array_equal(whole[1:-1], expected.packed)


@each_dtype
def test_threads_give_the_same_bytes(dtype: np.dtype) -> None:
    sources = [weights(dtype, seed) for seed in range(6)] * 4
    for spec in (Spec(FORMATS["int4"], 32), Spec(FORMATS["nvfp4"], 16)):
        expected = [rtn(weight, spec) for weight in sources]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(rtn, sources, [spec] * len(sources)))
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
