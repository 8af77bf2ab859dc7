"""Round to nearest into floating-point codes: mxfp4, nvfp4 and fp8.

mxfp4: the scale of a block is the power of two 2^(floor(log2(max|w|)) - 2), as the OCP
Microscaling specification defines it (section 6.3). Weights that are mxfp4 values already come
through exactly. nvfp4: the expert's scale, max|w| / (6 * 448), leaves the block scales
max|w| / 6 the whole range of float8e4m3fn. fp8: max|w| / 448, in float32, for every square block or
for the expert.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec, pack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers._checks import check, finite_float32

__all__ = ["float_rtn"]

Float32 = npt.NDArray[np.float32]

_SMALLEST_NORMAL = np.float32(2.0**-126)
_E4M3_MAX, _E4M3_SMALLEST = np.float32(448), np.float32(2.0**-9)
_E8M0_EXPONENTS = (-127, 127)


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
    return _BY_QUANT_TYPE[spec.format.quant_type](finite_float32(weight), spec)


def _mxfp4(values: Float32, spec: Spec) -> QuantizedWeights:
    blocks = values.reshape(len(values), -1, spec.block_size)
    peak = np.abs(blocks).max(axis=2)
    _, exponent = np.frexp(peak)  # peak = m * 2^exponent with m in [1/2, 1)
    exponent = np.where(peak > 0, np.clip(exponent - 3, *_E8M0_EXPONENTS), 0)
    codes = spec.format.encode(np.ldexp(blocks, -exponent[..., None])).reshape(values.shape)
    scales = np.ldexp(np.float32(1), exponent).astype(ml_dtypes.float8_e8m0fnu)
    return QuantizedWeights(pack(codes, 4), scales, spec, global_scale=np.asarray(np.float32(1)))


def _nvfp4(values: Float32, spec: Spec) -> QuantizedWeights:
    blocks = values.reshape(len(values), -1, spec.block_size)
    peak = np.abs(blocks).max(axis=2)
    top = np.float32(spec.format.max_value)
    whole = max(np.float32(peak.max() / (top * _E4M3_MAX)), _SMALLEST_NORMAL)
    scales = np.minimum(peak / top / whole, _E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    scales[(peak > 0) & (scales == 0)] = _E4M3_SMALLEST
    step = scales.astype(np.float32) * whole
    codes = spec.format.encode(_divided(blocks, step[..., None])).reshape(values.shape)
    return QuantizedWeights(pack(codes, 4), scales, spec, global_scale=np.asarray(whole))


def _fp8(values: Float32, spec: Spec) -> QuantizedWeights:
    top = np.float32(spec.format.max_value)
    if not spec.block_size:
        whole = np.float32(np.abs(values).max() / top)
        codes = spec.format.encode(_divided(values, whole))
        return QuantizedWeights(codes, np.asarray(whole), spec)
    rows, columns = values.shape
    size = spec.block_size
    padded = np.pad(np.abs(values), ((0, -rows % size), (0, -columns % size)))
    tiles = padded.reshape(spec.blocks(rows), size, spec.blocks(columns), size)
    scales = tiles.max(axis=(1, 3)) / top
    step = np.repeat(np.repeat(scales, size, axis=0)[:rows], size, axis=1)[:, :columns]
    return QuantizedWeights(spec.format.encode(_divided(values, step)), scales, spec)


def _divided(values: Float32, step: npt.NDArray[np.float32] | np.float32) -> Float32:
    """Returns values / step, and 0 where the step is 0."""
    quotient = np.zeros_like(values)
    np.divide(values, step, out=quotient, where=np.broadcast_to(step, values.shape) != 0)
    return quotient


_BY_QUANT_TYPE: dict[str, Callable[[Float32, Spec], QuantizedWeights]] = {
    "fp4": _mxfp4,
    "nvfp4": _nvfp4,
    "fp8": _fp8,
}
