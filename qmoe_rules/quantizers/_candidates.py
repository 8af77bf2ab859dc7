"""The scales and zero points that a search tries, and what becomes of a scale when it is stored."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec
from qmoe_rules.quantizers.rtn import smallest_scale

__all__ = [
    "BEYOND",
    "FITS",
    "Tries",
    "candidates",
    "greatest_scale",
    "is_signed",
    "stored_scales",
    "tries",
]

Float32 = npt.NDArray[np.float32]


class _Divisors(NamedTuple):
    """What a peak, or half a range, is divided by to get a scale, in units of the codes' reach.

    Attributes:
        least: The least divisor.
        most: The greatest one of ordinary blocks.
        crest: The greatest one in units of peak / root mean square, which is large where a few
            weights are far greater than the others.
    """

    least: float
    most: float
    crest: float


_SYMMETRIC = {
    2: _Divisors(0.5, 2.2, 0.55),
    3: _Divisors(0.5, 1.8, 0.45),
    4: _Divisors(0.6, 1.6, 0.35),
    8: _Divisors(0.93, 1.08, 0.0),
}
_ASYMMETRIC = {
    2: _Divisors(0.6, 2.2, 0.55),
    3: _Divisors(0.7, 1.7, 0.45),
    4: _Divisors(0.8, 1.5, 0.35),
    8: _Divisors(0.98, 1.04, 0.0),
}
BEYOND = 8
"""How many divisors beyond the codes' reach are tried."""
FITS = 3
"""How often a scale is fitted to its codes, and the codes chosen anew."""


class Tries(NamedTuple):
    """What the scales to try are made of.

    Attributes:
        low: float32 [blocks, N], the least weight, or 0 where that is greater; always 0 where codes
            are symmetric.
        high: float32 [blocks, N], the greatest weight, or 0 where that is less; where codes are
            symmetric the peak, with the sign that sends it to a negative code if scales are signed.
        within: float32 [W], divisors of high - low up to the codes' reach, the last one.
        ratio: float32 [blocks, N], from one divisor beyond the reach to the next; there are
            `BEYOND`.
    """

    low: Float32
    high: Float32
    within: Float32
    ratio: Float32


def tries(values: Float32, spec: Spec) -> Tries:
    """Returns what the scales of blocks [blocks, B, N] are made of.

    A scale is the block's peak, or its range, over a divisor: every whole number up to the codes'
    reach, so that blocks whose codes do not use all of it are found again, and some beyond it,
    which cut the peak off, the more the greater it is among the weights.
    """
    low, high = values.min(axis=1), values.max(axis=1)
    size = np.maximum(-low, high)
    reach, limits = spec.format.zero_point, _SYMMETRIC[spec.format.bits]
    if spec.symmetric:
        high = np.where(-low >= high, size, -high) if is_signed(spec) else size
        low = np.zeros_like(high)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        size = (high - low) / 2
        reach, limits = spec.format.max_code, _ASYMMETRIC[spec.format.bits]
    rms = np.sqrt(np.square(values).mean(axis=1))
    crest = np.divide(size, rms, out=np.zeros_like(rms), where=rms > 0)
    most = np.maximum(crest * np.float32(limits.crest), np.float32(limits.most))
    within = np.arange(np.ceil(limits.least * reach), reach + 1, dtype=np.float32)
    return Tries(low, high, within, most ** np.float32(1 / BEYOND))


def candidates(tries: Tries, spec: Spec) -> tuple[Float32, Float32]:
    """Returns scales and zero points to try, float32 [G, blocks, N] each.

    Symmetric scales, if they are signed, have both signs; up to the reach the sign makes no
    difference. Zero points are the two next to the one that centres the range; where the peak is
    cut off, also the two that centre zero.
    """
    last = len(tries.within) - 1
    ratios = np.broadcast_to(tries.ratio, (BEYOND, *tries.ratio.shape)).copy()
    ratios[0] = tries.within[last] * tries.ratio
    within = np.broadcast_to(tries.within[:, None, None], (last + 1, *tries.ratio.shape))
    divisors = np.concatenate([within, np.multiply.accumulate(ratios)])
    scales = tries.high / divisors - tries.low / divisors
    centre = np.float32(spec.format.zero_point)
    if spec.symmetric:
        if is_signed(spec):
            scales = np.concatenate([scales, -scales[last:]])
        return scales, np.full_like(scales, centre)
    cut = scales[last + 1 :]
    below, above = _centred(scales, tries.low + tries.high, np.float32(spec.format.max_code))
    points = [below, above, np.full_like(cut, centre), np.full_like(cut, centre - 1)]
    return np.concatenate([scales, scales, cut, cut]), np.concatenate(points)


def stored_scales(
    scales: Float32, unit: Float32 | np.float32, dtype: np.dtype
) -> npt.NDArray[np.generic]:
    """Returns scales in some unit as they are stored: only 0 becomes 0, and none infinite."""
    with np.errstate(over="ignore"):
        scales = scales * unit
    end = greatest_scale(dtype)
    rounded: npt.NDArray[np.generic] = np.clip(scales, -end, end).astype(dtype)
    floor = smallest_scale(dtype)
    lost = (scales != 0) & (np.abs(rounded.astype(np.float32)) < floor)
    rounded[lost] = np.copysign(floor, scales[lost]).astype(dtype)
    return rounded


def greatest_scale(dtype: np.dtype) -> np.float32:
    """Returns the greatest scale of a type."""
    return np.float32(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def is_signed(spec: Spec) -> bool:
    """Returns whether scales may be negative."""
    return bool(spec.block_size) and spec.symmetric and spec.signed


def _centred(scales: Float32, ends: Float32, top: np.float32) -> tuple[Float32, Float32]:
    """Returns the zero points next to the one that centres ranges; ends is low + high."""
    middle = np.divide(ends, scales, out=np.zeros_like(scales), where=scales != 0)
    below = np.floor((top - middle) / 2)
    return np.clip(below, 0, top), np.clip(below + 1, 0, top)
