"""Error feedback: what a column's codes leave undone is done by the columns that follow.

The loss is that of the projection's output: the sum over the rows e = w - q of e H e^T, H being the
mean of g^2 x x^T over the inputs x that the expert saw, g the weight that the router gave it. The
codes are found in three steps:

1. `search` chooses scales (and zero points), weighing each column by what is left of it once all
   later ones have made up for it as well as they can.
2. Columns are quantized one after the other, each to what is best given the errors of those before
   it: the rounding of GPTQ (Frantar et al. 2022), in the form that needs no inverse (LDLQ, Chee et
   al. 2023): H = U D U^T, and column k aims at w_k + sum_{j<k} e_j U_jk.
3. Coordinate descent on the same loss: block by block the scale that is best for the codes, then
   code by code what is best given all others.

In the end the scales of a row take one factor that makes w H q^T = w H w^T, for the reason given in
`search`. Floating-point codes keep their scales in step 3, and the expert's scale takes the factor.
fp8 and experts without a Hessian are left to `search`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec, pack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers._blas import one_thread
from qmoe_rules.quantizers._candidates import is_signed, stored_scales
from qmoe_rules.quantizers._checks import check_statistics
from qmoe_rules.quantizers._feedback import Curvature, Feedback, NumpyFeedback
from qmoe_rules.quantizers._search_rows import gain
from qmoe_rules.quantizers.engine import kernels
from qmoe_rules.quantizers.search import search, search_numpy
from qmoe_rules.statistics import Statistics

__all__ = ["gptq", "gptq_numpy"]

Float32 = npt.NDArray[np.float32]
_Search = Callable[[npt.NDArray[np.generic], Spec, Statistics | None], QuantizedWeights]

_SWEEPS = 3
# Within so many columns errors are fed column by column; beyond, by products of halves, which are
# as large as can be, for products of few columns are slow.
_CHUNK = 32
_GROUP = 256  # columns whose slopes are found by one product


def gptq(
    weight: npt.NDArray[np.generic], spec: Spec, statistics: Statistics | None = None
) -> QuantizedWeights:
    """Quantizes one expert's weights so that its output loses least.

    Args:
        weight: [N, K] float32, float16 or bfloat16. K is divisible by the block.
        spec: The format and block size.
        statistics: What the expert has seen. Without a Hessian this is `search`.

    Returns:
        The codes and the scales, those of integers in the weight's dtype.

    Raises:
        SourceError: The weights hold an infinity or a NaN.
        ValueError: The weights have another type or a shape that `spec` cannot hold, or the
            statistics another size, or are not finite.
    """
    return _gptq(weight, spec, statistics, search, kernels() or NumpyFeedback())


def gptq_numpy(
    weight: npt.NDArray[np.generic], spec: Spec, statistics: Statistics | None = None
) -> QuantizedWeights:
    """The meaning of `gptq`, in plain numpy; byte-equal to it, and its stand-in."""
    return _gptq(weight, spec, statistics, search_numpy, NumpyFeedback())


def _gptq(
    weight: npt.NDArray[np.generic],
    spec: Spec,
    statistics: Statistics | None,
    find_scales: _Search,
    engine: Feedback,
) -> QuantizedWeights:
    if statistics is None or statistics.hessian is None or spec.format.square:
        return find_scales(weight, spec, statistics)
    columns = weight.shape[1]
    check_statistics(statistics, columns)
    with one_thread():
        curvature = Curvature.of(statistics.hessian, columns // spec.blocks(columns))
        if curvature is None:
            return find_scales(weight, spec, statistics)
        nearest = find_scales(weight, spec, Statistics(statistics.tokens, curvature.left))
        expert = _Expert.of(weight, nearest, curvature, engine)
        expert.feed()
        for _ in range(_SWEEPS):
            expert.descend()
        return expert.quantized()


@dataclass
class _Expert:
    """One expert under way; its columns lie in the order of the curvature.

    Attributes:
        nearest: What was found without error feedback.
        curvature: Of the loss.
        engine: What does the steps.
        weights: float32 [K, N].
        scales: float32 [blocks, N], what a code of 1 means.
        points: float32 [blocks, N], what lies between the least code and 0.
        unit: What weights and scales are divided by, a power of two: 1 unless they are so large
            that their squares would overflow.
        codes: float32 [K, N], without zero points.
        errors: float32 [K, N], weights - codes * scales.
    """

    nearest: QuantizedWeights
    curvature: Curvature
    engine: Feedback
    weights: Float32
    scales: Float32
    points: Float32
    unit: np.float32
    codes: Float32
    errors: Float32

    @classmethod
    def of(
        cls,
        weight: npt.NDArray[np.generic],
        nearest: QuantizedWeights,
        curvature: Curvature,
        engine: Feedback,
    ) -> _Expert:
        """Takes the scales from what was found without error feedback."""
        format, blocks = nearest.spec.format, curvature.blocks
        weights = np.array(weight.T[curvature.order], np.float32, order="C")
        scales = nearest.scales.reshape(len(weight), -1).T[blocks].astype(np.float32)
        least = format.zero_point if format.element is None else format.max_value
        points = np.full_like(scales, np.float32(least))
        if nearest.zero_points is not None:
            points[:] = nearest.zero_points.reshape(len(weight), -1).T[blocks]
        if nearest.global_scale is not None:
            scales *= nearest.global_scale
        unit = np.ldexp(np.float32(1), max(int(np.frexp(np.abs(weights).max())[1]) - 32, 0))
        weights /= unit
        scales /= unit
        codes = np.zeros_like(weights)
        return cls(nearest, curvature, engine, weights, scales, points, unit, codes, weights.copy())

    @property
    def floats(self) -> bool:
        """Whether codes are floating-point values."""
        return self.nearest.spec.format.element is not None

    @property
    def top(self) -> np.float32:
        """From the least code to the greatest."""
        format = self.nearest.spec.format
        return np.float32(2 * format.max_value if self.floats else format.max_code)

    def feed(self) -> None:
        """Chooses all codes, columns making up for those before them."""
        self._feed(slice(0, len(self.weights)), self.weights.copy())

    def _feed(self, part: slice, targets: Float32) -> None:
        """Chooses the codes of some columns; the errors before them are in `targets`."""
        if self._is_chunk(part):
            share = np.ascontiguousarray(self.curvature.shares[part, part].T)
            self.engine.feed(
                targets, self.weights[part], share, *self._grid(part),
                self.codes[part], self.errors[part],
            )  # fmt: skip
            return
        first, second = self._halves(part)
        middle = first.stop - first.start
        self._feed(first, targets[:middle])
        targets[middle:] += self.curvature.shares[second, first] @ self.errors[first]
        self._feed(second, targets[middle:])

    def descend(self) -> None:
        """Moves scales and codes, one block after the other, to where the loss is least."""
        size = max(_GROUP // self._size, 1) * self._size
        for start in range(0, len(self.weights), size):
            group = slice(start, min(start + size, len(self.weights)))
            self._descend(group, self.curvature.hessian[group] @ self.errors)

    def _descend(self, part: slice, slopes: Float32) -> None:
        """Moves some columns; `slopes` are their rows of the Hessian times all errors."""
        if part.stop - part.start == self._size and not self.floats:
            self._fit(part, slopes)
        hessian, errors = self.curvature.hessian, self.errors
        if self._is_chunk(part):
            square = np.ascontiguousarray(hessian[part, part])
            self.engine.descend(slopes, square, *self._grid(part), self.codes[part], errors[part])
            return
        first, second = self._halves(part)
        middle, before = first.stop - first.start, errors[first].copy()
        self._descend(first, slopes[:middle])
        slopes[middle:] += hessian[second, first] @ (errors[first] - before)
        self._descend(second, slopes[middle:])

    def _fit(self, block: slice, slopes: Float32) -> None:
        """Takes the scales that are best for a block's codes, and brings its slopes up to date."""
        index = block.start // self._size
        codes, old = self.codes[block], self.scales[index]
        bend = self.curvature.hessian[block, block] @ codes
        slope, curve = (codes * slopes).sum(axis=0), (codes * bend).sum(axis=0)
        wanted = old + np.divide(slope, curve, out=np.zeros_like(old), where=curve > 0)
        new = stored_scales(wanted, self.unit, self.nearest.scales.dtype).astype(np.float32)
        new /= self.unit
        moved = new - old
        better = np.isfinite(new) & (moved * (2 * slope - moved * curve) > 0)
        if not is_signed(self.nearest.spec):
            better &= new > 0
        self.scales[index] = np.where(better, new, old)
        slopes -= np.where(better, moved, 0) * bend
        self.errors[block] = self.weights[block] - self.scales[index] * codes

    def quantized(self) -> QuantizedWeights:
        """Returns the codes, and the scales with the factor that keeps outputs as large."""
        nearest, spec = self.nearest, self.nearest.spec
        sizes = self.curvature.hessian @ self.weights
        whole = (sizes * self.weights).sum(axis=0, dtype=np.float64)
        lost = (sizes * self.errors).sum(axis=0, dtype=np.float64)
        if spec.format.element is not None:
            factor = gain(whole.sum(), lost.sum()).astype(np.float32)
            patterns = self.codes.astype(spec.format.element).view(np.uint8)
            packed = self._packed(patterns)
            scale = np.asarray(nearest.global_scale) * factor
            return QuantizedWeights(packed, nearest.scales, spec, global_scale=scale)
        scales, points = np.empty_like(self.scales), np.empty_like(self.points)
        scales[self.curvature.blocks] = self.scales * gain(whole, lost)
        points[self.curvature.blocks] = self.points
        packed = self._packed(self.codes + np.repeat(self.points, self._size, axis=0))
        shape = nearest.scales.shape
        stored = stored_scales(scales.T, self.unit, nearest.scales.dtype).reshape(shape)
        zero_points = None if spec.symmetric else points.T.astype(np.uint8).reshape(shape)
        return QuantizedWeights(packed, stored, spec, zero_points)

    def _packed(self, codes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Packs codes [K, N] in the order of the weights."""
        placed = np.empty(codes.shape[::-1], np.uint8)
        placed[:, self.curvature.order] = codes.T
        return pack(placed, self.nearest.spec.format.bits)

    @property
    def _size(self) -> int:
        """The columns of a block."""
        return len(self.weights) // len(self.scales)

    def _is_chunk(self, part: slice) -> bool:
        columns: int = part.stop - part.start
        return columns <= min(_CHUNK, self._size)

    def _halves(self, part: slice) -> tuple[slice, slice]:
        """Splits columns in two, between blocks or, within a block, between chunks."""
        columns = part.stop - part.start
        middle = self._size if columns > self._size else _CHUNK
        while 2 * middle < columns:
            middle *= 2
        return slice(part.start, part.start + middle), slice(part.start + middle, part.stop)

    def _grid(self, part: slice) -> tuple[Float32, Float32, np.float32, bool]:
        """Returns what says which codes a block's columns have, as the engine takes it."""
        index = part.start // self._size
        return self.scales[index], self.points[index], self.top, self.floats
