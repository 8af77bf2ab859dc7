"""Round to nearest, compiled: one family of kernels for every format, width and weight type.

A weight comes as its bit patterns, because numba has no 16-bit floats (`instructions` says which
integer stands for which float). A row takes four steps, each a loop over buffers that stay in the
first-level cache:

1. peaks: the greatest of every block, as keys: integers that order as the weights do, and show
   infinities and NaN on the way;
2. scales, of all blocks of the row;
3. codes, one byte each;
4. pack: the codes that share bytes become one integer, whose bytes are stored.

Step 1 works on `LANES` columns at once, step 3 on as many or, for integers, on `WIDE`. A step may
write a vector beyond its block or row: the next block writes over it, and buffers are a vector too
long.

What is exact: keys are integers; a 16-bit float becomes a float32 without rounding;
every other step is the one float32 operation that numpy does. So `rtn.rtn_numpy` and the numpy
half of `floats` are the meaning of these kernels, byte for byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qmoe_rules.quantizers._kernels.compiling import jit
from qmoe_rules.quantizers._kernels.instructions import (
    LANES,
    ROUNDER,
    ROUNDER_BITS,
    WIDE,
    as_bits,
    by_negated,
    by_size,
    by_value,
    e2m1_codes,
    e4m3_codes,
    float_of,
    from_size,
    from_value,
    greatest_by_size,
    greatest_by_value,
    greatest_negated,
    integer_codes,
    nearest,
    prefetch,
    put,
)

__all__ = ["block_peaks", "round_floats", "round_integers"]


@jit
def _copy(source: Any, target: Any) -> None:
    """Copies a row: numba's own assignment of slices does so value by value."""
    for i in range(source.size):
        target[i] = source[i]


@jit
def _peaks(line: Any, block: int, infinity: Any, tops: Any) -> None:
    """Writes the greatest key by size of every block."""
    for b in range(tops.size):
        start = b * block
        if block >= LANES:
            tops[b] = greatest_by_size(line, start, start + block, infinity)
        else:
            tops[b] = by_size(line[start], infinity)
            for i in range(start + 1, start + block):
                tops[b] = max(tops[b], by_size(line[i], infinity))


@jit
def _extremes(line: Any, block: int, infinity: Any, highs: Any, drops: Any) -> None:
    """Writes the greatest key by value of every block, and that of the block negated."""
    for b in range(highs.size):
        start = b * block
        if block >= LANES:
            highs[b] = greatest_by_value(line, start, start + block, infinity)
            drops[b] = greatest_negated(line, start, start + block, infinity)
        else:
            highs[b], drops[b] = by_value(line[start], infinity), by_negated(line[start], infinity)
            for i in range(start + 1, start + block):
                highs[b] = max(highs[b], by_value(line[i], infinity))
                drops[b] = max(drops[b], by_negated(line[i], infinity))


@jit
def _reciprocals(scales: Any, inverses: Any) -> None:
    for b in range(scales.size):
        scale = float_of(scales[b])
        inverse = np.float32(1) / scale
        inverses[b] = inverse if scale != np.float32(0) else np.float32(0)


@jit
def _symmetric_scales(
    peaks: Any, reach: Any, signed: bool, least: Any, scales: Any, inverses: Any
) -> None:
    """Writes the scales that send a peak to the lowest code, or |peak| where none is signed."""
    for b in range(peaks.size):
        peak = float_of(from_size(peaks[b], least))
        exact = -peak / reach if signed else abs(peak) / reach
        scales[b] = nearest(exact, least)
        if peak == np.float32(0):
            scales[b] = 0
    _reciprocals(scales, inverses)


@jit
def _asymmetric_scales(
    highs: Any, drops: Any, steps: Any, least: Any, scales: Any, inverses: Any, points: Any
) -> None:
    """Writes scales and zero points of codes from the least to the greatest weight, 0 included.

    `highs` are keys of the greatest weights, `drops` of the least ones negated.
    """
    zero = np.float32(0)
    for b in range(highs.size):
        high = max(float_of(from_value(highs[b], least)), zero)
        drop = max(float_of(from_value(drops[b], least)), zero)
        scales[b] = nearest(high / steps + drop / steps, least)
        if max(high, drop) == zero:
            scales[b] = 0
    _reciprocals(scales, inverses)
    for b in range(highs.size):
        drop = max(float_of(from_value(drops[b], least)), zero)
        point = np.int32(as_bits(drop * inverses[b] + ROUNDER)) - ROUNDER_BITS
        points[b] = min(point, np.int32(steps))


@jit
def _buffers(columns: int) -> Any:
    """Returns buffers for the codes of a row and for its packed bytes."""
    size = (columns // WIDE + 2) * WIDE
    return np.zeros(size, np.uint8), np.zeros(size, np.uint8)


@jit
def _pack(codes: Any, bits: int, buffer: Any, packed: Any) -> None:
    """Packs a row of codes, least significant bits first.

    Codes of 4 bits pair by pair. Of 2 and 3 bits every eight codes become the low `bits` bytes of
    one integer, in three halvings; where three bytes are stored, what is written beyond them is
    written over by the next ones.
    """
    if bits == 8:
        _copy(codes[: packed.size], packed)
        return
    if bits == 4:
        pairs = codes.view(np.uint16)
        for i in range(packed.size):
            packed[i] = pairs[i] | (pairs[i] >> np.uint16(4))
        return
    words = codes.view(np.uint64)
    gap = 8 - bits
    pair = np.uint64(((1 << (2 * bits)) - 1) * 0x0001000100010001)
    quad = np.uint64(((1 << (4 * bits)) - 1) * 0x0000000100000001)
    for i in range(words.size):
        word = words[i]
        word = (word | (word >> np.uint64(gap))) & pair
        word = (word | (word >> np.uint64(2 * gap))) & quad
        words[i] = word | (word >> np.uint64(4 * gap))
    if bits == 2:
        _copy(words, buffer.view(np.uint16))
    else:
        for i in range(words.size):
            put(buffer, i * bits, words[i])
    _copy(buffer[: packed.size], packed)


@jit
def round_integers(
    weight: Any,
    infinity: Any,
    least: Any,
    bits: int,
    block: int,
    signed: bool,
    packed: Any,
    scales: Any,
    points: Any,
) -> int:
    """Quantizes rows to the nearest integer codes.

    Args:
        weight: Patterns [N, K].
        infinity: The pattern of infinity, unsigned.
        least: The pattern of the smallest scale of a block that is not all zero.
        bits: Width of a code, 2, 3, 4 or 8.
        block: Columns that share a scale; divides K.
        signed: Whether a scale takes the sign that sends the peak to the lowest code.
        packed: uint8 [N, K*bits/8], written.
        scales: Patterns [N, K/block], written.
        points: Zero points, uint8 [N, K/block], written; None where codes are symmetric.

    Returns:
        -1, or the first row that holds an infinity or a NaN; what was written is then void.
    """
    rows, columns = weight.shape
    blocks = columns // block
    line = np.empty(columns + WIDE, weight.dtype)
    tops, others = np.full(blocks, infinity), np.full(blocks, infinity)
    inverses = np.empty(blocks, np.float32)
    codes, buffer = _buffers(columns)
    top = np.uint8((1 << bits) - 1)
    point = np.int32(1 << (bits - 1))
    for n in range(rows):
        _copy(weight[n], line)
        if points is None:
            _peaks(line, block, infinity, tops)
            if tops.max() >= by_size(infinity, infinity):
                return n
            _symmetric_scales(tops, np.float32(point), signed, least, scales[n], inverses)
        else:
            _extremes(line, block, infinity, tops, others)
            if max(tops.max(), others.max()) >= by_value(infinity, infinity):
                return n
            _asymmetric_scales(tops, others, np.float32(top), least, scales[n], inverses, points[n])
        for b in range(blocks):
            if points is not None:
                point = np.int32(points[n, b])
            offset = point - ROUNDER_BITS
            for start in range(b * block, (b + 1) * block, WIDE):
                prefetch(weight[n], columns + start)
                integer_codes(line, start, inverses[b], offset, top, codes)
        _pack(codes, bits, buffer, packed[n])
    return -1


@jit
def block_peaks(weight: Any, infinity: Any, block: int, band: int, peaks: Any) -> int:
    """Finds the greatest magnitude of every block.

    Args:
        weight: Patterns [N, K].
        infinity: The pattern of infinity, unsigned.
        block: Columns of a block; the last one may be short.
        band: Rows of a block; the last one may be short.
        peaks: float32 [ceil(N/band), ceil(K/block)], zeros, written.

    Returns:
        -1, or the first row that holds an infinity or a NaN; what was written is then void.
    """
    blocks = peaks.shape[1]
    line, tops = np.zeros(blocks * block, weight.dtype), np.full(blocks, infinity)
    for n in range(len(weight)):
        _copy(weight[n], line)
        _peaks(line, block, infinity, tops)
        if tops.max() >= by_size(infinity, infinity):
            return n
        band_peaks = peaks[n // band]
        for b in range(blocks):
            band_peaks[b] = max(band_peaks[b], abs(float_of(from_size(tops[b], line[0]))))
    return -1


@jit
def round_floats(weight: Any, steps: Any, block: int, band: int, bits: int, packed: Any) -> None:
    """Quantizes rows to the nearest floating-point codes.

    Args:
        weight: Patterns [N, K] of finite weights.
        steps: What a code of 1 means, float32 [ceil(N/band), ceil(K/block)]; where it is 0, so are
            the codes.
        block: Columns that share a step; the last block may be short.
        band: Rows that share a step; the last band may be short.
        bits: 4 for e2m1, 8 for e4m3.
        packed: uint8 [N, K*bits/8], written.
    """
    rows, columns = weight.shape
    line = np.empty(columns + LANES, weight.dtype)
    codes, buffer = _buffers(columns)
    for n in range(rows):
        _copy(weight[n], line)
        row_steps = steps[n // band]
        for b in range(row_steps.size):
            step, stop = row_steps[b], min((b + 1) * block, columns)
            if step == np.float32(0):
                codes[b * block : stop] = 0
            elif bits == 4:
                for start in range(b * block, stop, LANES):
                    e2m1_codes(line, start, step, codes)
            else:
                for start in range(b * block, stop, LANES):
                    e4m3_codes(line, start, step, codes)
        _pack(codes, bits, buffer, packed[n])
