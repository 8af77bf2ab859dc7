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
    return _search(weight, spec, statistics, engine)


def search_numpy(
    weight: npt.NDArray[np.generic], spec: Spec, statistics: Statistics | None = None
) -> QuantizedWeights:
    """The meaning of `search`, in plain numpy; byte-equal to it, and its stand-in."""
    return _search(weight, spec, statistics, NumpyEngine())


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
