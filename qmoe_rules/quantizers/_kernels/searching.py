"""The sums of the search for scales, compiled.

Weights come as tiles float32 [T, blocks, B, L]: T times L rows, the L rows of a tile side by side
as the lanes of a vector, so that every row adds up its columns one after the other, in the order
of `search.NumpyEngine`, which is the meaning of these kernels, byte for byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qmoe_rules.quantizers._kernels.compiling import jit
from qmoe_rules.quantizers._kernels.instructions import ROUNDER

__all__ = ["encode_tiles", "least_error", "measure"]


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
    sums[:] = 0
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
    tiles: Any, weights: Any, scales: Any, points: Any, top: Any, floats: bool, sums: Any
) -> None:
    """Measures scales and zero points.

    Args:
        tiles: float32 [T, blocks, B, L].
        weights: float32 [blocks, B], what the square of an error counts.
        scales: float32 [T, blocks, L].
        points: float32 [T, blocks, L].
        top: float32, the largest code.
        floats: Whether codes are e2m1 values, from -points to top - points, or else integers.
        sums: float32 [3, T, blocks, L], written: the sums of w r^2, w r q and w q^2, q being a code
            without its zero point and r what it leaves.
    """
    lanes = tiles.shape[3]
    limits, found = np.empty((3, lanes), np.float32), np.empty((3, lanes), np.float32)
    for t in range(tiles.shape[0]):
        for b in range(tiles.shape[1]):
            _measure(tiles[t, b], weights[b], scales[t, b], points[t, b], top, floats, limits, found)
            sums[:, t, b] = found


@jit
def least_error(
    tiles: Any, weights: Any, scales: Any, points: Any, top: Any, floats: bool, chosen: Any
) -> None:
    """Finds which of G candidates leaves the least error.

    That is once the scale has been fitted to the codes, unless they are floats.

    Args:
        tiles: float32 [T, blocks, B, L].
        weights: float32 [blocks, B].
        scales: float32 [G, T, blocks, L].
        points: float32 [G, T, blocks, L].
        top: float32, the largest code.
        floats: Whether codes are e2m1 values.
        chosen: int64 [T, blocks, L], written: the first one of the least error.
    """
    lanes = tiles.shape[3]
    limits, sums = np.empty((3, lanes), np.float32), np.empty((3, lanes), np.float32)
    best = np.empty(lanes, np.float32)
    for t in range(tiles.shape[0]):
        for b in range(tiles.shape[1]):
            found = chosen[t, b]
            for g in range(scales.shape[0]):
                scale, point = scales[g, t, b], points[g, t, b]
                _measure(tiles[t, b], weights[b], scale, point, top, floats, limits, sums)
                for r in range(lanes):
                    slope, curve = sums[1, r], sums[2, r]
                    gain = np.float32(0)
                    if curve > np.float32(0) and not floats:
                        gain = slope * (slope / curve)
                    error = sums[0, r] - gain
                    if g == 0 or error < best[r]:
                        best[r] = error
                        found[r] = g


@jit
def encode_tiles(tiles: Any, scales: Any, points: Any, top: Any, codes: Any) -> None:
    """Writes integer codes with their zero points, uint8 [T, blocks, B, L]; see `measure`."""
    limits = np.empty((3, tiles.shape[3]), np.float32)
    inverses, lows, highs = limits[0], limits[1], limits[2]
    for t in range(tiles.shape[0]):
        for b in range(tiles.shape[1]):
            point = points[t, b]
            _limits(scales[t, b], point, top, inverses, lows, highs)
            for k in range(tiles.shape[2]):
                row, line = tiles[t, b, k], codes[t, b, k]
                for r in range(row.size):
                    code = _code(row[r] * inverses[r], lows[r], highs[r], False)
                    line[r] = np.uint8(np.int32(code + point[r]))
