"""Round to nearest as ONNX Runtime's own tool does it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from onnxruntime.capi._pybind_state import (
    quantize_matmul_2bits,
    quantize_matmul_4bits,
    quantize_matmul_8bits,
)

from qmoe_rules.formats import FORMATS, Spec, unpack
from qmoe_rules.quantizers.rtn import rtn
from tests.rounding import DTYPES, nasty

pytestmark = pytest.mark.usefixtures("compiled_engine")


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
