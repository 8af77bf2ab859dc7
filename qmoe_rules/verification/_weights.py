"""How far stored weights are from the float ones, one expert at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec
from qmoe_rules.measuring import relative_error
from qmoe_rules.quantizers.rtn import rtn
from qmoe_rules.stored import StoredProjection
from qmoe_rules.verification._report import Failure, ProjectionResult
from qmoe_rules.weights import ExpertWeights

__all__ = ["check_projection"]

# Round to nearest of the same weights in the same format is the measure. Searched scales come to
# 0.7 to 1.0 of its error, GPTQ to 1.3 to 1.6, and to 2.2 with a damping of 1e-4; lost zero points
# begin at 2.5, and rows or experts that are exchanged at 1.4 in absolute terms.
_FACTOR = 2.25
_WORST = 1.2
_ROUNDING = 1e-3  # scales that were rounded to a narrower type on the way
# Scales of the right expert correlate with those of round to nearest: 1.0 for round to nearest
# itself, 0.34 and more for searched ones, 0.47 and more for GPTQ. Another expert's: 0.0 +- 0.1.
_FOLLOW = 0.25
_ENOUGH_SCALES = 128
_SPREAD = 0.05
# Of the largest scale: below this, a row is so small that its scale may be rounded away.
_SMALL = 1e-3


@dataclass(frozen=True)
class _Expert:
    """What was found of one expert."""

    index: int
    error: float
    bound: float
    follow: float | None
    lost: int  # scales


def check_projection(
    name: str, weights: ExpertWeights, stored: StoredProjection
) -> tuple[ProjectionResult, list[Failure]]:
    """Compares the stored weights of a projection with the float ones.

    Args:
        name: `"fc1"` or `"fc2"`.
        weights: The float weights [E, N, K].
        stored: What the QMoE holds, of the same shape.

    Returns:
        The figures of the worst expert, and the checks that failed.

    Raises:
        SourceError: The data cannot be read, or the float weights are not finite.
    """
    experts = list(_experts(weights, stored))
    worst = max(experts, key=_excess)
    follows = {each.follow: each.index for each in experts if each.follow is not None}
    follow = min(follows, default=None)
    result = ProjectionResult(
        name,
        str(stored.spec),
        stored.bits_per_weight,
        worst.index,
        worst.error,
        worst.bound,
        follow,
        tuple(each.error for each in experts),
    )
    failures = [
        Failure(
            "scales",
            f"{name} of expert {each.index} has {each.lost} scales of 0 where weights are not 0",
        )
        for each in experts
        if each.lost
    ]
    if not worst.error <= worst.bound:
        failures.append(
            Failure(
                "weights",
                f"{name} of expert {worst.index} is {worst.error:.3g} off the float weights, "
                f"relatively; {stored.spec} should stay within {worst.bound:.3g}",
            )
        )
    if follow is not None and not follow >= _FOLLOW:
        failures.append(
            Failure(
                "scales",
                f"{name} of expert {follows[follow]} has scales that do not follow its weights: "
                f"their correlation is {follow:.2f}, at least {_FOLLOW} is expected",
            )
        )
    return result, failures


def _experts(weights: ExpertWeights, stored: StoredProjection) -> Iterator[_Expert]:
    for index in range(weights.shape[0]):
        weight = np.ascontiguousarray(weights.expert(index))
        found = stored.expert(index)
        nearest = rtn(weight, stored.spec)
        bound = min(_FACTOR * relative_error(weight, nearest.dequantize()) + _ROUNDING, _WORST)
        yield _Expert(
            index,
            relative_error(weight, found.dequantize()),
            bound,
            _follow(found.scales, nearest.scales, stored.spec),
            _lost(found.scales, nearest.scales),
        )
        weights.release(index)
        stored.release(index)


def _follow(scales: npt.NDArray[Any], expected: npt.NDArray[Any], spec: Spec) -> float | None:
    """Returns the correlation of the logarithms of two sets of scales, or None.

    There is none where the scales are few, or those that are expected nearly the same.
    """
    pair = [np.abs(each.astype(np.float64)).ravel() for each in (scales, expected)]
    used = (pair[0] > 0) & (pair[1] > 0) & np.isfinite(pair[0])
    if used.sum() < _ENOUGH_SCALES or not spec.has_scales:
        return None
    found, wanted = (np.log(each[used]) for each in pair)
    if wanted.std() < _SPREAD:
        return None
    if found.std() == 0:
        return 0.0
    return float(np.corrcoef(found, wanted)[0, 1])


def _lost(scales: npt.NDArray[Any], expected: npt.NDArray[Any]) -> int:
    """Returns how many scales are 0 where those that are expected are not."""
    found, wanted = (np.abs(each.astype(np.float64)) for each in (scales, expected))
    return int(((found == 0) & (wanted > _SMALL * wanted.max(initial=0))).sum())


def _excess(expert: _Expert) -> float:
    """Orders experts by how far they are beyond their bound; no number is the worst."""
    return np.inf if np.isnan(expert.error) else expert.error / expert.bound
