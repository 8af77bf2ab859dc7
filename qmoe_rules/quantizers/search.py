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

_LANES = 128
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

    def encode_tiles(self, *arguments: Any) -> None:
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
        self, tiles: Float32, weights: Float32, scales: Float32, points: Float32, top: np.float32,
        floats: bool, sums: Float32,
    ) -> None:  # fmt: skip
        """See `_kernels.searching.measure`."""
        codes = _codes(tiles, scales, points, top, floats)
        off = tiles - scales[..., None, :] * codes
        weights = weights[None, :, :, None]
        terms = (weights * off * off, weights * off * codes, weights * codes * codes)
        for target, term in zip(sums, terms, strict=True):
            target[:] = np.add.accumulate(term, axis=2)[:, :, -1]

    def least_error(
        self, tiles: Float32, weights: Float32, scales: Float32, points: Float32, top: np.float32,
        floats: bool, chosen: npt.NDArray[np.int64],
    ) -> None:  # fmt: skip
        """See `_kernels.searching.least_error`."""
        best = np.full(chosen.shape, np.float32(np.inf))
        sums = np.empty((3, *chosen.shape), np.float32)
        for index, (scale, point) in enumerate(zip(scales, points, strict=True)):
            self.measure(tiles, weights, scale, point, top, floats, sums)
            error, slope, curve = sums
            if not floats:
                gain = np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)
                error = error - slope * gain
            better = error < best
            best[better], chosen[better] = error[better], index

    def encode_tiles(
        self, tiles: Float32, scales: Float32, points: Float32, top: np.float32,
        codes: npt.NDArray[np.uint8],
    ) -> None:  # fmt: skip
        """See `_kernels.searching.encode_tiles`."""
        codes[:] = _codes(tiles, scales, points, top, False) + points[..., None, :]


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
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        tiles = _Tiles.of(weight[part], importance)
        old = nearest.scales.reshape(scales.shape)[part], _points(nearest, scales.shape)[part]
        codes[part], scales[part], points[part] = _search_integers(tiles, spec, old, engine)
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
class _Tiles:
    """Some rows, side by side, every block divided by a power of two so that its peak is near 1.

    Attributes:
        rows: How many there are; what fills the last tile up is zero.
        dtype: The type of the weights.
        values: float32 [T, blocks, B, L].
        unit: float32 [T, blocks, L], what the values were divided by.
        weights: float32 [blocks, B], what columns count, divided alike by `share`.
        share: float32 [blocks, 1].
    """

    rows: int
    dtype: np.dtype
    values: Float32
    unit: Float32
    weights: Float32
    share: Float32

    @classmethod
    def of(cls, weight: npt.NDArray[np.generic], importance: Float32) -> _Tiles:
        """Makes tiles of weights [n, K] of importance [blocks, B]."""
        blocks = finite_float32(weight).reshape(len(weight), *importance.shape)
        values = cls.beside(blocks)
        peak = np.abs(values).max(axis=2)
        unit = np.ldexp(np.float32(1), np.frexp(peak)[1] - 1)
        unit[peak == 0] = 1
        values /= unit[:, :, None]
        share = importance.max(axis=1, keepdims=True)
        return cls(len(weight), weight.dtype, values, unit, importance / share, share)

    @staticmethod
    def beside(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Puts rows [n, blocks, ...] side by side, [T, blocks, ..., L]."""
        rows, *rest = array.shape
        padded = np.zeros((-(-rows // _LANES) * _LANES, *rest), array.dtype)
        padded[:rows] = array
        return np.ascontiguousarray(np.moveaxis(padded.reshape(-1, _LANES, *rest), 1, -1))

    def below(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Undoes `beside`."""
        rows = np.moveaxis(array, -1, 1)
        return rows.reshape(-1, *rows.shape[2:])[: self.rows]

    def rounded(self, scales: Float32) -> Float32:
        """Returns scales as they are once they have been stored."""
        return stored_scales(scales * self.unit, self.dtype).astype(np.float32) / self.unit

    def total(self, sums: Float32) -> npt.NDArray[np.float64]:
        """Adds up a sum of squares over the blocks of a row, [T, blocks, L] to [T, 1, L]."""
        square = np.square(self.unit, dtype=np.float64) * self.share
        return np.asarray((sums * square).sum(axis=1, keepdims=True))


def _search_integers(
    tiles: _Tiles, spec: Spec, nearest: tuple[npt.NDArray[Any], Float32], engine: Engine
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.generic], npt.NDArray[np.uint8]]:
    """Returns codes [n, K], scales and zero points [n, blocks]."""
    top = np.float32(spec.format.max_code)

    def measured(scales: Float32, points: Float32) -> Float32:
        sums = np.empty((3, *scales.shape), np.float32)
        engine.measure(tiles.values, tiles.weights, scales, points, top, False, sums)
        return sums

    tried, middles = candidates(tiles.values, 2, spec)
    chosen = np.zeros(tiles.unit.shape, np.int64)
    engine.least_error(tiles.values, tiles.weights, tried, middles, top, False, chosen)
    scales, points = (np.take_along_axis(a, chosen[None], 0)[0] for a in (tried, middles))
    best_scales = tiles.beside(nearest[0].astype(np.float32)) / tiles.unit
    best_points = tiles.beside(nearest[1])
    best = measured(best_scales, best_points)
    for _ in range(_FITS + 1):
        scales = tiles.rounded(scales)
        sums = measured(scales, points)
        better = sums[0] < best[0]
        best[:, better] = sums[:, better]
        best_scales[better], best_points[better] = scales[better], points[better]
        step = np.divide(sums[1], sums[2], out=np.zeros_like(scales), where=sums[2] > 0)
        scales = scales + step
    codes = np.empty(tiles.values.shape, np.uint8)
    engine.encode_tiles(tiles.values, best_scales, best_points, top, codes)
    gain = _gain(tiles, best, best_scales, measured(np.zeros_like(scales), points)[0])
    final = stored_scales((best_scales * gain).astype(np.float32) * tiles.unit, tiles.dtype)
    flat = tiles.below(codes).reshape(tiles.rows, -1)
    return flat, tiles.below(final), tiles.below(best_points).astype(np.uint8)


def _gain(
    tiles: _Tiles, sums: Float32, scales: Float32, power: Float32
) -> npt.NDArray[np.float64]:
    """Returns what makes the codes of every row as long as its weights, [T, 1, L]."""
    whole = tiles.total(power)
    lost = tiles.total(sums[0] + scales * sums[1])  # sum w x (x - q)
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


def _codes(
    tiles: Float32, scales: Float32, points: Float32, top: np.float32, floats: bool
) -> Float32:
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    low, high = -points, top - points
    steps = np.minimum(np.maximum(tiles * inverse[..., None, :], low[..., None, :]), high[..., None, :])
    rounder: Any = _ROUNDER
    if floats:
        size = np.abs(steps)
        rounder = _ROUNDER * np.where(size < 2, np.float32(0.5), np.where(size < 4, 1, 2))
        rounder = rounder.astype(np.float32)
    codes: Float32 = (steps + rounder) - rounder
    return codes
