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
def _limits(scales: Any, points: Any, top: Any, inverses: Any, lows: Any, highs: Any) -> None:
    """Writes the reciprocals of scales, and the codes' ends without their zero points."""
    for r in range(scales.size):
        scale = scales[r]
        inverses[r] = np.float32(1) / scale if scale != np.float32(0) else np.float32(0)
        lows[r] = -points[r]
        highs[r] = top - points[r]


@jit
def _code(steps: Any, low: Any, high: Any, floats: bool) -> Any:
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
    _limits(scales, points, top, inverses, lows, highs)
    errors, slopes, curves = sums[0], sums[1], sums[2]
    errors[:], slopes[:], curves[:] = 0, 0, 0
    for k in range(weights.size):
        row, weight = tile[k], weights[k]
        for r in range(scales.size):
            code = _code(row[r] * inverses[r], lows[r], highs[r], floats)
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
    limits = np.empty((3, BESIDE), np.float32)
    for b in range(values.shape[0]):
        for start in range(0, values.shape[2], BESIDE):
            stop = min(start + BESIDE, values.shape[2])
            _measure(
                values[b, :, start:stop], weights[b], scales[b, start:stop],
                points[b, start:stop], top, floats, limits, sums[:, b, start:stop],
            )  # fmt: skip


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
    best = np.empty(BESIDE, np.float32)
    for b in range(values.shape[0]):
        for start in range(0, values.shape[2], BESIDE):
            found = chosen[b, start : start + BESIDE]
            part = values[b, :, start : start + BESIDE]
            for g in range(scales.shape[0]):
                scale = scales[g, b, start : start + BESIDE]
                point = points[g, b, start : start + BESIDE]
                _measure(part, weights[b], scale, point, top, floats, limits, sums)
                for r in range(found.size):
                    slope, curve = sums[1, r], sums[2, r]
                    gain = np.float32(0)
                    if curve > np.float32(0) and not floats:
                        gain = slope * (slope / curve)
                    error = sums[0, r] - gain
                    if g == 0 or error < best[r]:
                        best[r] = error
                        found[r] = g


@jit
def encode_rows(values: Any, scales: Any, points: Any, top: Any, codes: Any) -> None:
    """Writes integer codes with their zero points, uint8 [blocks, B, N]; see `measure`."""
    limits = np.empty((3, values.shape[2]), np.float32)
    inverses, lows, highs = limits[0], limits[1], limits[2]
    for b in range(values.shape[0]):
        point = points[b]
        _limits(scales[b], point, top, inverses, lows, highs)
        for k in range(values.shape[1]):
            row, line = values[b, k], codes[b, k]
            for r in range(row.size):
                code = _code(row[r] * inverses[r], lows[r], highs[r], False)
                line[r] = np.uint8(np.int32(code + point[r]))
