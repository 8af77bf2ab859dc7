"""`QuantizedWeights.dequantize` against the definition, one element at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec, pack
from qmoe_rules.quantized import QuantizedWeights

COLUMNS = 64
SPECS = [Spec(FORMATS[name], block) for name in FORMATS for block in (0, 16, 64)]


def random_weights(
    spec: Spec, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> tuple[QuantizedWeights, npt.NDArray[np.uint8]]:
    """Random codes and signed scales for weights of `shape`, and the codes unpacked."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, spec.format.max_code + 1, shape, dtype=np.uint8)
    scales = rng.standard_normal((*shape[:-2], *spec.scales_shape(*shape[-2:]))).astype(dtype)
    return QuantizedWeights(pack(codes, spec.format.bits), scales, spec), codes


def by_the_definition(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.generic], spec: Spec
) -> npt.NDArray[np.float64]:
    """(code - 2^(bits-1)) * scale in float64, element by element."""
    meant = np.empty(codes.shape)
    for index in np.ndindex(codes.shape):
        *row, k = index
        place = (*row, k // spec.block_size) if spec.block_size else tuple(row)
        meant[index] = (int(codes[index]) - 2 ** (spec.format.bits - 1)) * float(scales[place])
    return meant


@pytest.mark.parametrize("experts", [(), (3,), (2, 3)], ids=["one", "experts", "layers"])
@pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dequantize_is_code_minus_zero_point_times_scale(
    spec: Spec, dtype: np.dtype[np.generic], experts: tuple[int, ...]
) -> None:
    quantized, codes = random_weights(spec, dtype, (*experts, 5, COLUMNS))
    meant = by_the_definition(codes, quantized.scales, spec)
    weight = quantized.dequantize()
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, meant.astype(np.float32))  # one correct rounding
    np.testing.assert_array_equal(quantized.codes, codes)
    if dtype.itemsize == 2:
        np.testing.assert_array_equal(weight.astype(np.float64), meant)  # and none here: exact


def test_a_worked_example() -> None:
    spec = Spec(FORMATS["int4"], 16)
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    scales = np.array([[0.5, -2.0]], np.float16)
    weight = QuantizedWeights(pack(codes, 4), scales, spec).dequantize()
    assert weight[0, [0, 8, 15, 16, 24, 31]].tolist() == [-4.0, 0.0, 3.5, 16.0, 0.0, -14.0]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_stack_of_experts_means_what_its_experts_mean(spec: Spec) -> None:
    stack, _ = random_weights(spec, np.dtype(np.float32), (4, 6, COLUMNS))
    for expert, weight in enumerate(stack.dequantize()):
        alone = QuantizedWeights(stack.packed[expert], stack.scales[expert], spec)
        np.testing.assert_array_equal(weight, alone.dequantize())


@pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_points_take_the_place_of_the_formats_own(
    spec: Spec, dtype: np.dtype[np.generic]
) -> None:
    symmetric, codes = random_weights(spec, dtype, (2, 6, COLUMNS))
    rng = np.random.default_rng(1)
    scales = symmetric.scales
    points = rng.integers(0, spec.format.max_code + 1, scales.shape, dtype=np.uint8)
    weight = QuantizedWeights(symmetric.packed, scales, spec, points).dequantize()
    assert weight.dtype == np.float32
    for index in np.ndindex(codes.shape):
        *row, k = index
        place = (*row, k // spec.block_size) if spec.block_size else tuple(row)
        meant = np.float32(int(codes[index]) - int(points[place])) * np.float32(scales[place])
        assert weight[index] == meant
    middle = np.full(scales.shape, spec.format.zero_point, np.uint8)
    stated = QuantizedWeights(symmetric.packed, scales, spec, middle)
    np.testing.assert_array_equal(stated.dequantize(), symmetric.dequantize())
