"""The scales and zero points that a search tries, and what becomes of a scale when it is stored."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec
from qmoe_rules.quantizers.rtn import smallest_scale

__all__ = ["candidates", "is_signed", "stored_scales"]

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
_BEYOND = 8


def candidates(blocks: Float32, axis: int, spec: Spec) -> tuple[Float32, Float32]:
    """Returns scales and zero points to try, float32 [G, ...] each.

    A scale is the block's peak, or its range, over a divisor: every whole number up to the codes'
    reach, so that blocks whose codes do not use all of it are found again, and some beyond it,
    which cut the peak off. Symmetric scales have the sign that sends the peak to a negative code,
    and the other one; only positive ones where they are not signed. Zero points are the two next
    to the one that centres the range; where the peak is cut off, also the two that centre zero.

    Args:
        blocks: Weights, float32 [..., B, ...].
        axis: That of the blocks.
        spec: Integers, and how they are stored.
    """
    low, high = blocks.min(axis=axis), blocks.max(axis=axis)
    rms = np.sqrt(np.square(blocks).mean(axis=axis))
    if spec.symmetric:
        peak = np.where(-low >= high, low, high)
        within, beyond = _divisors(spec.format.zero_point, _SYMMETRIC[spec.format.bits], peak, rms)
        top = -peak if is_signed(spec) else np.abs(peak)
        scales = np.concatenate([top / within, top / beyond])
        if is_signed(spec):
            scales = np.concatenate([scales, -scales])
        return scales, np.full_like(scales, spec.format.zero_point)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    top = np.float32(spec.format.max_code)
    limits = _ASYMMETRIC[spec.format.bits]
    within, beyond = _divisors(spec.format.max_code, limits, (high - low) / 2, rms)
    whole, cut = high / within - low / within, high / beyond - low / beyond
    scales = np.concatenate([whole, whole, cut, cut, cut, cut])
    centre = np.full_like(cut, spec.format.zero_point)
    ends = low + high
    points = [*_centred(whole, ends, top), *_centred(cut, ends, top), centre, centre - 1]
    return scales, np.concatenate(points)


def stored_scales(
    scales: Float32, unit: Float32 | np.float32, dtype: np.dtype
) -> npt.NDArray[np.generic]:
    """Returns scales in some unit as they are stored: only 0 becomes 0, and none infinite."""
    with np.errstate(over="ignore"):
        scales = scales * unit
    end = np.float32(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    rounded: npt.NDArray[np.generic] = np.clip(scales, -end, end).astype(dtype)
    floor = smallest_scale(dtype)
    lost = (scales != 0) & (np.abs(rounded.astype(np.float32)) < floor)
    rounded[lost] = np.copysign(floor, scales[lost]).astype(dtype)
    return rounded


def is_signed(spec: Spec) -> bool:
    """Returns whether scales may be negative."""
    return bool(spec.block_size) and spec.symmetric and spec.signed


def _divisors(
    reach: int, limits: _Divisors, peak: Float32, rms: Float32
) -> tuple[Float32, Float32]:
    """Returns the divisors up to the reach, [G, 1, ...], and those beyond it, [G, ...]."""
    within = np.arange(np.ceil(limits.least * reach), reach + 1, dtype=np.float32)
    crest = np.divide(np.abs(peak), rms, out=np.zeros_like(rms), where=rms > 0)
    most = np.maximum(crest * np.float32(limits.crest), np.float32(limits.most))
    ratio = most ** np.float32(1 / _BEYOND)
    beyond = np.multiply.accumulate(np.stack([reach * ratio, *[ratio] * (_BEYOND - 1)]))
    return within.reshape(-1, *[1] * rms.ndim), beyond


def _centred(scales: Float32, ends: Float32, top: np.float32) -> tuple[Float32, Float32]:
    """Returns the zero points next to the one that centres ranges; ends is low + high."""
    middle = np.divide(ends, scales, out=np.zeros_like(scales), where=scales != 0)
    below = np.floor((top - middle) / 2)
    return np.clip(below, 0, top), np.clip(below + 1, 0, top)
