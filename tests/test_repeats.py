"""Which graphs repeat tokens, and which only look like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._repeats import (
    column,
    regrouped,
    repeated_tokens,
    sizes,
    unflattened,
    without_casts,
)
from tests.expert_graphs import Builder, Layer
from tests.moe_models import Array, run

K, H = 2, 4
# What the symbols in shapes are when a graph is run.
SIZES = {"T": 3, "S": 5, "H": H}

Shape = Sequence[int | str | None]


class Tokens(Builder):
    """Writes what becomes of `x`, the tokens."""

    def __init__(self, *shape: int | str) -> None:
        super().__init__(Layer())
        self.shape = shape or ("T", H)
        self.x = self.graph.input("x", np.float32, self.shape)

    @property
    def numbers(self) -> Array:
        """What x is when the graph is run: every element is another number."""
        shape = [SIZES[size] if isinstance(size, str) else size for size in self.shape]
        return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    def result(self, value: ir.Value, rank: int = 2) -> Array:
        """Runs the graph up to a value of floats."""
        out = self.op("Identity", value)
        out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * rank)
        return run(self.graph.model(out), {"x": self.numbers})[0]

    def ints(self, numbers: Any, home: str = "initializer") -> ir.Value:
        self._count += 1
        return self.graph.weight(f"ints{self._count}", np.array(numbers, np.int64), home)

    def reshape(self, value: ir.Value, to: Any, home: str = "constant") -> ir.Value:
        return self.op("Reshape", value, self.ints(to, home))

    def repeat(
        self,
        source: ir.Value | None = None,
        *,
        axis: int = 1,
        to: Any = (1, K, 1),
        made: Shape | None = None,
        home: str = "constant",
        flat: Any = (-1, H),
        folded: Shape | None = None,
    ) -> ir.Value:
        """Unsqueezes, expands to `to`, which lives in `home`, and folds to `flat`.

        `made` and `folded` are what shapes are declared; with `folded` the folding is computed.
        """
        spread = self.op("Unsqueeze", source or self.x, self.constant([axis]))
        copies = shaped(self.op("Expand", spread, self.ints(to, home)), made)
        return shaped(self.reshape(copies, flat, "computed" if folded else "constant"), folded)

    def range(
        self, start: int = 0, step: int = 1, shape: Shape | None = ("T",), home: str = "constant"
    ) -> ir.Value:
        """Counts as many numbers as there are tokens."""
        size = self.op("Squeeze", self.op("Shape", self.x, start=0, end=1))
        end = self.op("Add", self.op("Mul", size, self.ints(step)), self.ints(start))
        numbers = self.op("Range", self.ints(start, home), end, self.ints(step, home))
        return shaped(numbers, shape)

    def rows(self, numbers: ir.Value | None = None, **changes: Any) -> ir.Value:
        """Repeats the numbers of the tokens."""
        return self.repeat(numbers or self.range(), **{"to": (1, K), "flat": (-1,), **changes})

    def pick(
        self, rows: ir.Value | None = None, source: ir.Value | None = None, axis: int = 0
    ) -> ir.Value:
        return self.op("Gather", source or self.x, rows or self.rows(), axis=axis)

    def pick_nd(self, rows: ir.Value | None = None, axis: int = -1, **attributes: int) -> ir.Value:
        indices = self.op("Unsqueeze", rows or self.rows(), self.constant([axis]))
        return self.op("GatherND", self.x, indices, **attributes)


def shaped(value: ir.Value, shape: Shape | None) -> ir.Value:
    value.shape = None if shape is None else ir.Shape(shape)
    return value


Written = Callable[[Tokens], ir.Value]
Case = tuple[tuple[int | str, ...], Written]
TOKENS = ("T", H)


@pytest.mark.parametrize(
    ("shape", "write"),
    [
        (TOKENS, lambda b: b.repeat()),
        (TOKENS, lambda b: b.repeat(to=(1, K, H))),
        ((3, H), lambda b: b.repeat(to=(3, K, 1))),
        ((1, H), lambda b: b.repeat()),
        (("T", 1), lambda b: b.repeat(flat=(-1, 1))),
        (TOKENS, lambda b: b.repeat(flat=(6, H), folded=("rows", H))),
        # Where the size is computed, the shape says what it is.
        (TOKENS, lambda b: b.repeat(made=("T", K, H), home="computed")),
        ((3, H), lambda b: b.repeat(made=(3, K, H), home="computed")),
        (TOKENS, lambda b: b.pick()),
        ((3, H), lambda b: b.pick(b.rows(b.range(shape=(3,))))),
        (TOKENS, lambda b: b.pick(b.rows(made=("T", K), home="computed"))),
        (TOKENS, lambda b: b.pick_nd()),
        (TOKENS, lambda b: b.pick_nd(axis=1)),
        (TOKENS, lambda b: b.pick_nd(batch_dims=0)),
    ],
)
def test_every_token_k_times_in_a_row(shape: tuple[int | str, ...], write: Written) -> None:
    b = Tokens(*shape)
    value = write(b)
    assert repeated_tokens(value, K) is b.x
    assert repeated_tokens(value, K + 1) is None
    np.testing.assert_array_equal(b.result(value), np.repeat(b.numbers, K, axis=0))


# One thing is different, and so is the result.
OTHERWISE: dict[str, Case] = {
    "the whole k times": (TOKENS, lambda b: b.repeat(axis=0, to=(K, 1, 1))),
    "two tokens two times": ((2, H), lambda b: b.repeat(axis=0, to=(2, 2, 1))),
    "more often": (TOKENS, lambda b: b.repeat(to=(1, K + 1, 1))),
    "every element": (("T", 1), lambda b: b.repeat(to=(1, K, 3), flat=(-1, 1))),
    "one token more often": ((1, H), lambda b: b.repeat(to=(3, K, 1))),
    "one axis more": ((2, H), lambda b: b.repeat(to=(1, 2, 1, 1))),
    "one axis less": (("T", 2), lambda b: b.repeat(to=(1, 2), flat=(-1, 2))),
    "other rows": (TOKENS, lambda b: b.repeat(flat=(-1, H // 2))),
    "other columns of rows": (TOKENS, lambda b: b.pick(b.rows(axis=0, to=(K, 1)))),
    "columns": (("T", 3), lambda b: b.pick(axis=1)),
    "from the last": (TOKENS, lambda b: b.pick(b.rows(b.range(-1)))),
    "backwards": (TOKENS, lambda b: b.pick(b.rows(b.range(step=-1)))),
    "rows of unknown size": (
        ("T", "H"),
        lambda b: b.repeat(flat=(12, 2), folded=("rows", "columns")),
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_repeats_otherwise(name: str) -> None:
    shape, write = OTHERWISE[name]
    b = Tokens(*shape)
    value = write(b)
    assert repeated_tokens(value, K) is None
    assert not np.array_equal(b.result(value), np.repeat(b.numbers, K, axis=0))


def nothing_known(b: Tokens) -> ir.Value:
    return b.op("Identity", b.x)


# What may be the same or not: something has no shape, or another one.
UNKNOWN: dict[str, Case] = {
    "not repeated": (TOKENS, lambda b: b.x),
    "not folded": (TOKENS, lambda b: b.op("Identity", b.repeat())),
    "not unsqueezed": (
        ("T", 1, H),
        lambda b: b.reshape(b.op("Expand", b.x, b.ints([1, K, 1])), (-1, H)),
    ),
    "not expanded": (
        TOKENS,
        lambda b: b.reshape(b.op("Tile", b.repeat().producer().inputs[0]), (-1, H)),  # type: ignore[union-attr]
    ),
    "along an unknown axis": (
        TOKENS,
        lambda b: b.reshape(
            b.op("Expand", b.op("Unsqueeze", b.x, b.ints([1], "input")), b.ints([1, K, 1])), (-1, H)
        ),
    ),
    "no source": (TOKENS, lambda b: b.repeat(nothing_known(b))),
    "a source with more axes": (("T", 5, H), lambda b: b.repeat(to=(1, K, 1, 1))),
    "a source with less axes": (("T",), lambda b: b.repeat(to=(1, K), flat=(-1,))),
    "folded to more axes": (TOKENS, lambda b: b.repeat(flat=(-1, K, H))),
    "folded to an unknown size": (TOKENS, lambda b: b.repeat(folded=("rows", "columns"))),
    "folded to an unknown shape": (
        TOKENS,
        lambda b: shaped(b.repeat(folded=("rows", H)), None),
    ),
    "to a default": (TOKENS, lambda b: b.repeat(home="overridable")),
    "to a size that is computed": (TOKENS, lambda b: b.repeat(home="computed")),
    **{
        f"to {made}": (TOKENS, lambda b, made=made: b.repeat(made=made, home="computed"))  # type: ignore[misc]
        for made in (
            ("T", K + 1, H),
            ("T", "K", H),
            ("T", K, H + 1),
            ("T", K, "H"),
            ("T", K, H, 1),
            ("T", K),
            ("T",),
            ("S", K, H),
            (3, K, H),
            (None, K, H),
        )
    },
    "to the size of no source": (
        TOKENS,
        lambda b: b.repeat(
            shaped(b.reshape(b.x, (-1, H)), None), made=("T", K, H), home="computed"
        ),
    ),
    "picked from unknown axes": (TOKENS, lambda b: b.pick(source=nothing_known(b))),
    "picked from more axes": (("T", 5, H), lambda b: b.pick()),
    "picked once": (TOKENS, lambda b: b.pick(b.range())),
    "picked along another axis": ((1, H), lambda b: b.pick_nd(b.rows(b.range(shape=(1,))), axis=0)),
    "picked along an unknown axis": (
        TOKENS,
        lambda b: b.op("GatherND", b.x, b.op("Unsqueeze", b.rows(), b.ints([1], "input"))),
    ),
    "picked without an axis": (
        TOKENS,
        lambda b: b.op("GatherND", b.x, b.reshape(b.rows(), (-1, 1))),
    ),
    "picked by what is given": (
        TOKENS,
        lambda b: b.pick(b.rows(b.graph.input("rows", np.int64, ("T",)))),
    ),
    "picked from a default on": (TOKENS, lambda b: b.pick(b.rows(b.range(home="overridable")))),
    "picked from other tokens": (TOKENS, lambda b: b.pick(b.rows(b.range(shape=("S",))))),
    "picked a number of times": (TOKENS, lambda b: b.pick(b.rows(b.range(shape=(3,))))),
    "picked an unknown number of times": (TOKENS, lambda b: b.pick(b.rows(b.range(shape=(None,))))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_to_repeat(name: str) -> None:
    shape, write = UNKNOWN[name]
    b = Tokens(*shape)
    value = write(b)
    b.graph.done(value)  # which says what is a graph input
    assert repeated_tokens(value, K) is None


def test_once_in_a_row() -> None:
    b = Tokens()
    assert repeated_tokens(b.x, 1) is b.x
    assert repeated_tokens(b.repeat(to=(1, 1, 1)), 1) is b.x
    assert repeated_tokens(b.pick(b.rows(to=(1, 1))), 1) is b.x
    assert repeated_tokens(nothing_known(b), 1) is None
    assert repeated_tokens(Tokens("T", 5, H).x, 1) is None
    # An element of each token.
    assert repeated_tokens(b.pick_nd(b.rows(to=(1, 1)), batch_dims=1), 1) is None
    # A token by itself has one axis.
    b = Tokens(1, H)
    row = b.rows(b.range(shape=(1,)), to=(1, 1), flat=())
    assert repeated_tokens(b.pick(row), 1) is None


@pytest.mark.parametrize(
    ("declared", "to", "home", "found"),
    [
        (None, (-1, 4), "constant", (None, 4)),
        (None, (-1, 4), "initializer", (None, 4)),
        (None, (0, 1), "constant", (None, 1)),
        (None, (-1,), "constant", (None,)),
        (("rows", "columns"), (-1, 4), "constant", (None, 4)),
        ((6, "columns"), (-1, 4), "constant", (6, 4)),
        ((6, 4), (0, -1), "constant", (6, 4)),
        (None, (-1, 4), "computed", None),
        (None, (-1, 4), "overridable", None),
        (("rows", 4), (3, -1), "overridable", (None, 4)),
        # A declaration that contradicts the node is not believed.
        ((6, 8), (-1, 4), "constant", (6, 4)),
        (("rows",), (-1, 4), "constant", (None, 4)),
    ],
)
def test_sizes(declared: Shape | None, to: Shape, home: str, found: Any) -> None:
    b = Tokens()
    value = shaped(b.reshape(b.x, to, home), declared)
    b.graph.done(value)
    assert sizes(value) == found


def test_a_shape_that_is_an_attribute_is_not_read() -> None:
    """As Reshape had it before opset 5."""
    b = Tokens()
    value = b.op("Reshape", b.x, shape=[-1])
    assert (sizes(value), unflattened(value), column(value)) == (None, None, None)


def test_sizes_of_what_is_not_reshaped() -> None:
    b = Tokens()
    assert sizes(b.x) == (None, H)
    assert sizes(nothing_known(b)) is None
    # Flatten has no shape to say.
    assert sizes(shaped(b.op("Flatten", b.x, axis=1), ("rows", 8))) == (None, 8)


FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


@pytest.mark.parametrize(
    ("types", "count"),
    [
        ((), 0),
        ((FLOAT,), 1),
        ((HALF,), 1),
        ((BFLOAT,), 1),
        ((BFLOAT, HALF, FLOAT), 3),
        ((HALF, ir.DataType.INT64), 0),
        ((ir.DataType.INT64, HALF), 1),
        ((ir.DataType.BOOL, HALF, FLOAT), 2),
    ],
)
def test_casts(types: Sequence[ir.DataType], count: int) -> None:
    b = Tokens()
    values = [b.x]
    for dtype in types:
        values.append(b.op("Cast", values[-1], to=dtype))
    value, nodes = without_casts(values[-1])
    assert value is values[len(types) - count]
    assert [node.outputs[0] for node in nodes] == values[::-1][:count]
    assert without_casts(None) == (None, [])


@pytest.mark.parametrize(
    ("write", "is_flat"),
    [
        (lambda b: b.reshape(b.x, (-1,)), True),
        (lambda b: b.reshape(b.x, (-1, 1)), False),
        (lambda b: b.reshape(b.x, (1, -1)), False),
        (lambda b: b.op("Squeeze", b.x, b.constant([-1])), False),
    ],
)
def test_unflattened(write: Written, is_flat: bool) -> None:
    b = Tokens()
    value = write(b)
    assert unflattened(value) is (b.x if is_flat else None)
    if is_flat:
        np.testing.assert_array_equal(b.result(value, 1), b.numbers.reshape(-1))


@pytest.mark.parametrize(
    ("write", "is_column"),
    [
        (lambda b: b.op("Unsqueeze", b.reshape(b.x, (-1,)), b.ints([-1])), True),
        (lambda b: b.op("Unsqueeze", b.reshape(b.x, (-1,)), b.ints([1])), True),
        (lambda b: b.reshape(b.x, (-1, 1)), True),
        (lambda b: b.op("Unsqueeze", b.reshape(b.x, (-1,)), b.ints([0])), False),
        (lambda b: b.op("Unsqueeze", b.reshape(b.x, (-1,)), b.ints([1], "input")), False),
        (lambda b: b.op("Unsqueeze", b.x, b.ints([-1])), False),
        (lambda b: b.reshape(b.x, (-1,)), False),
        (lambda b: b.reshape(b.x, (1, -1)), False),
        (lambda b: b.reshape(b.x, (-1, 2)), False),
        (lambda b: b.op("Flatten", b.reshape(b.x, (-1, 1)), axis=1), False),
    ],
)
def test_column(write: Written, is_column: bool) -> None:
    b = Tokens()
    value = write(b)
    assert column(value) is (b.x if is_column else None)
    if is_column:
        np.testing.assert_array_equal(b.result(value), b.numbers.reshape(-1, 1))


def test_regrouped() -> None:
    b = Tokens()
    assert regrouped(b.x) is b.x
    value = b.op("Transpose", b.x, perm=[1, 0])
    other = b.op("Unsqueeze", value, b.constant([0]))
    other = b.op("Squeeze", b.op("Reshape", other, b.ints([-1, 1, 6])), b.constant([1]))
    assert regrouped(b.op("Flatten", other, axis=0)) is value
    for op_type in ("Transpose", "Identity", "Neg"):
        other = b.op(op_type, b.x)
        assert regrouped(other) is other
