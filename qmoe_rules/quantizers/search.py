"""A search for the scales that cost least; what an expert sees decides what an error counts.

For integers, a block's scale (and its zero point, where there is one) is chosen so that
sum_k w_k (x_k - q_k)^2 is least, w being the mean square of what column k is multiplied with, or
1 where nothing is known of it. The best of some candidates is fitted to its codes by least squares,
rounded to the type that is stored, and the codes chosen anew, several times. Round to nearest takes
part, so that the choice is never worse than `rtn`'s, and weights that it keeps exactly stay exact.

Least squares shrink: what they leave is orthogonal to the codes, so the codes are shorter than the
weights, by 11 % of the square with 2 bits. Outputs that are all too small, layer after layer, harm
a model more than the same error at random. So where it is known what the weights are multiplied
with, the scales of a row are multiplied in the end by the one factor that makes sum_k w_k x_k q_k =
sum_k w_k x_k^2, which leaves the row's output as large as it was. It is 1 where nothing is lost.

mxfp4 and nvfp4 try the scales next to `rtn`'s, and the expert's scale takes the factor. fp8 is left
to `rtn`: errors of floats are relative, so that the scale hardly matters.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec, pack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers._checks import check_statistics
from qmoe_rules.quantizers._search_rows import (
    ROWS,
    CompiledEngine,
    Engine,
    NumpyEngine,
    Rows,
    column_weights,
    gain,
)
from qmoe_rules.quantizers.engine import kernels
from qmoe_rules.quantizers.floats import float_rtn_numpy
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy
from qmoe_rules.statistics import Statistics

__all__ = ["search", "search_numpy"]

Float32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.generic]

_Gain = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], npt.NDArray[np.float64]]


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
    return _search(weight, statistics, rtn(weight, spec), CompiledEngine(engine))


def search_numpy(
    weight: npt.NDArray[np.generic], spec: Spec, statistics: Statistics | None = None
) -> QuantizedWeights:
    """The meaning of `search`, in plain numpy; byte-equal to it, and its stand-in."""
    nearest = (rtn_numpy if spec.format.element is None else float_rtn_numpy)(weight, spec)
    return _search(weight, statistics, nearest, NumpyEngine())


def _search(
    weight: npt.NDArray[np.generic],
    statistics: Statistics | None,
    nearest: QuantizedWeights,
    engine: Engine,
) -> QuantizedWeights:
    """Searches from what round to nearest made of the weights."""
    spec, columns = nearest.spec, weight.shape[1]
    check_statistics(statistics, columns)
    if spec.format.square:
        return nearest
    importance = column_weights(statistics, columns).reshape(spec.blocks(columns), -1)
    keep = gain if statistics is not None and statistics.mean_square.any() else _as_it_is
    find = _search_integers if spec.format.element is None else _search_floats
    return find(weight, importance, nearest, engine, keep)


def _search_integers(
    weight: npt.NDArray[np.generic],
    importance: Float32,
    nearest: QuantizedWeights,
    engine: Engine,
    keep: _Gain,
) -> QuantizedWeights:
    spec, blocks = nearest.spec, len(importance)
    scales = np.empty((len(weight), blocks), weight.dtype)
    points = np.empty(scales.shape, np.uint8)
    codes = np.empty(weight.shape, np.uint8)
    old_scales = nearest.scales.reshape(scales.shape).astype(np.float32)
    old_points = np.full(scales.shape, np.float32(spec.format.zero_point))
    if nearest.zero_points is not None:
        old_points[:] = nearest.zero_points.reshape(scales.shape)
    for start in range(0, len(weight), ROWS):
        part = slice(start, start + ROWS)
        rows = Rows.of(weight[part], importance)
        found = _fitted(rows, spec, old_scales[part].T, old_points[part].T, engine, keep)
        codes[part] = found[0].reshape(weight.shape[1], -1).T
        scales[part], points[part] = found[1].T, found[2].T
    shape = spec.scales_shape(*weight.shape)
    zero_points = None if spec.symmetric else points.reshape(shape)
    return QuantizedWeights(pack(codes, spec.format.bits), scales.reshape(shape), spec, zero_points)


def _fitted(
    rows: Rows, spec: Spec, old_scales: Float32, old_points: Float32, engine: Engine, keep: _Gain
) -> tuple[Codes, Scales, Float32]:
    """Returns codes [blocks, B, N], scales and zero points [blocks, N]."""
    scales, points = old_scales / rows.unit, old_points.copy()
    sums = np.empty((2, *scales.shape), np.float32)
    engine.fit(rows, spec, scales, points, sums)
    codes = np.empty(rows.values.shape, np.uint8)
    top = np.float32(spec.format.max_code)
    engine.encode_rows(rows.values, scales, points, top, False, codes)
    factor = keep(rows.power(), rows.total(sums[0] + scales * sums[1]))
    return codes, rows.stored((scales * factor).astype(np.float32)), points


def _search_floats(
    weight: npt.NDArray[np.generic],
    importance: Float32,
    nearest: QuantizedWeights,
    engine: Engine,
    keep: _Gain,
) -> QuantizedWeights:
    spec, expert_scale = nearest.spec, np.asarray(nearest.global_scale)
    end = np.float32(spec.format.max_value)
    tried = _neighbours(nearest.scales)
    stored = np.empty_like(nearest.scales)
    codes = np.empty(weight.shape, np.uint8)
    whole = lost = np.float64(0)
    for start in range(0, len(weight), ROWS):
        part = slice(start, start + ROWS)
        rows = Rows.of(weight[part], importance)
        scales = np.moveaxis(tried[:, part].astype(np.float32) * expert_scale, 1, 2) / rows.unit
        points, chosen = np.full_like(scales, end), np.empty(rows.unit.shape, np.int64)
        engine.least_error(rows.values, rows.weights, scales, points, 2 * end, chosen)
        scale = np.take_along_axis(scales, chosen[None], 0)[0]
        sums, found = np.empty((3, *scale.shape), np.float32), np.empty(rows.values.shape, np.uint8)
        engine.measure(rows.values, rows.weights, scale, points[0], 2 * end, True, sums)
        engine.encode_rows(rows.values, scale, points[0], 2 * end, True, found)
        stored[part] = np.take_along_axis(tried[:, part], chosen.T[None], 0)[0]
        codes[part] = found.reshape(weight.shape[1], -1).T
        whole += rows.power().sum()
        lost += rows.total(sums[0] + scale * sums[1]).sum()
    factor = keep(np.asarray(whole), np.asarray(lost)).astype(np.float32)
    return QuantizedWeights(pack(codes, 4), stored, spec, global_scale=expert_scale * factor)


def _as_it_is(
    whole: npt.NDArray[np.float64], _lost: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Stands in for `gain` where nothing is known of the inputs."""
    return np.ones_like(whole)


def _neighbours(scales: Scales) -> Scales:
    """Returns these scales and those that are stored next to them, [G, ...]; of 0 only 0."""
    patterns = scales.view(np.uint8).astype(np.int16)
    shifts: tuple[int, ...]
    if scales.dtype == ml_dtypes.float8_e8m0fnu:  # 2^-127 to 2^127
        shifts, low, high = (0, 1, -1), np.int16(0), np.int16(254)
        lows, highs = np.broadcast_to(low, patterns.shape), np.broadcast_to(high, patterns.shape)
    else:  # positive and finite
        shifts, positive = (0, 1, -1, 2, -2, 3, -3, 4), patterns > 0
        lows, highs = np.where(positive, 1, 0), np.where(positive, 0x7E, 0)
    moved = patterns + np.array(shifts, np.int16).reshape(-1, *[1] * patterns.ndim)
    clipped: npt.NDArray[np.generic] = np.clip(moved, lows, highs).astype(np.uint8)
    return clipped.view(scales.dtype)
