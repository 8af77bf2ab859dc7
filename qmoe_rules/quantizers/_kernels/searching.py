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
from qmoe_rules.quantizers._kernels.instructions import ROUNDER, float_of, nearest

__all__ = ["encode_rows", "fit", "least_error", "measure"]

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
def least_error(values: Any, weights: Any, scales: Any, points: Any, top: Any, chosen: Any) -> None:
    """Finds which of G candidates leaves the least error; codes are e2m1 values.

    Args:
        values: float32 [blocks, B, N].
        weights: float32 [blocks, B].
        scales: float32 [G, blocks, N].
        points: float32 [G, blocks, N].
        top: float32, the largest code.
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
                _measure(tile, weights[b], scale, point, top, True, limits, sums)
                for r in range(stop - start):
                    if g == 0 or sums[0, r] < best[r]:
                        best[r] = sums[0, r]
                        found[r] = g


@jit
def _copy(source: Any, target: Any) -> None:
    for r in range(target.size):
        target[r] = source[r]


@jit
def _keep_fitted(
    first: bool, scales: Any, points: Any, sums: Any, errors: Any, scale: Any, point: Any
) -> None:
    """Keeps the scales that leave less error than those before, once fitted to their codes."""
    error, slope, curve = sums[0], sums[1], sums[2]
    for r in range(scales.size):
        gain = slope[r] * (slope[r] / curve[r]) if curve[r] > np.float32(0) else np.float32(0)
        left = error[r] - gain
        better = first or left < errors[r]
        errors[r] = left if better else errors[r]
        scale[r] = scales[r] if better else scale[r]
        point[r] = points[r] if better else point[r]


@jit
def _candidates(
    low: Any, high: Any, within: Any, ratio: Any, beyond: int, signed: bool, symmetric: bool,
    top: Any, scales: Any, points: Any,
) -> Any:  # fmt: skip
    """Writes what `_candidates.candidates` tries, [G, BESIDE], and returns G."""
    last, rows = within.size - 1, low.size
    count = last + 1 + beyond
    centre = (top + np.float32(1)) / np.float32(2)
    divisors = np.full(BESIDE, within[last])
    for g in range(count):
        line = scales[g]
        for r in range(rows):
            divisors[r] = within[g] if g <= last else divisors[r] * ratio[r]
            line[r] = high[r] / divisors[r] - low[r] / divisors[r]
    points[:] = centre
    if symmetric and not signed:
        return count
    if symmetric:
        for g in range(last, count):
            line, other = scales[g], scales[count + g - last]
            for r in range(rows):
                other[r] = -line[r]
        return 2 * count - last
    for g in range(count):
        line, below, above = scales[g], points[g], points[count + g]
        for r in range(rows):
            ends = low[r] + high[r]
            middle = ends / line[r] if line[r] != np.float32(0) else np.float32(0)
            lower = np.floor((top - middle) / np.float32(2))
            below[r] = min(max(lower, np.float32(0)), top)
            above[r] = min(max(lower + np.float32(1), np.float32(0)), top)
        _copy(line, scales[count + g])
        if g > last:
            _copy(line, scales[2 * count + g - last - 1])
            _copy(line, scales[2 * count + beyond + g - last - 1])
            points[2 * count + beyond + g - last - 1][:] = centre - np.float32(1)
    return 2 * (count + beyond)


@jit
def _stored(scale: Any, unit: Any, end: Any, least: Any) -> Any:
    """Returns a scale in some unit after it has been stored; see `_candidates.stored_scales`."""
    exact = min(max(scale * unit, -end), end)
    return (float_of(nearest(exact, least)) if exact != np.float32(0) else exact) / unit


@jit
def fit(
    values: Any, weights: Any, units: Any, tries: Any, beyond: int, fits: int, signed: bool,
    symmetric: bool, top: Any, end: Any, least: Any, scales: Any, points: Any, sums: Any,
) -> None:  # fmt: skip
    """Finds better scales and zero points of integers.

    The candidate that leaves the least error once it has been fitted to its codes is fitted, stored
    and measured, `fits` times, and measured once more.

    Args:
        values: float32 [blocks, B, N].
        weights: float32 [blocks, B].
        units: float32 [blocks, N], what the values were divided by.
        tries: Of the candidates.
        beyond: How many divisors beyond the codes' reach are tried.
        fits: How often a scale is fitted to its codes.
        signed: Whether scales may be negative.
        symmetric: Whether there are no zero points.
        top: float32, the largest code.
        end: float32, the greatest scale that can be stored.
        least: The pattern of the least one, of the type that is stored.
        scales: float32 [blocks, N], in units; written where better ones are found.
        points: float32 [blocks, N], likewise.
        sums: float32 [2, blocks, N], written: the first two of `measure`.
    """
    most = 2 * (tries.within.size + 2 * beyond)
    tried, middles = np.empty((most, BESIDE), np.float32), np.empty((most, BESIDE), np.float32)
    limits, found = np.empty((3, BESIDE), np.float32), np.empty((3, BESIDE), np.float32)
    tile = np.zeros((values.shape[1], BESIDE), np.float32)
    errors, scale = np.empty(BESIDE, np.float32), np.empty(BESIDE, np.float32)
    point = np.empty(BESIDE, np.float32)
    rows = values.shape[2]
    for b in range(values.shape[0]):
        for start in range(0, rows, BESIDE):
            stop = min(start + BESIDE, rows)
            size = stop - start
            copy_rows(values[b], start, stop, tile)
            count = _candidates(
                tries.low[b][start:stop], tries.high[b][start:stop], tries.within,
                tries.ratio[b][start:stop], beyond, signed, symmetric, top, tried, middles,
            )  # fmt: skip
            for g in range(count):
                one, other = tried[g][:size], middles[g][:size]
                _measure(tile, weights[b], one, other, top, False, limits, found)
                _keep_fitted(g == 0, one, other, found, errors, scale, point)
            best_scale, best_point = scales[b][start:stop], points[b][start:stop]
            best_error, best_slope = sums[0, b][start:stop], sums[1, b][start:stop]
            unit = units[b][start:stop]
            _measure(tile, weights[b], best_scale, best_point, top, False, limits, found)
            _copy(found[0], best_error)
            _copy(found[1], best_slope)
            for _ in range(fits + 1):
                for r in range(size):
                    scale[r] = _stored(scale[r], unit[r], end, least)
                _measure(tile, weights[b], scale[:size], point[:size], top, False, limits, found)
                error, slope, curve = found[0], found[1], found[2]
                for r in range(size):
                    if error[r] < best_error[r]:
                        best_error[r], best_slope[r] = error[r], slope[r]
                        best_scale[r], best_point[r] = scale[r], point[r]
                    scale[r] += slope[r] / curve[r] if curve[r] > np.float32(0) else np.float32(0)


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
