"""The compiled engine: one family of numba kernels for every width and weight type.

Weights come as their bit patterns (uint16 for float16 and bfloat16, uint32 for float32), because
numba has no 16-bit floats, and because the peak of a block is cheapest as an integer maximum: a
pattern rotated left by one bit orders by magnitude first and by sign last, and shows infinities
and NaN as keys at or above the rotated infinity. Every kernel works on one row at a time with
row-sized buffers, so that the intermediate values never leave the first-level cache.

`rtn.rtn_numpy` is the meaning of these kernels; the tests hold the two byte-equal.
"""

from __future__ import annotations

import platform
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as llvm_ir
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["BFLOAT16", "FLOAT16", "FLOAT32", "rtn_rows"]

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2

# 1.5 * 2^23: adding it to |x| < 2^22 rounds x to the nearest integer, ties to even, and leaves
# that integer in the low bits of the sum's pattern.
_ROUNDER = np.float32(12582912.0)
_ROUNDER_BITS = np.int32(0x4B400000)
_SMALLEST_NORMAL_FLOAT32 = np.float32(2.0**-126)
_SMALLEST_SUBNORMAL_FLOAT16 = np.float32(2.0**-24)

_HAS_NATIVE_HALF = bool(llvm.get_host_cpu_features().get("f16c")) or platform.machine() in (
    "aarch64",
    "arm64",
)


def _jit(function: Any) -> Any:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep compiled code in: compile again in every process
        return njit(**options)(function)


@intrinsic
def _as_float(_context: Any, _bits: Any) -> Any:
    """Reinterprets a uint32 pattern as float32."""

    def codegen(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], llvm_ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _as_bits(_context: Any, _value: Any) -> Any:
    """Reinterprets a float32 as its uint32 pattern."""

    def codegen(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], llvm_ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _native_half_to_float(_context: Any, _bits: Any) -> Any:
    """Converts a float16 pattern with the processor's own instruction (F16C, or any Arm64)."""

    def codegen(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        half = builder.bitcast(arguments[0], llvm_ir.HalfType())
        return builder.fpext(half, llvm_ir.FloatType())

    return types.float32(types.uint16), codegen


if _HAS_NATIVE_HALF:

    @_jit
    def _half_to_float(bits: Any) -> Any:
        return _native_half_to_float(np.uint16(bits))

else:

    @_jit
    def _half_to_float(bits: Any) -> Any:
        # Widening the exponent field by a multiplication also normalizes the subnormals.
        wide = np.uint32(bits)
        magnitude = _as_float(np.uint32((wide & np.uint32(0x7FFF)) << np.uint32(13)))
        sign = np.uint32((wide & np.uint32(0x8000)) << np.uint32(16))
        return _as_float(np.uint32(_as_bits(np.float32(magnitude * np.float32(2.0**112))) | sign))


@_jit
def _decode(row: Any, kind: int, values: Any) -> None:
    """Writes a row of patterns as float32 values."""
    if kind == FLOAT32:
        for i in range(row.size):
            values[i] = _as_float(np.uint32(row[i]))
    elif kind == FLOAT16:
        for i in range(row.size):
            values[i] = _half_to_float(np.uint16(row[i]))
    else:
        for i in range(row.size):
            values[i] = _as_float(np.uint32(np.uint32(row[i]) << np.uint32(16)))


@_jit
def _peak16(row: Any) -> Any:
    """Returns the largest rotated key of 16-bit patterns: magnitude first, then sign."""
    peak = np.uint16(0)
    for i in range(row.size):
        key = np.uint16((row[i] << np.uint16(1)) | (row[i] >> np.uint16(15)))
        peak = max(peak, key)
    return np.uint32(peak)


@_jit
def _peak32(row: Any) -> Any:
    """Returns the largest rotated key of 32-bit patterns."""
    peak = np.uint32(0)
    for i in range(row.size):
        key = np.uint32((row[i] << np.uint32(1)) | (row[i] >> np.uint32(31)))
        peak = max(peak, key)
    return peak


@_jit
def _peak(row: Any, kind: int) -> Any:
    """Returns (finite, value): the largest-magnitude element; the negative one wins a tie."""
    if kind == FLOAT32:
        key = _peak32(row)
        finite = key < np.uint32(0xFF000000)
        return finite, _as_float(np.uint32((key >> np.uint32(1)) | (key << np.uint32(31))))
    key = _peak16(row)
    bits = np.uint32((key >> np.uint32(1)) | ((key & np.uint32(1)) << np.uint32(15)))
    if kind == FLOAT16:
        return key < np.uint32(0xF800), _half_to_float(np.uint16(bits))
    return key < np.uint32(0xFF00), _as_float(np.uint32(bits << np.uint32(16)))


@_jit
def _encode_scale(scale: Any, kind: int) -> Any:
    """Returns (pattern, value) of a float32 scale rounded to its stored type, ties to even."""
    bits = _as_bits(np.float32(scale))
    if kind == FLOAT32:
        return bits, np.float32(scale)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    if kind == BFLOAT16:
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        pattern = np.uint32((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return pattern, _as_float(np.uint32(pattern << np.uint32(16)))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if magnitude < np.uint32(0x38800000):  # below 2^-14 a float16 is a multiple of 2^-24
        pattern = np.uint32(np.rint(_as_float(magnitude) * np.float32(2.0**24)))
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        rounded = np.uint32(magnitude + np.uint32(0xFFF) + odd)
        pattern = np.uint32((rounded - np.uint32(0x38000000)) >> np.uint32(13))
    pattern = np.uint32(pattern | sign)
    return pattern, _half_to_float(np.uint16(pattern))


@_jit
def _scale_of(peak: Any, bits: int, signed: bool, kind: int) -> Any:
    """Returns (pattern, value) of the scale that reaches `peak`; see `rtn.rtn_numpy`."""
    if peak == np.float32(0.0):
        return np.uint32(0), np.float32(0.0)
    half_range = np.float32(1 << (bits - 1))
    scale = np.float32(-peak / half_range) if signed else np.float32(abs(peak) / half_range)
    pattern, value = _encode_scale(scale, kind)
    smallest = _SMALLEST_SUBNORMAL_FLOAT16 if kind == FLOAT16 else _SMALLEST_NORMAL_FLOAT32
    if abs(value) < smallest:  # the peak tells the sign, even where the scale became zero
        negative = signed and peak > np.float32(0.0)
        pattern, value = _encode_scale(-smallest if negative else smallest, kind)
    return pattern, value


@_jit
def _encode(values: Any, inverse: Any, zero_point: int, max_code: int, codes: Any) -> None:
    """Writes round(value / scale) + zero_point, clipped to the codes, as uint8."""
    offset = np.int32(zero_point) - _ROUNDER_BITS
    for i in range(values.size):
        shifted = np.float32(np.float32(values[i] * inverse) + _ROUNDER)
        code = np.int32(np.int32(_as_bits(shifted)) + offset)
        codes[i] = np.uint8(min(max(code, np.int32(0)), np.int32(max_code)))


@_jit
def _pack(codes: Any, bits: int, packed: Any) -> None:
    """Packs a row of codes, least significant bits first."""
    if bits == 8:
        packed[:] = codes
    elif bits == 4:
        pairs = codes.view(np.uint16)
        for i in range(packed.size):
            packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


@_jit
def rtn_rows(
    weight: Any, kind: int, bits: int, block: int, signed: bool, packed: Any, scales: Any
) -> int:
    """Quantizes rows to nearest.

    Args:
        weight: Patterns [N, K]: uint32 for float32, uint16 for float16 and bfloat16.
        kind: `FLOAT32`, `FLOAT16` or `BFLOAT16`.
        bits: Width of a code, 4 or 8.
        block: Columns that share a scale; divides K.
        signed: Whether a scale takes the sign that maps the peak to the lowest code.
        packed: uint8 [N, K*bits/8], written.
        scales: Patterns [N, K/block] of the weight's type, written.

    Returns:
        -1, or the first row that holds an infinity or a NaN; what was written is then void.
    """
    rows, columns = weight.shape
    values = np.empty(columns, np.float32)
    codes = np.empty(columns, np.uint8)
    zero_point = 1 << (bits - 1)
    max_code = (1 << bits) - 1
    for n in range(rows):
        row = weight[n]
        _decode(row, kind, values)
        for b in range(columns // block):
            start, stop = b * block, (b + 1) * block
            finite, peak = _peak(row[start:stop], kind)
            if not finite:
                return n
            pattern, scale = _scale_of(peak, bits, signed, kind)
            scales[n, b] = pattern
            inverse = np.float32(1.0) / scale if scale != np.float32(0.0) else np.float32(0.0)
            _encode(values[start:stop], inverse, zero_point, max_code, codes[start:stop])
        _pack(codes, bits, packed[n])
    return -1
