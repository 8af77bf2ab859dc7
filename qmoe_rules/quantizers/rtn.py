"""Round to nearest, as ONNX Runtime's own tools define it.

One scale per row is positive, max|w| / 2^(bits-1); one scale per block is signed, so that it maps
the element of largest magnitude to the lowest code, -2^(bits-1) (the definition of ONNX Runtime's
`quantize_matmul_{4,8}bits`; a negative element wins a tie). The signed scale uses the code that
the positive one wastes and costs nothing; per row the positive scale is the safer of the two.

With zero points the codes reach from the least to the greatest weight, zero always among them:
scale = (high - low) / (2^bits - 1), zero_point = round(-low / scale).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec, pack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers._checks import check, finite_float32, not_finite
from qmoe_rules.quantizers.engine import infinity, kernels, patterns
from qmoe_rules.quantizers.floats import float_rtn
from qmoe_rules.statistics import Statistics

__all__ = ["rtn", "rtn_numpy", "smallest_scale"]


def smallest_scale(dtype: np.dtype) -> np.float32:
    """Returns the smallest magnitude that a scale of a block that is not all zero may have.

    It is the smallest positive number of the type, and never below float32's smallest normal
    number, so that its reciprocal is finite. A peak whose scale would underflow takes it instead
    of 0, which would erase the block.
    """
    smallest = 2.0**-24 if dtype == np.float16 else 2.0**-126
    return np.float32(smallest)


def rtn(
    weight: npt.NDArray[np.generic], spec: Spec, statistics: Statistics | None = None
) -> QuantizedWeights:
    """Quantizes one expert's weights to the nearest code.

    Args:
        weight: [N, K] float32, float16 or bfloat16, C-contiguous rows. K is divisible by the block.
        spec: The format and block size.
        statistics: Not used: what is nearest does not depend on it.

    Returns:
        The codes and the scales, which have the weight's dtype.

    Raises:
        SourceError: The weights hold an infinity or a NaN.
        ValueError: The weights have another type or a shape that `spec` cannot hold.
    """
    check(weight, spec)
    if spec.format.element is not None:
        return float_rtn(weight, spec)
    engine = kernels()
    if engine is None:
        return rtn_numpy(weight, spec)
    rows, columns = weight.shape
    bits = patterns(weight)
    scales = np.empty((rows, spec.blocks(columns)), weight.dtype)
    points = None if spec.symmetric else np.empty(scales.shape, np.uint8)
    packed = np.empty(spec.packed_shape(rows, columns), np.uint8)
    bad_row = engine.round_integers(
        bits,
        infinity(weight.dtype),
        np.asarray(smallest_scale(weight.dtype), weight.dtype).view(bits.dtype)[()],
        spec.format.bits,
        spec.block_size or columns,
        _is_signed(spec),
        packed,
        scales.view(bits.dtype),
        points,
    )
    if bad_row >= 0:
        raise not_finite(bad_row)
    shape = spec.scales_shape(rows, columns)
    stored = None if points is None else points.reshape(shape)
    return QuantizedWeights(packed, scales.reshape(shape), spec, stored)


def rtn_numpy(weight: npt.NDArray[np.generic], spec: Spec) -> QuantizedWeights:
    """The meaning of `rtn` for integers, in plain numpy; byte-equal to it, and its stand-in.

    Every step is one float32 operation. The scale is rounded to the weight's dtype; then
    code = round_half_even(weight * (1 / scale)) + zero_point, clipped.
    """
    check(weight, spec)
    rows, columns = weight.shape
    blocks = finite_float32(weight).reshape(rows, spec.blocks(columns), -1)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    exact = _signed_scales(low, high, spec) if spec.symmetric else _ranges(low, high, spec)
    scales = exact.astype(weight.dtype)
    floor = smallest_scale(weight.dtype)
    lost = ((low < 0) | (high > 0)) & (np.abs(scales.astype(np.float32)) < floor)
    scales[lost] = np.copysign(floor, exact[lost]).astype(weight.dtype)
    value = scales.astype(np.float32)
    inverse = np.divide(np.float32(1), value, out=np.zeros_like(value), where=value != 0)
    points: npt.NDArray[np.floating] = np.full(scales.shape, np.float32(spec.format.zero_point))
    if not spec.symmetric:
        points = np.clip(np.rint(-np.minimum(low, 0) * inverse), 0, spec.format.max_code)
    codes = np.rint(blocks * inverse[..., None]) + points[..., None]
    packed = pack(spec.format.encode(codes).reshape(rows, columns), spec.format.bits)
    shape = spec.scales_shape(rows, columns)
    stored = None if spec.symmetric else points.astype(np.uint8).reshape(shape)
    return QuantizedWeights(packed, scales.reshape(shape), spec, stored)


def _signed_scales(
    low: npt.NDArray[np.float32], high: npt.NDArray[np.float32], spec: Spec
) -> npt.NDArray[np.float32]:
    peak = np.where(-low >= high, low, high)
    peak[peak == 0] = np.float32(-0.0)  # whatever the signs of the zeros, their scale is +0
    half_range = np.float32(spec.format.zero_point)
    scales = (-peak if _is_signed(spec) else np.abs(peak)) / half_range
    return scales.astype(np.float32, copy=False)


def _is_signed(spec: Spec) -> bool:
    return bool(spec.block_size) and spec.signed


def _ranges(
    low: npt.NDArray[np.float32], high: npt.NDArray[np.float32], spec: Spec
) -> npt.NDArray[np.float32]:
    steps = np.float32(spec.format.max_code)
    # Divided before they are subtracted: the range of float32 weights may overflow. Without the
    # sign that a negative zero may leave.
    scales = np.abs(np.maximum(high, 0) / steps - np.minimum(low, 0) / steps)
    return scales.astype(np.float32, copy=False)
