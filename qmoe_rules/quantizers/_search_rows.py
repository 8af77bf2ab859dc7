"""What searches work on: rows side by side, the sums over them, and what makes up for shrinking."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec
from qmoe_rules.quantizers._candidates import (
    BEYOND,
    FITS,
    candidates,
    greatest_scale,
    is_signed,
    stored_scales,
    tries,
)
from qmoe_rules.quantizers.engine import patterns
from qmoe_rules.quantizers.rtn import smallest_scale
from qmoe_rules.statistics import Statistics

__all__ = [
    "ROWS",
    "CompiledEngine",
    "Engine",
    "NumpyEngine",
    "Rows",
    "column_weights",
    "gain",
    "limits_of",
    "nearest_codes",
]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]

ROWS = 128
"""How many rows are best worked on at a time: their transposes stay in the caches."""

# What a column counts that calibration saw little of, in means.
_LEAST_WEIGHT = np.float32(1e-3)
_MOST_GAIN = 1.5
_ROUNDER = np.float32(1.5 * 2**23)  # what is added to it loses its fraction, ties to even


class Engine(Protocol):
    """What takes time; `_kernels.searching` says what the other arguments are."""

    def fit(self, rows: Rows, spec: Spec, scales: Float32, points: Float32, sums: Float32) -> None:
        """Finds better scales and zero points of integers, and writes two sums of `measure`."""

    def measure(self, *arguments: Any) -> None:
        """Writes sums of errors, and what a fit of the scales needs."""

    def least_error(self, *arguments: Any) -> None:
        """Writes the index of the best candidate of every block."""

    def encode_rows(self, *arguments: Any) -> None:
        """Writes codes."""


class CompiledEngine:
    """Calls the kernels."""

    def __init__(self, kernels: ModuleType) -> None:
        self._fit = kernels.fit
        self.measure = kernels.measure
        self.least_error = kernels.least_error
        self.encode_rows = kernels.encode_rows

    def fit(self, rows: Rows, spec: Spec, scales: Float32, points: Float32, sums: Float32) -> None:
        """See `Engine`."""
        least = patterns(np.full(1, smallest_scale(rows.dtype), rows.dtype))[0]
        self._fit(
            rows.values, rows.weights, rows.unit, tries(rows.values, spec), BEYOND, FITS,
            is_signed(spec), spec.symmetric, np.float32(spec.format.max_code),
            greatest_scale(rows.dtype), least, scales, points, sums,
        )  # fmt: skip


class NumpyEngine:
    """Every step is one float32 operation; columns are added up in their order."""

    def fit(self, rows: Rows, spec: Spec, scales: Float32, points: Float32, sums: Float32) -> None:
        """See `_kernels.searching.fit`."""
        top, found = np.float32(spec.format.max_code), np.empty((3, *scales.shape), np.float32)

        def measured(scales: Float32, points: Float32) -> tuple[Float32, Float32]:
            self.measure(rows.values, rows.weights, scales, points, top, False, found)
            _, slope, curve = found
            return slope, np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)

        best, scale, point = np.empty((3, *scales.shape), np.float32)
        for index, tried in enumerate(
            zip(*candidates(tries(rows.values, spec), spec), strict=True)
        ):
            slope, step = measured(*tried)
            error = found[0] - slope * step
            better = (index == 0) | (error < best)
            for kept, new in zip((best, scale, point), (error, *tried), strict=True):
                np.copyto(kept, new, where=better)
        measured(scales, points)
        sums[:] = found[:2]
        for _ in range(FITS + 1):
            scale = rows.stored(scale).astype(np.float32) / rows.unit
            _, step = measured(scale, point)
            better = found[0] < sums[0]
            for kept, new in zip((sums, scales, points), (found[:2], scale, point), strict=True):
                np.copyto(kept, new, where=better)
            scale = scale + step

    def measure(
        self, values: Float32, weights: Float32, scales: Float32, points: Float32, top: np.float32,
        floats: bool, sums: Float32,
    ) -> None:  # fmt: skip
        """See `_kernels.searching.measure`."""
        codes = _codes(values, scales, points, top, floats)
        off = values - scales[:, None] * codes
        weight = weights[..., None]
        terms = (weight * off * off, weight * off * codes, weight * codes * codes)
        for target, term in zip(sums, terms, strict=True):
            target[:] = np.add.accumulate(term, axis=1)[:, -1]

    def least_error(
        self, values: Float32, weights: Float32, scales: Float32, points: Float32, top: np.float32,
        chosen: npt.NDArray[np.int64],
    ) -> None:  # fmt: skip
        """See `_kernels.searching.least_error`."""
        best = np.empty(chosen.shape, np.float32)
        sums = np.empty((3, *chosen.shape), np.float32)
        for index, (scale, point) in enumerate(zip(scales, points, strict=True)):
            self.measure(values, weights, scale, point, top, True, sums)
            better = (index == 0) | (sums[0] < best)
            best[better], chosen[better] = sums[0][better], index

    def encode_rows(
        self, values: Float32, scales: Float32, points: Float32, top: np.float32, floats: bool,
        codes: Codes,
    ) -> None:  # fmt: skip
        """See `_kernels.searching.encode_rows`."""
        found = _codes(values, scales, points, top, floats)
        if floats:
            codes[:] = found.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        else:
            codes[:] = found + points[:, None]


def _codes(
    values: Float32, scales: Float32, points: Float32, top: np.float32, floats: bool
) -> Float32:
    inverse, low, high = (limit[:, None] for limit in limits_of(scales, points, top))
    return nearest_codes(values * inverse, low, high, floats)


def limits_of(
    scales: Float32, points: Float32, top: np.float32
) -> tuple[Float32, Float32, Float32]:
    """Returns the reciprocals of scales, and the codes' ends without their zero points."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    return inverse, -points, top - points


def nearest_codes(steps: Float32, low: Float32, high: Float32, floats: bool) -> Float32:
    """Returns the codes nearest to `steps`, ties to even: integers, or e2m1 values."""
    steps = np.minimum(np.maximum(steps, low), high)
    rounder: Any = _ROUNDER
    if floats:  # codes are 0.5, 1 or 2 apart
        size = np.abs(steps)
        half, one, two = np.float32(0.5), np.float32(1), np.float32(2)
        apart = np.where(size < 2, half, np.where(size < 4, one, two))
        rounder = _ROUNDER * apart
    codes: Float32 = (steps + rounder) - rounder
    return codes


@dataclass(frozen=True)
class Rows:
    """Rows of weights, every block divided by a power of two so that its peak is near 1.

    Attributes:
        dtype: The type of the weights.
        values: float32 [blocks, B, N].
        unit: float32 [blocks, N], what the values were divided by.
        weights: float32 [blocks, B], what columns count, divided by `share`.
        share: float32 [blocks, 1].
    """

    dtype: np.dtype
    values: Float32
    unit: Float32
    weights: Float32
    share: Float32

    @classmethod
    def of(cls, weight: npt.NDArray[np.generic], importance: Float32) -> Rows:
        """Takes finite weights [N, K], and what an error in a column counts, [blocks, B]."""
        values = np.array(weight.T, np.float32, order="C").reshape(*importance.shape, -1)
        peak = np.maximum(values.max(axis=1), -values.min(axis=1))
        unit = np.ldexp(np.float32(1), np.frexp(peak)[1] - 1)
        unit[peak == 0] = 1
        values /= unit[:, None]
        share = importance.max(axis=1, keepdims=True)
        return cls(weight.dtype, values, unit, importance / share, share)

    def stored(self, scales: Float32) -> npt.NDArray[np.generic]:
        """Returns scales of the values as scales of the weights, as they are stored."""
        return stored_scales(scales, self.unit, self.dtype)

    def total(self, sums: Float32) -> Float64:
        """Adds up sums of squares over the blocks of every row, [N]."""
        square = np.square(self.unit, dtype=np.float64) * self.share
        return np.asarray((sums * square).sum(axis=0))

    def power(self) -> Float64:
        """Returns sum w x^2 of every row, [N]."""
        return self.total(np.einsum("bkn,bkn,bk->bn", self.values, self.values, self.weights))


def column_weights(statistics: Statistics | None, columns: int) -> Float32:
    """Returns what the square of an error in every column counts, float32 [K]."""
    if statistics is None or not statistics.mean_square.any():
        return np.ones(columns, np.float32)
    square = statistics.mean_square / statistics.mean_square.max()
    floored: Float32 = np.maximum(square, _LEAST_WEIGHT * square.mean()).astype(np.float32)
    return floored


def gain(whole: Float64, lost: Float64) -> Float64:
    """Returns what makes codes as long as the weights.

    Args:
        whole: sum w x^2 of every row, or of all.
        lost: sum w x (x - q).
    """
    kept = np.maximum(whole - lost, whole / _MOST_GAIN)
    return np.divide(whole, kept, out=np.ones_like(whole), where=whole > 0)
