"""Expert weights: a plain pattern, a seed, and a few corners that are put into it.

Drawing every number would be slow, and would shrink slowly. So what is drawn is a short
description, and the array follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from qmoe_rules.formats import SCALE_DTYPES
from qmoe_rules.testing._printing import Brief

__all__ = [
    "Corner",
    "WeightDesign",
    "activation_dtypes",
    "expert_shapes",
    "expert_weights",
    "weight_designs",
]

Array = npt.NDArray[Any]
Shape = tuple[int, int, int]

_TAME = ("zero_row", "zero_expert", "outlier", "constant_block", "ties", "signed_zeros")
_CONSTANT = 16  # columns of a constant block: the smallest block that shares a scale


@dataclass(frozen=True, repr=False)
class Corner(Brief):
    """Something unusual at one place of a weight.

    Attributes:
        kind: `"zero_row"`, `"zero_expert"`, `"outlier"` (one number), `"constant_block"` (16
            columns), `"ties"` (a row of +m, -m, m/2 and 0), `"signed_zeros"` (a row of both),
            `"subnormals"` (a row), `"extremes"` (a row of the largest and smallest normal numbers
            of both signs), `"infinity"` or `"nan"` (one number).
        expert: Where, modulo E.
        row: Where, modulo N.
        column: Where, modulo K.
        size: Which one, 0 to 7; an outlier is +-2^(size + 1).
    """

    kind: str
    expert: int = 0
    row: int = 0
    column: int = 0
    size: int = 0

    def put(self, weight: Array, unit: float) -> None:
        """Writes it into a weight [E, N, K] whose ordinary numbers are at most `unit`."""
        experts, rows, columns = weight.shape
        info: Any = ml_dtypes.finfo(weight.dtype)  # type: ignore[no-untyped-call]
        expert, column = self.expert % experts, self.column % columns
        row: Array = weight[expert, self.row % rows]
        sign = 1.0 if column % 2 == 0 else -1.0
        if self.kind == "zero_expert":
            weight[expert] = 0
        elif self.kind == "constant_block":
            start = column // _CONSTANT * _CONSTANT
            row[start : start + _CONSTANT] = sign * unit * (self.size + 1) / 8
        elif self.kind in ("outlier", "infinity", "nan"):
            single = {"outlier": unit * 2.0 ** (self.size + 1), "infinity": np.inf, "nan": np.nan}
            row[column] = sign * single[self.kind]
        else:
            largest, smallest = float(info.max), float(info.smallest_normal)
            least = float(info.smallest_subnormal)
            cycles = {
                "zero_row": [0.0],
                "ties": [unit, -unit, unit / 2, 0.0],
                "signed_zeros": [0.0, -0.0],
                "subnormals": [least * step for step in (1, -1, 2, -7, 3, 0, self.size)],
                "extremes": [largest, -largest, smallest, -smallest, 0.0],
            }
            cycle = np.roll(np.array(cycles[self.kind]), column)
            row[:] = np.resize(cycle, columns)


@dataclass(frozen=True, repr=False)
class WeightDesign(Brief):
    """What a weight is made of; the same design and shape always make the same array.

    Attributes:
        base: `"steps"` (multiples of 1/16 below 1 in a fixed order, different in every row),
            `"normal"` (normally distributed, of deviation 1/4, each row of a size of its own) or
            `"patterns"` (any finite bit patterns).
        seed: Of the base.
        corners: What is put into it, one after the other.
    """

    base: str = "steps"
    seed: int = 0
    corners: tuple[Corner, ...] = ()

    def salted(self, salt: int) -> WeightDesign:
        """Returns the same with other numbers in its base."""
        return replace(self, seed=self.seed + salt)

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike, unit: float = 1.0) -> Array:
        """Returns the weight.

        Args:
            shape: (E, N, K).
            dtype: float32, float16 or bfloat16.
            unit: What the numbers of steps and normals, and outliers, are scaled with.
        """
        rng = np.random.default_rng(self.seed)
        if self.base == "patterns":
            weight = _finite_patterns(rng, shape, np.dtype(dtype))
        elif self.base == "normal":
            spread = np.exp2(rng.integers(-2, 3, (*shape[:-1], 1)))
            wide = rng.standard_normal(shape) * spread * unit / 4
            # None is so near to zero that float16 would have it as a subnormal.
            weight = np.where(np.abs(wide) < unit / 512, 0.0, wide).astype(dtype)
        else:
            expert, row, column = np.indices(shape)
            mixed = 11 * expert + 7 * row + 5 * column + row * column + 3 * self.seed
            weight = ((mixed % 31 - 15) * (unit / 16)).astype(dtype)
        for corner in self.corners:
            corner.put(weight, unit)
        return weight


def _finite_patterns(rng: np.random.Generator, shape: Sequence[int], dtype: np.dtype) -> Array:
    """Returns random bit patterns but for those of infinities and NaN, some of them extremes."""
    pattern = np.dtype(f"u{dtype.itemsize}")
    infinity = int(np.array(np.inf, dtype).view(pattern))
    sign = 1 << (8 * dtype.itemsize - 1)
    bits = rng.integers(0, 2 * sign, shape, np.uint64).astype(pattern)
    extremes = np.array([0, 1, infinity - 1, sign, sign | 1, sign | (infinity - 1)], pattern)
    bits = np.where(rng.random(shape) < 0.1, rng.choice(extremes, shape), bits)
    lowest_exponent_bit = infinity & ~(infinity << 1)
    bits = np.where(bits & infinity == infinity, bits ^ lowest_exponent_bit, bits).astype(pattern)
    return bits.view(dtype)


def _corner(kind: str, number: int, largest: int) -> Corner:
    """Returns a corner whose place and size are in one number, because every draw takes time."""
    size = number & 7 & largest
    return Corner(kind, number >> 3 & 7, number >> 6 & 31, number >> 11, size)


def activation_dtypes() -> SearchStrategy[np.dtype]:
    """Returns a strategy for the types of expert weights: float32, float16 and bfloat16."""
    return st.sampled_from(list(SCALE_DTYPES.values()))


def expert_shapes(
    *,
    max_experts: int = 3,
    max_rows: int = 4,
    max_columns: int = 64,
    column_step: int = 1,
) -> SearchStrategy[Shape]:
    """Returns a strategy for shapes (E, N, K) of expert weights.

    Args:
        max_experts: The largest E.
        max_rows: The largest N.
        max_columns: The largest K.
        column_step: K is a multiple of it, such as a block size.
    """
    for name, size, least in (
        ("max_experts", max_experts, 1),
        ("max_rows", max_rows, 1),
        ("column_step", column_step, 1),
        ("max_columns", max_columns, column_step),
    ):
        if size < least:
            raise InvalidArgument(f"{name}={size}; it is at least {least}")
    columns = st.integers(1, max_columns // column_step).map(lambda count: count * column_step)
    return st.tuples(st.integers(1, max_experts), st.integers(1, max_rows), columns)


def weight_designs(
    *,
    allow_extremes: bool = True,
    allow_subnormal: bool = True,
    allow_infinity: bool = False,
    allow_nan: bool = False,
) -> SearchStrategy[WeightDesign]:
    """Returns a strategy for what weights are made of.

    Args:
        allow_extremes: Whether weights may be as large and as small as their type holds.
            Otherwise their size is about 1, with outliers up to 16.
        allow_subnormal: Whether there may be subnormal numbers.
        allow_infinity: Whether there may be infinities.
        allow_nan: Whether there may be NaN.
    """
    switched = {
        "subnormals": allow_subnormal,
        "extremes": allow_extremes,
        "infinity": allow_infinity,
        "nan": allow_nan,
    }
    kinds = [*_TAME, *(kind for kind, is_on in switched.items() if is_on)]
    largest = 7 if allow_extremes else 3
    corners = st.builds(
        _corner, st.sampled_from(kinds), st.integers(0, 2**16 - 1), st.just(largest)
    )
    bases = ["steps", "normal", *(["patterns"] if allow_extremes and allow_subnormal else [])]
    return st.builds(
        WeightDesign,
        st.sampled_from(bases),
        st.integers(0, 2**32 - 1),
        st.lists(corners, max_size=3).map(tuple),
    )


def expert_weights(
    dtypes: SearchStrategy[np.dtype] | None = None,
    shapes: SearchStrategy[Shape] | None = None,
    *,
    allow_extremes: bool = True,
    allow_subnormal: bool = True,
    allow_infinity: bool = False,
    allow_nan: bool = False,
) -> SearchStrategy[Array]:
    """Returns a strategy for expert weights [E, N, K].

    They have zero rows, whole zero experts, outliers, constant blocks, exact ties, zeros of both
    signs, subnormals and extremes. They shrink to few small multiples of 1/16.

    Args:
        dtypes: The types; `activation_dtypes()` where it is left out.
        shapes: The shapes (E, N, K); `expert_shapes()` where it is left out.
        allow_extremes: Whether they may be as large and as small as their type holds; otherwise
            their size is about 1, with outliers up to 16.
        allow_subnormal: Whether they may have subnormal numbers.
        allow_infinity: Whether they may have infinities.
        allow_nan: Whether they may have NaN.

    Example:
        >>> weights = expert_weights(shapes=expert_shapes(max_columns=128, column_step=32))
    """
    designs = weight_designs(
        allow_extremes=allow_extremes,
        allow_subnormal=allow_subnormal,
        allow_infinity=allow_infinity,
        allow_nan=allow_nan,
    )
    return st.builds(
        WeightDesign.array,
        designs,
        expert_shapes() if shapes is None else shapes,
        activation_dtypes() if dtypes is None else dtypes,
    )
