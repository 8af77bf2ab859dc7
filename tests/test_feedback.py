"""Error feedback by products of halves is error feedback column by column."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.quantizers._feedback import Curvature, NumpyFeedback, _cholesky
from qmoe_rules.quantizers.gptq import _Expert
from qmoe_rules.quantizers.search import search
from qmoe_rules.statistics import Statistics
from tests.test_gptq import seen
from tests.test_search import drawn

Array = npt.NDArray[Any]

# K that is no power of two times a block or a chunk, within one group of columns and beyond it.
COLUMNS = (224, 416, 672)
SPECS = [
    Spec(FORMATS["int4"], 32),
    Spec(FORMATS["int2"], 32, symmetric=False),
    Spec(FORMATS["int3"], 0),
    Spec(FORMATS["nvfp4"], 16),
]


def expert(columns: int, spec: Spec) -> _Expert:
    """Returns an expert before its first step."""
    weight, hessian = drawn(40, columns, np.float32), np.asarray(seen(columns).hessian)
    curvature = Curvature.of(hessian, columns // spec.blocks(columns))
    assert curvature is not None
    nearest = search(weight, spec, Statistics(1000, curvature.left))
    return _Expert.of(weight, nearest, curvature, NumpyFeedback())


def grid(spec: Spec, point: Array) -> Array:
    """Returns the values of a block's codes, [codes, N]."""
    if spec.format.element is None:
        return np.asarray(np.arange(spec.format.max_code + 1)[:, None] - point)
    values = np.arange(16, dtype=np.uint8).view(spec.format.element).astype(np.float64)
    return np.repeat(values[:, None], len(point), axis=1)


def nearest_code(target: Array, scale: Array, values: Array) -> Array:
    """Returns which of a block's codes is nearest, in float64."""
    off = np.abs(target - scale * values)
    nearest: Array = np.take_along_axis(values, off.argmin(axis=0)[None], 0)[0]
    return nearest


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_column_makes_up_for_those_before_it(spec: Spec, columns: int) -> None:
    found = expert(columns, spec)
    size = columns // len(found.scales)
    weights, shares = found.weights.astype(np.float64), found.curvature.shares.astype(np.float64)
    found.feed()
    # Given the errors before it, as they are: a code near a tie does not lead the rest astray.
    errors, same = found.errors.astype(np.float64), []
    for k, weight in enumerate(weights):
        scale, point = found.scales[k // size], found.points[k // size]
        target = weight + shares[k, :k] @ errors[:k]
        code = nearest_code(target, scale, grid(spec, point))
        same.append(code == found.codes[k])
    assert np.mean(same) > 0.999
    np.testing.assert_allclose(
        found.errors, weights - np.repeat(found.scales, size, axis=0) * found.codes, atol=1e-6
    )


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_sweep_moves_every_column_to_where_the_loss_is_least(spec: Spec, columns: int) -> None:
    found = expert(columns, spec)
    found.feed()
    size, hessian = columns // len(found.scales), found.curvature.hessian.astype(np.float64)
    codes, errors = found.codes.astype(np.float64), found.errors.astype(np.float64)
    weights = found.weights.astype(np.float64)
    found.descend()
    same = []
    for k in range(columns):
        block = slice(k // size * size, k // size * size + size)
        scale = found.scales[k // size].astype(np.float64)
        if k % size == 0:  # the block's scales have been fitted
            errors[block] = weights[block] - scale * codes[block]
        others = hessian[k] @ errors - hessian[k, k] * errors[k]
        # The loss of column k is least where hessian[k, k] * error = -others.
        target = weights[k] + others / hessian[k, k]
        code = nearest_code(target, scale, grid(spec, found.points[k // size]))
        same.append(code == found.codes[k])
        codes[k] = found.codes[k]
        errors[k] = weights[k] - scale * codes[k]
    assert np.mean(same) > 0.999
    np.testing.assert_allclose(found.errors, errors, atol=1e-6)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 640, 700])
def test_panels_factor_what_numpy_factors(size: int) -> None:
    matrix = np.asarray(seen(size, tokens=2 * size + 20).hessian)
    matrix += np.eye(size, dtype=np.float32) * np.diagonal(matrix).mean() / 10
    wanted = np.linalg.cholesky(matrix.astype(np.float64))
    np.testing.assert_allclose(_cholesky(matrix), wanted, atol=2e-5 * np.abs(wanted).max())


def test_what_has_no_factor_is_an_error_beyond_the_first_panel_too() -> None:
    matrix = np.eye(300, dtype=np.float32)
    matrix[200, 200] = -1
    with pytest.raises(np.linalg.LinAlgError):
        _cholesky(matrix)
