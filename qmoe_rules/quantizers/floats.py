"""Round to nearest into floating-point codes: mxfp4, nvfp4 and fp8.

mxfp4: the scale of a block is the power of two 2^(floor(log2(max|w|)) - 2), as the OCP
Microscaling specification defines it (section 6.3). Weights that are mxfp4 values already come
through exactly. nvfp4: the expert's scale, max|w| / (6 * 448), leaves the block scales
max|w| / 6 the whole range of float8e4m3fn. fp8: max|w| / 448, in float32, for every square block or
for the expert.

A code is the float nearest to weight / step, where step is what a code of 1 means. The laws of the
scales are written once, in numpy; what takes time, the peaks and the codes, is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec, pack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers._checks import check, finite_float32, not_finite
from qmoe_rules.quantizers.engine import infinity, kernels, patterns

__all__ = ["float_rtn", "float_rtn_numpy"]

Float32 = npt.NDArray[np.float32]

_SMALLEST_NORMAL = np.float32(2.0**-126)
_E4M3_MAX, _E4M3_SMALLEST = np.float32(448), np.float32(2.0**-9)
_E8M0_EXPONENTS = (-127, 127)


class _Scales(NamedTuple):
    """The scales of one expert.

    Attributes:
        stored: As they are stored, one per block.
        steps: What a code of 1 means, float32, one per block.
        whole: The expert's scale; None where the format has none.
    """

    stored: npt.NDArray[np.generic]
    steps: Float32
    whole: Float32 | None = None


def float_rtn(weight: npt.NDArray[np.generic], spec: Spec) -> QuantizedWeights:
    """Quantizes one expert's weights to the nearest floating-point code, ties to even.

    Args:
        weight: [N, K] float32, float16 or bfloat16.
        spec: A format with floating-point codes, and its block size.

    Raises:
        SourceError: The weights hold an infinity or a NaN.
        ValueError: The weights have another type or a shape that `spec` cannot hold.
    """
    check(weight, spec)
    engine = kernels()
    if engine is None:
        return float_rtn_numpy(weight, spec)
    rows, columns = weight.shape
    band, block = _reach(spec, rows, columns)
    bits = patterns(weight)
    peaks = np.zeros((-(-rows // band), -(-columns // block)), np.float32)
    bad_row = engine.block_peaks(bits, infinity(weight.dtype), block, band, peaks)
    if bad_row >= 0:
        raise not_finite(bad_row)
    scales = _LAWS[spec.format.quant_type](peaks, spec)
    packed = np.empty(spec.packed_shape(rows, columns), np.uint8)
    engine.round_floats(bits, scales.steps, block, band, spec.format.bits, packed)
    return _quantized(packed, scales, spec)


def float_rtn_numpy(weight: npt.NDArray[np.generic], spec: Spec) -> QuantizedWeights:
    """The meaning of `float_rtn`, in plain numpy; byte-equal to it, and its stand-in."""
    check(weight, spec)
    values = finite_float32(weight)
    rows, columns = values.shape
    band, block = _reach(spec, rows, columns)
    padded = np.pad(np.abs(values), ((0, -rows % band), (0, -columns % block)))
    blocks = padded.reshape(padded.shape[0] // band, band, padded.shape[1] // block, block)
    scales = _LAWS[spec.format.quant_type](blocks.max(axis=(1, 3)), spec)
    steps = np.repeat(np.repeat(scales.steps, band, axis=0)[:rows], block, axis=1)[:, :columns]
    quotient = np.zeros_like(values)
    np.divide(values, steps, out=quotient, where=steps != 0)
    codes = spec.format.encode(quotient)
    return _quantized(pack(codes, spec.format.bits), scales, spec)


def _reach(spec: Spec, rows: int, columns: int) -> tuple[int, int]:
    """Returns the rows and the columns that share a scale."""
    if not spec.format.square:
        return 1, spec.block_size
    return spec.block_size or rows, spec.block_size or columns


def _quantized(packed: npt.NDArray[np.uint8], scales: _Scales, spec: Spec) -> QuantizedWeights:
    stored = scales.stored if spec.has_scales else scales.stored.reshape(())
    return QuantizedWeights(packed, stored, spec, global_scale=scales.whole)


def _mxfp4(peaks: Float32, spec: Spec) -> _Scales:
    _, exponent = np.frexp(peaks)  # peak = m * 2^exponent with m in [1/2, 1)
    exponent = np.where(peaks > 0, np.clip(exponent - 3, *_E8M0_EXPONENTS), 0)
    steps = np.ldexp(np.float32(1), exponent)
    return _Scales(steps.astype(ml_dtypes.float8_e8m0fnu), steps, np.asarray(np.float32(1)))


def _nvfp4(peaks: Float32, spec: Spec) -> _Scales:
    top = np.float32(spec.format.max_value)
    whole = max(np.float32(peaks.max() / (top * _E4M3_MAX)), _SMALLEST_NORMAL)
    stored = np.minimum(peaks / top / whole, _E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    stored[(peaks > 0) & (stored == 0)] = _E4M3_SMALLEST
    return _Scales(stored, stored.astype(np.float32) * whole, np.asarray(whole))


def _fp8(peaks: Float32, spec: Spec) -> _Scales:
    steps = peaks / np.float32(spec.format.max_value)
    return _Scales(steps, steps)


_LAWS: dict[str, Callable[[Float32, Spec], _Scales]] = {
    "fp4": _mxfp4,
    "nvfp4": _nvfp4,
    "fp8": _fp8,
}
