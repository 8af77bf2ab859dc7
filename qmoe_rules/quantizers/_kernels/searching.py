"""The sums of the search for scales, compiled.

Weights come transposed, float32 [blocks, B, N]: the N rows lie side by side as the lanes of a
vector, so that every row adds up its columns one after the other, in the order of
`search.NumpyEngine`, which is the meaning of these kernels, byte for byte. `BESIDE` rows are worked
on at a time, so that their sums stay in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qmoe_rules.quantizers._kernels.compiling import jit
from qmoe_rules.quantizers._kernels.instructions import ROUNDER

__all__ = ["encode_rows", "least_error", "measure"]

BESIDE = 128


@jit
def copy_rows(values: Any, start: int, stop: int, tile: Any) -> None:
    """Copies some rows [B, stop - start] to where they lie close together."""
    for k in range(len(values)):
        row, line = values[k], tile[k]
        for r in range(start, stop):
            line[r - start] = row[r]


@jit
def limits_of(scales: Any, points: Any, top: Any, inverses: Any, lows: Any, highs: Any) -> None:
    """Writes the reciprocals of scales, and the codes' ends without their zero points."""
    for r in range(scales.size):
        scale = scales[r]
        inverses[r] = np.float32(1) / scale if scale != np.float32(0) else np.float32(0)
        lows[r] = -points[r]
        highs[r] = top - points[r]


@jit
def nearest_code(steps: Any, low: Any, high: Any, floats: bool) -> Any:
    """Returns the code nearest to `steps`, ties to even: an integer, or an e2m1 value."""
    steps = min(max(steps, low), high)
    rounder = ROUNDER
    if floats:  # codes are 0.5, 1 or 2 apart
        size = abs(steps)
        rounder = ROUNDER if size < np.float32(4) else ROUNDER * np.float32(2)
        rounder = ROUNDER * np.float32(0.5) if size < np.float32(2) else rounder
    return (steps + rounder) - rounder


@jit
def _measure(
    tile: Any, weights: Any, scales: Any, points: Any, top: Any, floats: bool, limits: Any,
    sums: Any,
) -> None:  # fmt: skip
    """Writes the sums of `measure` of one block, one after the other, [3, L]."""
    inverses, lows, highs = limits[0], limits[1], limits[2]
    limits_of(scales, points, top, inverses, lows, highs)
    errors, slopes, curves = sums[0], sums[1], sums[2]
    sums[:] = 0
    for k in range(weights.size):
        row, weight = tile[k], weights[k]
        for r in range(scales.size):
            code = nearest_code(row[r] * inverses[r], lows[r], highs[r], floats)
            off = row[r] - scales[r] * code
            weighted = weight * off
            errors[r] += weighted * off
            slopes[r] += weighted * code
            curves[r] += (weight * code) * code


@jit
def measure(
    values: Any, weights: Any, scales: Any, points: Any, top: Any, floats: bool, sums: Any
) -> None:
    """Measures scales and zero points.

    Args:
        values: float32 [blocks, B, N].
        weights: float32 [blocks, B], what the square of an error counts.
        scales: float32 [blocks, N].
        points: float32 [blocks, N].
        top: float32, the largest code.
        floats: Whether codes are e2m1 values, from -points to top - points, or else integers.
        sums: float32 [3, blocks, N], written: the sums of w r^2, w r q and w q^2, q being a code
            without its zero point and r what it leaves.
    """
    limits, found = np.empty((3, BESIDE), np.float32), np.empty((3, BESIDE), np.float32)
    tile = np.zeros((values.shape[1], BESIDE), np.float32)
    for b in range(values.shape[0]):
        scale, point = scales[b], points[b]
        for start in range(0, scale.size, BESIDE):
            stop = min(start + BESIDE, scale.size)
            copy_rows(values[b], start, stop, tile)
            _measure(
                tile, weights[b], scale[start:stop], point[start:stop], top, floats, limits, found
            )
            for i in range(3):
                line = sums[i, b]
                for r in range(stop - start):
                    line[start + r] = found[i, r]


@jit
def least_error(
    values: Any, weights: Any, scales: Any, points: Any, top: Any, floats: bool, chosen: Any
) -> None:
    """Finds which of G candidates leaves the least error.

    That is once the scale has been fitted to the codes, unless they are floats.

    Args:
        values: float32 [blocks, B, N].
        weights: float32 [blocks, B].
        scales: float32 [G, blocks, N].
        points: float32 [G, blocks, N].
        top: float32, the largest code.
        floats: Whether codes are e2m1 values.
        chosen: int64 [blocks, N], written: the first one of the least error.
    """
    limits, sums = np.empty((3, BESIDE), np.float32), np.empty((3, BESIDE), np.float32)
    tile = np.zeros((values.shape[1], BESIDE), np.float32)
    best = np.empty(BESIDE, np.float32)
    rows = values.shape[2]
    for b in range(values.shape[0]):
        for start in range(0, rows, BESIDE):
            stop = min(start + BESIDE, rows)
            found = chosen[b][start:stop]
            copy_rows(values[b], start, stop, tile)
            for g in range(scales.shape[0]):
                scale, point = scales[g, b][start:stop], points[g, b][start:stop]
                _measure(tile, weights[b], scale, point, top, floats, limits, sums)
                for r in range(stop - start):
                    slope, curve = sums[1, r], sums[2, r]
                    gain = np.float32(0)
                    if curve > np.float32(0) and not floats:
                        gain = slope * (slope / curve)
                    error = sums[0, r] - gain
                    if g == 0 or error < best[r]:
                        best[r] = error
                        found[r] = g


@jit
def encode_rows(values: Any, scales: Any, points: Any, top: Any, floats: bool, codes: Any) -> None:
    """Writes codes, uint8 [blocks, B, N], integers with their zero points; see `measure`."""
    limits = np.empty((3, values.shape[2]), np.float32)
    inverses, lows, highs = limits[0], limits[1], limits[2]
    for b in range(values.shape[0]):
        point = points[b]
        limits_of(scales[b], point, top, inverses, lows, highs)
        for k in range(values.shape[1]):
            row, line = values[b, k], codes[b, k]
            for r in range(row.size):
                code = nearest_code(row[r] * inverses[r], lows[r], highs[r], floats)
                line[r] = _pattern(code) if floats else np.uint8(np.int32(code + point[r]))


@jit
def _pattern(value: Any) -> Any:
    """Returns the code of an e2m1 value."""
    size = abs(value)
    if size < np.float32(2):
        code = size * np.float32(2)
    elif size < np.float32(4):
        code = size + np.float32(2)
    else:
        code = size * np.float32(0.5) + np.float32(4)
    return np.uint8(np.int32(code)) | np.uint8(8 if value < np.float32(0) else 0)
