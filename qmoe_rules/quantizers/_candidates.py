"""The scales and zero points that a search tries, and what becomes of a scale when it is stored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec
from qmoe_rules.quantizers.rtn import smallest_scale

__all__ = ["candidates", "is_signed", "stored_scales"]

Float32 = npt.NDArray[np.float32]

# By width: the least and the greatest divisor in units of the codes' reach, and how many divisors
# there are beyond the reach. Below it they are all the whole numbers, so that blocks of codes that
# do not use the whole reach are found again.
_SYMMETRIC = {2: (0.5, 3.0, 8), 3: (0.5, 2.2, 8), 4: (0.6, 1.7, 8), 8: (0.93, 1.08, 8)}
_ASYMMETRIC = {2: (0.6, 2.6, 8), 3: (0.6, 1.8, 8), 4: (0.6, 1.5, 8), 8: (0.97, 1.04, 6)}


def candidates(low: Float32, high: Float32, spec: Spec) -> tuple[Float32, Float32]:
    """Returns scales and zero points to try, float32 [G, ...] each.

    Symmetric codes: the peak over a divisor, of the sign that sends the peak to a negative code,
    then of the other one; only positive ones where scales are not signed. Asymmetric codes: the
    range over a divisor, with the two zero points that are nearest to centring it.

    Args:
        low: The least weight of every block, float32 [...].
        high: The greatest.
        spec: Integers, and how they are stored.
    """
    if spec.symmetric:
        peak = np.where(-low >= high, low, high)
        ratios = _divisors(spec.format.zero_point, *_SYMMETRIC[spec.format.bits])
        ratios = np.concatenate([ratios, -ratios]) if is_signed(spec) else ratios
        scales = (-peak if is_signed(spec) else np.abs(peak)) / _column(ratios, peak.ndim)
        return scales, np.full(scales.shape, np.float32(spec.format.zero_point))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    top = spec.format.max_code
    ratios = _column(_divisors(top, *_ASYMMETRIC[spec.format.bits]), low.ndim)
    scales = high / ratios - low / ratios
    middle = np.divide(low + high, scales, out=np.zeros_like(scales), where=scales != 0)
    below = np.floor((np.float32(top) - middle) / np.float32(2))
    points = np.clip(np.concatenate([below, below + np.float32(1)]), 0, np.float32(top))
    return np.concatenate([scales, scales]), points


def stored_scales(scales: Float32, dtype: np.dtype) -> npt.NDArray[np.generic]:
    """Returns scales rounded to the type that is stored, and never to 0 but from 0."""
    rounded = scales.astype(dtype)
    floor = smallest_scale(dtype)
    lost = (scales != 0) & (np.abs(rounded.astype(np.float32)) < floor)
    rounded[lost] = np.copysign(floor, scales[lost]).astype(dtype)
    return rounded


def is_signed(spec: Spec) -> bool:
    """Returns whether scales may be negative."""
    return bool(spec.block_size) and spec.symmetric and spec.signed


def _divisors(reach: int, least: float, most: float, count: int) -> Float32:
    whole = np.arange(np.ceil(least * reach), reach + 1)
    return np.concatenate([whole, np.geomspace(reach, most * reach, count + 1)[1:]]).astype("f4")


def _column(values: Float32, axes: int) -> Float32:
    return values.reshape(-1, *[1] * axes)
