"""What quantizers ask of statistics: moments that some inputs have, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qmoe_rules.quantizers import _checks
from qmoe_rules.quantizers._checks import check_statistics
from qmoe_rules.statistics import Statistics

Array = npt.NDArray[Any]


def moments(x: Array) -> Statistics:
    hessian = (x.T @ x / np.float32(len(x))).astype(np.float32)
    return Statistics(len(x), np.diagonal(hessian).copy(), hessian)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1 << 32),
    tokens=st.integers(1, 300),
    columns=st.integers(1, 400),
    exponents=st.tuples(st.floats(-30, 12), st.floats(-30, 12)),
)
def test_moments_of_any_inputs_are_moments(
    seed: int, tokens: int, columns: int, exponents: tuple[float, float]
) -> None:
    """Also those of columns that are alike, or never seen, or too small for their squares."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    low, high = sorted(exponents)
    x *= np.float32(10) ** rng.uniform(low, high, columns).astype(np.float32)
    x[:, rng.random(columns) < 0.1] = 0
    x[:, rng.random(columns) < 0.1] = x[:, :1]
    check_statistics(moments(x), columns)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1 << 32),
    columns=st.integers(2, 400),
    block=st.sampled_from([1, 1000, 1 << 20]),
    sign=st.sampled_from([-1, 1]),
)
def test_what_no_inputs_have_is_found_wherever_it_is(
    seed: int, columns: int, block: int, sign: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, columns)) * 10 ** rng.uniform(-3, 3, columns)
    known = moments(x.astype(np.float32))
    assert known.hessian is not None
    row, column = rng.integers(0, columns, 2)
    assume(row != column)
    allowed = np.sqrt(known.mean_square[row] * known.mean_square[column])
    known.hessian[row, column] = sign * np.float32(1.01) * allowed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_checks, "_BLOCK", block)
        with pytest.raises(ValueError, match="hessian") as error:
            check_statistics(known, columns)
    assert str(error.value) == (
        f"hessian[{row}, {column}] is {known.hessian[row, column]:.3g}, more than its diagonal "
        f"allows, {known.mean_square[row]:.3g} and {known.mean_square[column]:.3g}: no inputs have "
        "such moments"
    )
