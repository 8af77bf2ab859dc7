"""What every quantizer asks of its input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qmoe_rules.errors import SourceError
from qmoe_rules.formats import SCALE_DTYPES, Spec
from qmoe_rules.statistics import Statistics

__all__ = ["check", "check_statistics", "finite_float32", "not_finite"]

# Numbers of a Hessian that are looked at in one go.
_BLOCK = 1 << 20
# By how much sums in float32 may be off.
_ROUNDING = np.float32(1.001)


def check(weight: npt.NDArray[np.generic], spec: Spec) -> None:
    """Raises ValueError where `spec` cannot hold a weight of this type and shape."""
    if weight.dtype.name not in SCALE_DTYPES:
        raise ValueError(f"weights are {weight.dtype}; they may be {', '.join(SCALE_DTYPES)}")
    reason = spec.refuse() or spec.refuse_shape(*weight.shape)
    if reason:
        raise ValueError(reason)


def finite_float32(weight: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Returns weights [N, K] in float32, or raises SourceError where one is not finite."""
    values = weight.astype(np.float32)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise not_finite(int(np.argmin(finite)))
    return values


def not_finite(row: int) -> SourceError:
    """Returns the error for a row that holds an infinity or a NaN."""
    return SourceError(f"row {row} holds an infinity or a NaN")


def check_statistics(statistics: Statistics | None, columns: int) -> None:
    """Raises ValueError where statistics do not fit a weight of so many columns."""
    if statistics is None:
        return
    shapes = {"mean_square": (columns,), "hessian": (columns, columns)}
    for name, shape in shapes.items():
        array = getattr(statistics, name)
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{name} is {list(array.shape)}, where K={columns}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds an infinity or a NaN")
    if (statistics.mean_square < 0).any():
        raise ValueError("mean_square is negative somewhere")
    if statistics.hessian is not None:
        _check_moments(statistics.hessian)


def _check_moments(hessian: npt.NDArray[np.float32]) -> None:
    """Raises ValueError where no rows x have these [K, K] means of x x^T."""
    diagonal = np.diagonal(hessian)
    if (diagonal < 0).any():
        raise ValueError("hessian is negative somewhere on its diagonal")
    # Of numbers that are too small for their squares the diagonal knows nothing.
    roots = np.sqrt(diagonal + np.finfo(np.float32).tiny)
    step = max(_BLOCK // len(roots), 1)
    with np.errstate(over="ignore"):
        for first in range(0, len(roots), step):
            rows = slice(first, first + step)
            excess = np.abs(hessian[rows]) - _ROUNDING * roots[rows, None] * roots
            if (excess > 0).any():
                row, column = np.unravel_index(int(excess.argmax()), excess.shape)
                row, found = first + row, hessian[first + row, column]
                raise ValueError(
                    f"hessian[{row}, {column}] is {found:.3g}, more than its diagonal allows, "
                    f"{diagonal[row]:.3g} and {diagonal[column]:.3g}: no inputs have such moments"
                )
