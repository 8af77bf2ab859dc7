"""A search for the scales that cost least; what an expert sees decides what an error counts.

For integers, a block's scale (and its zero point, where there is one) is chosen so that
sum_k w_k (x_k - q_k)^2 is least, w being the mean square of what column k is multiplied with, or
1 where nothing is known of it. The best of some candidates is fitted to its codes by least squares,
rounded to the type that is stored, and the codes chosen anew, several times. Round to nearest takes
part, so that the choice is never worse than `rtn`'s, and weights that it keeps exactly stay exact.

Least squares shrink: what they leave is orthogonal to the codes, so the codes are shorter than the
weights, by 11 % of the square with 2 bits. Outputs that are all too small, layer after layer, harm
a model more than the same error at random. So in the end the scales of a row are multiplied by the
one factor that makes sum_k w_k x_k q_k = sum_k w_k x_k^2, which leaves the row's output as large as
it was. It is 1 where nothing is lost.

mxfp4 and nvfp4 try the scales next to `rtn`'s, and the expert's scale takes the factor. fp8 is left
to `rtn`: errors of floats are relative, so that the scale hardly matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec, pack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers._candidates import candidates, stored_scales
from qmoe_rules.quantizers._checks import check, check_statistics, finite_float32
from qmoe_rules.quantizers.engine import kernels
from qmoe_rules.quantizers.floats import float_rtn, float_rtn_numpy
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy
from qmoe_rules.statistics import Statistics

__all__ = ["NumpyEngine", "search", "search_numpy"]

Float32 = npt.NDArray[np.float32]

_ROWS = 512  # at a time
_FITS = 3
# What a column counts that calibration saw little of, in means.
_LEAST_WEIGHT = np.float32(1e-3)
_MOST_GAIN = 1.5
_ROUNDER = np.float32(1.5 * 2**23)  # what is added to it loses its fraction, ties to even
_NEIGHBOURS = {"fp4": (-1, 0, 1), "nvfp4": (-3, -2, -1, 0, 1, 2, 3, 4)}


class Engine(Protocol):
    """What takes time; `_kernels.searching` says what the arguments are."""

    def measure(self, *arguments: Any) -> None:
        """Writes sums of errors, and what a fit of the scales needs."""

    def least_error(self, *arguments: Any) -> None:
        """Writes the index of the best candidate of every block."""

    def encode_rows(self, *arguments: Any) -> None:
        """Writes integer codes."""


def search(
    weight: npt.NDArray[np.generic], spec: Spec, statistics: Statistics | None = None
) -> QuantizedWeights:
    """Quantizes one expert's weights with the scales that cost least.

    Args:
        weight: [N, K] float32, float16 or bfloat16. K is divisible by the block.
        spec: The format and block size.
        statistics: What the expert has seen; every column counts alike where it is None, or saw
            nothing.

    Returns:
        The codes and the scales, those of integers in the weight's dtype.

    Raises:
        SourceError: The weights hold an infinity or a NaN.
        ValueError: The weights have another type or a shape that `spec` cannot hold, or the
            statistics another size, or are not finite.
    """
    engine = kernels()
    if engine is None:
        return search_numpy(weight, spec, statistics)
    return _search(weight, spec, statistics, rtn(weight, spec), engine)


def search_numpy(
    weight: npt.NDArray[np.generic], spec: Spec, statistics: Statistics | None = None
) -> QuantizedWeights:
    """The meaning of `search`, in plain numpy; byte-equal to it, and its stand-in."""
    nearest = (rtn_numpy if spec.format.element is None else float_rtn_numpy)(weight, spec)
    return _search(weight, spec, statistics, nearest, NumpyEngine())


class NumpyEngine:
    """Every step is one float32 operation; columns are added up in their order."""

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
        floats: bool, chosen: npt.NDArray[np.int64],
    ) -> None:  # fmt: skip
        """See `_kernels.searching.least_error`."""
        best = np.full(chosen.shape, np.float32(np.inf))
        sums = np.empty((3, *chosen.shape), np.float32)
        for index, (scale, point) in enumerate(zip(scales, points, strict=True)):
            self.measure(values, weights, scale, point, top, floats, sums)
            error, slope, curve = sums
            if not floats:
                gain = np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)
                error = error - slope * gain
            better = error < best
            best[better], chosen[better] = error[better], index

    def encode_rows(
        self, values: Float32, scales: Float32, points: Float32, top: np.float32,
        codes: npt.NDArray[np.uint8],
    ) -> None:  # fmt: skip
        """See `_kernels.searching.encode_rows`."""
        codes[:] = _codes(values, scales, points, top, False) + points[:, None]


def _codes(
    values: Float32, scales: Float32, points: Float32, top: np.float32, floats: bool
) -> Float32:
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    low, high = -points[:, None], (top - points)[:, None]
    steps = np.minimum(np.maximum(values * inverse[:, None], low), high)
    rounder: Any = _ROUNDER
    if floats:
        size = np.abs(steps)
        apart = np.where(size < 2, np.float32(0.5), np.where(size < 4, np.float32(1), np.float32(2)))
        rounder = _ROUNDER * apart
    codes: Float32 = (steps + rounder) - rounder
    return codes


def _search(
    weight: npt.NDArray[np.generic],
    spec: Spec,
    statistics: Statistics | None,
    nearest: QuantizedWeights,
    engine: Engine,
) -> QuantizedWeights:
    """Searches from what round to nearest made of the weights."""
    rows, columns = weight.shape
    check_statistics(statistics, columns)
    if spec.format.square:
        return nearest
    importance = column_weights(statistics, columns).reshape(spec.blocks(columns), -1)
    if spec.format.element is not None:
        return _search_floats(weight, importance, nearest, engine)
    scales = np.empty((rows, spec.blocks(columns)), weight.dtype)
    points = np.empty(scales.shape, np.uint8)
    codes = np.empty((rows, columns), np.uint8)
    known = nearest.scales.reshape(scales.shape).astype(np.float32), _points(nearest, scales.shape)
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        old = known[0][part].T, known[1][part].T
        found = _search_integers(_Rows.of(weight[part], importance), spec, old, engine)
        codes[part] = found[0].reshape(columns, -1).T
        scales[part], points[part] = found[1].T, found[2].T
    shape = spec.scales_shape(rows, columns)
    zero_points = None if spec.symmetric else points.reshape(shape)
    packed = pack(codes, spec.format.bits)
    return QuantizedWeights(packed, scales.reshape(shape), spec, zero_points)


def column_weights(statistics: Statistics | None, columns: int) -> Float32:
    """Returns what the square of an error in every column counts, float32 [K]."""
    if statistics is None or not statistics.mean_square.any():
        return np.ones(columns, np.float32)
    square = statistics.mean_square.astype(np.float32, copy=False)
    square = square / square.max()
    return np.maximum(square, _LEAST_WEIGHT * square.mean())


def _points(quantized: QuantizedWeights, shape: tuple[int, int]) -> Float32:
    """Returns the zero points of every block, float32."""
    if quantized.zero_points is None:
        return np.full(shape, np.float32(quantized.spec.format.zero_point))
    return quantized.zero_points.reshape(shape).astype(np.float32)


@dataclass(frozen=True)
class _Rows:
    """Some rows, side by side, every block divided by a power of two so that its peak is near 1.

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
    def of(cls, weight: npt.NDArray[np.generic], importance: Float32) -> _Rows:
        """Takes weights [N, K] and their importance [blocks, B]."""
        values = np.array(finite_float32(weight).T, order="C").reshape(*importance.shape, -1)
        peak = np.abs(values).max(axis=1)
        unit = np.ldexp(np.float32(1), np.frexp(peak)[1] - 1)
        unit[peak == 0] = 1
        values /= unit[:, None]
        share = importance.max(axis=1, keepdims=True)
        return cls(weight.dtype, values, unit, importance / share, share)

    def stored(self, scales: Float32) -> npt.NDArray[np.generic]:
        """Returns scales as they are stored."""
        return stored_scales(scales * self.unit, self.dtype)

    def total(self, sums: Float32) -> npt.NDArray[np.float64]:
        """Adds up sums of squares over the blocks of every row, [N]."""
        square = np.square(self.unit, dtype=np.float64) * self.share
        return np.asarray((sums * square).sum(axis=0))


def _search_integers(
    rows: _Rows, spec: Spec, nearest: tuple[Float32, Float32], engine: Engine
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.generic], Float32]:
    """Returns codes [blocks, B, N], scales and zero points [blocks, N]."""
    top = np.float32(spec.format.max_code)

    def measured(scales: Float32, points: Float32) -> Float32:
        sums = np.empty((3, *scales.shape), np.float32)
        engine.measure(rows.values, rows.weights, scales, points, top, False, sums)
        return sums

    tried, middles = candidates(rows.values, 1, spec)
    chosen = np.zeros(rows.unit.shape, np.int64)
    engine.least_error(rows.values, rows.weights, tried, middles, top, False, chosen)
    scales, points = (np.take_along_axis(a, chosen[None], 0)[0] for a in (tried, middles))
    best_scales, best_points = nearest[0] / rows.unit, nearest[1].copy()
    best = measured(best_scales, best_points)
    for _ in range(_FITS + 1):
        scales = rows.stored(scales).astype(np.float32) / rows.unit
        sums = measured(scales, points)
        better = sums[0] < best[0]
        best[:, better] = sums[:, better]
        best_scales[better], best_points[better] = scales[better], points[better]
        step = np.divide(sums[1], sums[2], out=np.zeros_like(scales), where=sums[2] > 0)
        scales = scales + step
    codes = np.empty(rows.values.shape, np.uint8)
    engine.encode_rows(rows.values, best_scales, best_points, top, codes)
    whole = rows.total(measured(np.zeros_like(scales), points)[0])
    lost = rows.total(best[0] + best_scales * best[1])  # sum w x (x - q)
    final = rows.stored((best_scales * gain(whole, lost)).astype(np.float32))
    return codes, final, best_points


def gain(whole: npt.NDArray[np.float64], lost: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns what makes the codes of every row as long as its weights.

    Args:
        whole: sum w x^2, float64 [N].
        lost: sum w x (x - q), float64 [N].
    """
    kept = np.maximum(whole - lost, whole / _MOST_GAIN)
    return np.divide(whole, kept, out=np.ones_like(whole), where=whole > 0)


def _search_floats(
    weight: npt.NDArray[np.generic],
    importance: Float32,
    nearest: QuantizedWeights,
    engine: Engine,
) -> QuantizedWeights:
    """Chooses among the stored scales next to those of round to nearest."""
    raise NotImplementedError
