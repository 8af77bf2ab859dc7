"""The compiled engine and numpy: what both are given, and a comparison of their bytes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers.floats import float_rtn_numpy
from qmoe_rules.quantizers.rtn import rtn_numpy

Weight = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]

DTYPES = list(SCALE_DTYPES.values())
INTEGERS = [f"int{bits}" for bits in (2, 3, 4, 8)]
# Powers of two, as recipes have them, and sizes that vectors of 16 columns do not fill.
BLOCKS = (0, 8, 16, 24, 32, 48, 96)
INTEGER_SPECS = [
    Spec(FORMATS[name], block, symmetric, signed)
    for name in INTEGERS
    for block in BLOCKS
    for symmetric, signed in ((True, True), (True, False), (False, True))
]
FLOAT_SPECS = [
    Spec(FORMATS["mxfp4"], 32),
    Spec(FORMATS["nvfp4"], 16),
    *(Spec(FORMATS["fp8"], block) for block in (0, 8, 16, 24, 128)),
]
SPECS = INTEGER_SPECS + FLOAT_SPECS
ROWS, COLUMNS = 20, 96

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def in_numpy(weight: Weight, spec: Spec) -> QuantizedWeights:
    return (rtn_numpy if spec.format.element is None else float_rtn_numpy)(weight, spec)


def assert_same(one: QuantizedWeights, other: QuantizedWeights) -> None:
    """Byte for byte: signs of zeros count."""
    for part in ("packed", "scales", "zero_points", "global_scale"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert (ours is None) == (theirs is None), f"{part}, {one.spec}"
        if ours is not None:
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), f"{part}, {one.spec}"
            bits = f"u{ours.itemsize}"
            np.testing.assert_array_equal(
                np.atleast_1d(ours).view(bits), np.atleast_1d(theirs).view(bits), err_msg=part
            )


def weights(dtype: np.dtype, seed: int = 0) -> Weight:
    """Rows of very different sizes, among them zeros, zeros of both signs and subnormals."""
    rng = np.random.default_rng(seed)
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    weight = (rng.standard_normal((ROWS, COLUMNS)) * 2.0 ** rng.integers(-9, 9, (ROWS, 1))).astype(
        dtype
    )
    weight[2] = 0
    weight[3] = rng.choice([0.0, -0.0], COLUMNS)
    weight[4] = rng.integers(-9, 10, COLUMNS) * float(info.smallest_subnormal)
    weight[5] = rng.choice([-1, 1], COLUMNS) * float(info.max)
    weight[6:9, :48] = 0
    weight[9] = np.abs(weight[9].astype(np.float32))
    weight[10] = -np.abs(weight[10].astype(np.float32))
    return weight


LAYOUT_CASES = [
    *(
        ("cutlass_sm80", bits, 64 // bits * n, 64 * k)
        for bits in (2, 4, 8)
        for n in (1, 3)
        for k in (1, 5)
    ),
    *(
        ("n_packed", 4, rows, columns)
        for rows in (2, 16, 30, 130, 258)
        for columns in (2, 16, 34, 96)
    ),
]


def raw_bytes(rows: int, columns: int, bits: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)
