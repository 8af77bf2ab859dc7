"""Error feedback and descent within a chunk of columns, compiled.

As in `searching`, weights come transposed, [B, N], `BESIDE` rows at a time side by side, and every
operation is the one that `_feedback.NumpyFeedback` does, byte for byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qmoe_rules.quantizers._kernels.compiling import jit
from qmoe_rules.quantizers._kernels.searching import BESIDE, copy_rows, limits_of, nearest_code

__all__ = ["descend", "feed"]


@jit
def feed(
    targets: Any, weights: Any, share: Any, scales: Any, points: Any, top: Any, floats: bool,
    codes: Any, errors: Any,
) -> None:  # fmt: skip
    """Quantizes some columns, one after the other, each making up for those before it.

    Args:
        targets: float32 [B, N], the weights with the errors of earlier columns fed to them.
        weights: float32 [B, N], what is to be quantized.
        share: float32 [B, B], what of a column's error (axis 0) is fed to a later column.
        scales: float32 [N].
        points: float32 [N].
        top: float32, the largest code.
        floats: Whether codes are e2m1 values.
        codes: float32 [B, N], written, without zero points.
        errors: float32 [B, N], written: weights - codes * scales.
    """
    columns, rows = targets.shape
    tile, weight = np.zeros((2, columns, BESIDE), np.float32)
    limits = np.empty((3, BESIDE), np.float32)
    for start in range(0, rows, BESIDE):
        stop = min(start + BESIDE, rows)
        scale = scales[start:stop]
        copy_rows(targets, start, stop, tile)
        copy_rows(weights, start, stop, weight)
        limits_of(scale, points[start:stop], top, limits[0], limits[1], limits[2])
        for k in range(columns):
            code, error = codes[k][start:stop], errors[k][start:stop]
            target, real = tile[k], weight[k]
            for r in range(scale.size):
                steps = target[r] * limits[0, r]
                code[r] = nearest_code(steps, limits[1, r], limits[2, r], floats)
                error[r] = real[r] - scale[r] * code[r]
            for j in range(k + 1, columns):
                line, part = tile[j], share[k, j]
                for r in range(scale.size):
                    line[r] += error[r] * part


@jit
def descend(
    slopes: Any, hessian: Any, scales: Any, points: Any, top: Any, floats: bool, codes: Any,
    errors: Any,
) -> None:  # fmt: skip
    """Moves one code after the other to where the loss is least, the others staying.

    Args:
        slopes: float32 [B, N], these columns' rows of the Hessian times all errors.
        hessian: float32 [B, B], of these columns.
        scales: float32 [N].
        points: float32 [N].
        top: float32, the largest code.
        floats: Whether codes are e2m1 values.
        codes: float32 [B, N], without zero points, updated.
        errors: float32 [B, N], updated.
    """
    columns, rows = slopes.shape
    tile = np.zeros((columns, BESIDE), np.float32)
    limits, moves = np.empty((3, BESIDE), np.float32), np.empty(BESIDE, np.float32)
    for start in range(0, rows, BESIDE):
        stop = min(start + BESIDE, rows)
        scale = scales[start:stop]
        copy_rows(slopes, start, stop, tile)
        limits_of(scale, points[start:stop], top, limits[0], limits[1], limits[2])
        for k in range(columns):
            slope, code, error = tile[k], codes[k][start:stop], errors[k][start:stop]
            inverse = np.float32(1) / hessian[k, k]
            moved = np.float32(0)
            for r in range(scale.size):
                steps = code[r] + (slope[r] * inverse) * limits[0, r]
                new = nearest_code(steps, limits[1, r], limits[2, r], floats)
                moves[r] = scale[r] * (new - code[r])
                code[r] = new
                error[r] -= moves[r]
                moved = max(moved, abs(moves[r]))
            if moved == np.float32(0):
                continue
            for j in range(k + 1, columns):
                line, part = tile[j], hessian[k, j]
                for r in range(scale.size):
                    line[r] -= moves[r] * part
