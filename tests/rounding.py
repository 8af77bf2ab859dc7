"""Rounding to nearest: the weights, specs and engines that its tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy, smallest_scale

Weight = npt.NDArray[np.generic]
DType = np.dtype[np.generic]
Engine = Callable[[Weight, Spec], QuantizedWeights]

DTYPES = list(SCALE_DTYPES.values())
INTEGERS = [format for format in FORMATS.values() if format.element is None]
SIGNED = [Spec(format, block) for format in INTEGERS for block in (0, 16, 32, 64, 128)]
POSITIVE = [Spec(format, 32, signed=False) for format in INTEGERS]
ASYMMETRIC = [replace(spec, symmetric=False) for spec in SIGNED]
SPECS = SIGNED + POSITIVE + ASYMMETRIC
ROWS, COLUMNS = 8, 256

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s}{'' if s.signed else ' +'}")
each_engine = pytest.mark.parametrize("engine", [rtn, rtn_numpy], ids=["compiled", "numpy"])


def assert_same(one: QuantizedWeights, other: QuantizedWeights) -> None:
    """Byte for byte: signs of zeros count."""
    assert one.spec == other.spec
    assert one.scales.dtype == other.scales.dtype
    np.testing.assert_array_equal(one.packed, other.packed, err_msg=f"codes, {one.spec}")
    ours, theirs = (q.scales.view(f"u{q.scales.itemsize}") for q in (one, other))
    np.testing.assert_array_equal(ours, theirs, err_msg=f"patterns of scales, {one.spec}")
    assert (one.zero_points is None) == (other.zero_points is None) == one.spec.symmetric
    if one.zero_points is not None and other.zero_points is not None:
        assert one.zero_points.dtype == other.zero_points.dtype == np.uint8
        np.testing.assert_array_equal(one.zero_points, other.zero_points)


def limits(dtype: DType) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def ordinary(dtype: DType, seed: int = 0) -> Weight:
    """Normally distributed weights, as a trained layer has them."""
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(dtype)


def nasty(dtype: DType) -> dict[str, Weight]:
    """Weights by what is difficult about them."""
    rng = np.random.default_rng(0)
    info = limits(dtype)
    shape = (ROWS, COLUMNS)
    heavy = np.clip(rng.standard_t(1, shape) * 0.02, -100, 100)
    zero_rows, zero_blocks = heavy.copy(), heavy.copy()
    zero_rows[[0, 3, ROWS - 1]] = 0
    zero_blocks[:, 16:48] = 0
    zero_blocks[2, 128:] = 0
    tiny = float(info.smallest_subnormal)
    found = {
        "ordinary": rng.standard_normal(shape),
        "heavy tails": heavy,
        "rows of zeros": zero_rows,
        "blocks of zeros": zero_blocks,
        "negative zeros": np.full(shape, -0.0),
        "zeros of both signs": rng.choice([0.0, -0.0], shape),
        "subnormals": rng.integers(-300, 301, shape) * tiny,
        "the smallest subnormal alone": np.where(rng.random(shape) < 0.01, tiny, 0.0),
        "its negative alone": np.where(rng.random(shape) < 0.01, -tiny, 0.0),
        "the largest finite": rng.choice([1.0, -1.0, 0.0, 0.4], shape) * float(info.max),
        "ties of +m and -m": rng.choice([3.0, -3.0, 1.5, 0.0], shape),
        "ties between codes": rng.integers(-16, 16, shape) * 0.5,
        "scales around their smallest": rng.standard_normal(shape)
        * float(smallest_scale(dtype))
        * 2.0 ** rng.integers(-4, 9, (ROWS, 1)),
    }
    return {name: weight.astype(dtype) for name, weight in found.items()}
