"""What error feedback goes by: the curvature of an expert's loss, and the steps of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qmoe_rules.quantizers._search_rows import limits_of, nearest_codes

__all__ = ["Curvature", "Feedback", "NumpyFeedback"]

Float32 = npt.NDArray[np.float32]

# In means of the diagonal. Calibration is a sample: what it saw little of may matter elsewhere.
_DAMPING = 0.1
_PANEL, _STRIP = 128, 512  # columns that are factored at once, and those from which they are taken


class Feedback(Protocol):
    """What takes time; `_kernels.feeding` says what the arguments are."""

    def feed(self, *arguments: Any) -> None:
        """Quantizes columns one after the other, each making up for those before it."""

    def descend(self, *arguments: Any) -> None:
        """Moves codes one after the other to where the loss is least."""


class NumpyFeedback:
    """Every step is one float32 operation."""

    def feed(
        self, targets: Float32, weights: Float32, share: Float32, scales: Float32, points: Float32,
        top: np.float32, floats: bool, codes: Float32, errors: Float32,
    ) -> None:  # fmt: skip
        """See `_kernels.feeding.feed`."""
        targets = targets.copy()
        inverse, low, high = limits_of(scales, points, top)
        for k, target in enumerate(targets):
            codes[k] = nearest_codes(target * inverse, low, high, floats)
            errors[k] = weights[k] - scales * codes[k]
            targets[k + 1 :] += errors[k] * share[k, k + 1 :, None]

    def descend(
        self, slopes: Float32, hessian: Float32, scales: Float32, points: Float32,
        top: np.float32, floats: bool, codes: Float32, errors: Float32,
    ) -> None:  # fmt: skip
        """See `_kernels.feeding.descend`."""
        slopes = slopes.copy()
        inverse, low, high = limits_of(scales, points, top)
        for k, slope in enumerate(slopes):
            steps = codes[k] + (slope * (np.float32(1) / hessian[k, k])) * inverse
            new = nearest_codes(steps, low, high, floats)
            moves = scales * (new - codes[k])
            codes[k] = new
            errors[k] -= moves
            slopes[k + 1 :] -= moves * hessian[k, k + 1 :, None]


@dataclass(frozen=True)
class Curvature:
    """The loss of an expert's errors e, [N, K]: the sum over its rows of e H e^T.

    H = U D U^T with an upper triangular U of unit diagonal makes the loss of a row the sum over k
    of D_k (e_k + sum_{j<k} e_j U_jk)^2: what column k can make up for once all before it are done.

    Attributes:
        blocks: int64 [blocks], the blocks as they are quantized, those that see the most first:
            for what the last columns leave, no other one makes up.
        order: int64 [K], the columns as they are quantized, those of a block likewise.
        hessian: float32 [K, K], damped, in that order; its diagonal had the mean 1 before.
        shares: float32 [K, K], U^T in that order: row k is what column k takes of every error.
        left: float32 [K], D in the order of the weights: what is left of a column when those after
            it have made up for it.
    """

    blocks: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    hessian: Float32
    shares: Float32
    left: Float32

    @classmethod
    def of(cls, hessian: Float32, block: int) -> Curvature | None:
        """Factors a Hessian [K, K] of blocks of so many columns; None where it is zero."""
        seen = np.diagonal(hessian).astype(np.float64).reshape(-1, block)
        mean = np.float32(seen.mean())
        if mean == 0:
            return None
        blocks = np.argsort(-seen.sum(axis=1), kind="stable")
        within = np.argsort(-seen, axis=1, kind="stable")
        order = (within + block * np.arange(len(seen))[:, None])[blocks].reshape(-1)
        ordered = hessian[order][:, order]
        ordered /= mean
        lower = _factored(ordered)
        diagonal = np.diagonal(lower)[::-1]
        shares = np.ascontiguousarray(lower.T[::-1, ::-1])
        shares /= diagonal[:, None]
        left = np.empty_like(diagonal)
        left[order] = np.square(diagonal)
        return cls(blocks, order, ordered, shares, left)


def _factored(hessian: Float32) -> Float32:
    """Damps a Hessian, and returns the lower triangular factor of it turned around."""
    diagonal, damping = np.einsum("kk->k", hessian), _DAMPING
    while True:
        diagonal += np.float32(damping)
        try:
            return _cholesky(hessian[::-1, ::-1])
        except np.linalg.LinAlgError:  # rounding made it indefinite
            damping *= 10


def _cholesky(matrix: Float32) -> Float32:
    """Returns what `np.linalg.cholesky` does, by products of panels: in half the time."""
    lower, size = np.tril(matrix), len(matrix)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        corner, below = lower[start:stop, start:stop], lower[stop:, start:stop]
        corner[:] = np.linalg.cholesky(corner)
        below[:] = below @ np.linalg.inv(corner).T
        for first in range(0, len(below), _STRIP):
            last = first + _STRIP
            lower[stop + first :, stop + first : stop + last] -= below[first:] @ below[first:last].T
    return np.tril(lower)
